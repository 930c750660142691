"""`mtpjax generate`: every good line is answered as `LLM` answers it, and every bad one is named."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mtpjax import LLM, CompletionOutput, Metrics, RequestOutput, SamplingParams
from mtpjax.cli import generate
from mtpjax.cli.generate import main
from mtpjax.cli.report import JobTotals
from mtpjax.engine.engine import Engine
from mtpjax.sampling_params import PENALTIES
from tests.helpers.batch_job import SETTINGS, prompt_lines, rows, watch_answers

KEYS = {"id", "prompt", "text", "token_ids", "finish_reason", "stop_reason", "metrics"}


def test_answers_are_those_of_the_model_in_the_order_of_the_input(job: Callable, llm: LLM, tmp_path: Path) -> None:
    lines = prompt_lines(14)  # windows of 6, 6 and 2; batches of 3, the last of 2
    assert job(lines, "--ignore-eos", "--seed", "100", "--min-p", "0.01") == 0
    params = [
        SamplingParams(
            max_tokens=line.get("max_tokens", 6),
            temperature=line.get("temperature", 0.0),
            seed=line.get("seed", 100 + i),
            ignore_eos=True,
            top_k=line.get("top_k", 0),
            top_p=line.get("top_p", 1.0),
            min_p=line.get("min_p", 0.01),
            **{name: line[name] for name in PENALTIES if name in line},
        )
        for i, line in enumerate(lines)
    ]
    # Prefill of chunks of 16 rows; new caches for prefill and for slots; the loop and the insertion, with penalties,
    # because a line that waits has some.
    assert llm.engine.num_programs == 5
    expected = llm.generate([line["prompt"] for line in lines], params)
    answers = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in answers] == [line["id"] for line in lines]
    for row, line, output in zip(answers, lines, expected, strict=True):
        assert row.keys() == KEYS and row["prompt"] == line["prompt"]
        assert (row["token_ids"], row["text"], row["finish_reason"]) == (output.token_ids, output.text, "length")
        assert row["metrics"]["num_prompt_tokens"] == len(output.prompt_token_ids)
        assert row["metrics"]["num_accepted_tokens"] == output.metrics.num_accepted_tokens
    assert len({tuple(row["token_ids"]) for row in answers}) > 10 and any(
        output.metrics.num_accepted_tokens for output in expected
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert "é0" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")  # not \u00e9


@pytest.mark.parametrize(("text", "value"), [("512", 512), ("-1", -1), ("ids.json", "ids.json")])
def test_a_draft_vocabulary_is_a_number_or_a_file(
    text: str, value: int | str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: Path | None, **arguments: Any) -> LLM:
        assert arguments["draft_vocab_size"] == value
        raise ValueError(f"draft_vocab_size is {value!r}")

    monkeypatch.setattr(generate, "LLM", refuse)
    assert main(["--draft-vocab-size", text]) == 2
    assert f"draft_vocab_size is {value!r}" in capsys.readouterr().err


def test_overrides_of_the_config_are_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = {"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}}

    def refuse(model: Path | None, **arguments: Any) -> LLM:
        assert arguments["hf_overrides"] == overrides
        raise ValueError("seen")

    monkeypatch.setattr(generate, "LLM", refuse)
    assert main(["--hf-overrides", json.dumps(overrides)]) == 2
    assert "seen" in capsys.readouterr().err
    for bad, problem in (("{", "is not valid JSON"), ("[1]", "is no JSON object")):
        with pytest.raises(SystemExit):
            main(["--hf-overrides", bad])
        assert problem in capsys.readouterr().err


def test_recommended_sampling_is_overridden_by_options_and_lines(
    job: Callable, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line goes before the command line, and that before the advice."""
    monkeypatch.setattr(
        llm, "_generation_config", {"temperature": 5.0, "top_k": 7, "presence_penalty": 1.5, "top_p": 0.9}
    )
    lines = [{"prompt": [n], "top_p": 0.6} if n == 2 else {"prompt": [n]} for n in (1, 2, 3)]  # three: as many as slots
    assert job(lines, "--recommended-sampling", "--top-k", "50", "--ignore-eos") == 0
    how: dict[str, Any] = {
        "max_tokens": 6,
        "temperature": 5.0,
        "top_k": 50,
        "presence_penalty": 1.5,
        "ignore_eos": True,
    }
    expected = llm.generate(
        [[1], [2], [3]], [SamplingParams(**how, top_p=p, seed=seed) for seed, p in enumerate((0.9, 0.6, 0.9))]
    )
    advised = [row["token_ids"] for row in rows(tmp_path / "out.jsonl")]
    assert advised == [out.token_ids for out in expected]
    assert job(lines, "--ignore-eos", "--overwrite") == 0
    assert [row["token_ids"] for row in rows(tmp_path / "out.jsonl")] != advised


def test_stop_tokens_and_limit(job: Callable, tmp_path: Path) -> None:
    lines = prompt_lines(6)
    assert job(lines, "--ignore-eos", "--limit", "4") == 0
    free = rows(tmp_path / "out.jsonl")
    assert len(free) == 4
    stop = free[0]["token_ids"][2]
    assert job(lines, "--ignore-eos", "--limit", "4", "--overwrite", "--stop-token-ids", "94", str(stop)) == 0
    stopped = rows(tmp_path / "out.jsonl")
    assert stopped[0]["token_ids"] == free[0]["token_ids"][: free[0]["token_ids"].index(stop) + 1]
    assert (free[0]["finish_reason"], stopped[0]["finish_reason"]) == ("length", "stop")


BAD: list[tuple[Any, str]] = [
    (b'{"prompt": "w1"', "is not JSON .*column"),
    (b'{"prompt": "w1"} {}', "is not JSON .*Extra data"),
    (b'{"prompt": "\xff"}', "is not UTF-8"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"seed": 1' + b"0" * 5000 + b"}", "is not JSON"),
    ([1, 2], "is a JSON list, expected an object"),
    ({"id": "x"}, "has no 'prompt', expected a text or a list of token ids"),
    ({"prompt": None}, "has a 'prompt' of type NoneType"),
    ({"prompt": {"text": "w1"}}, "has a 'prompt' of type dict"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": [1, "w2"]}, "'w2' is not a token id"),
    ({"prompt": [1, 96]}, "id 96 at position 1 is outside the vocabulary"),
    ({"prompt": [1] * 40}, "the prompt has 40 tokens, more than the 39"),
    (b'{"prompt": "w1 \\ud800"}', "half of a surrogate pair"),
    ({"prompt": "w1", "id": 1.5}, "has an 'id' of type float"),
    ({"prompt": "w1", "id": True}, "has an 'id' of type bool"),
    ({"prompt": "w1", "id": "first"}, "the id 'first' is already that of line 1"),
    ({"prompt": "w1", "max_tokens": -1}, "max_tokens is -1"),
    ({"prompt": "w1", "max_tokens": "6"}, "max_tokens is '6'"),
    ({"prompt": "w1", "temperature": -1}, "temperature is -1"),
    (b'{"prompt": "w1", "temperature": NaN}', "temperature is nan"),
    ({"prompt": "w1", "seed": "s"}, "seed is 's'"),
    ({"prompt": "w1", "top_p": 0}, "top_p is 0; expected a number above 0 and at most 1"),
    ({"prompt": "w1", "presence_penalty": 3}, "presence_penalty is 3; expected a number from -2 to 2"),
    ({"prompt": "w1", "max_token": 3}, "has an unknown key 'max_token'; did you mean 'max_tokens'"),
    ({"prompt": "w1", "url": "x"}, "has an unknown key 'url'"),
    ({"prompt": "w1", "colour": 3}, "has an unknown key 'colour'; known: id, prompt, messages"),
    ({"prompt": "w1", "stop": [""]}, "stop"),
    ({"prompt": "w1", "n": 2}, "n is 2 and temperature is 0"),
    ({"prompt": "w1", "min_tokens": 9}, "min_tokens is 9, more than max_tokens, which is 6"),
    ({"prompt": "w1", "logprobs": 21}, "logprobs is 21"),
    ({"prompt": "w1", "logit_bias": {"96": 1}}, "logit_bias has token 96, outside the vocabulary"),
    ({"prompt": "w1", "allowed_token_ids": []}, "allowed_token_ids is empty"),
    ({"prompt": "w1", "num_speculative_tokens": 3}, "num_speculative_tokens is 3"),
    ({"prompt": "w1", "echo": True}, "has 'echo' = true, which is not supported; only false or null is"),
    ({"prompt": "w1", "chat_template_kwargs": {"a": 1}}, "which a 'prompt' does not use; give 'messages'"),
    ({"prompt": "w1", "max_tokens": 3, "max_completion_tokens": 4}, "which differ; give one of them"),
    ({"prompt": "w1", "stop_token_ids": 4}, "'stop_token_ids' of type int, expected a list"),
    ({"prompt": ["w1", "w2"]}, "has several prompts; give each its own line"),
]


def test_bad_lines_are_named_and_the_others_answered(
    job: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error of a line is on the terminal, and in its line of the output."""
    good = [{"id": "first", "prompt": "w1 w2"}, {"id": None, "prompt": [3], "seed": None}, {"id": 7, "prompt": "w3"}]
    lines = [good[0], *(line for line, _ in BAD), b"  ", *good[1:]]
    assert job(lines) == 1
    captured = capsys.readouterr()
    printed = captured.err.splitlines()
    assert len(printed) == len(BAD) + 1
    for number, ((_, message), line) in enumerate(zip(BAD, printed, strict=False), start=2):
        assert re.match(f"mtpjax generate: {tmp_path}/in.jsonl:{number}: .*{message}", line), line
    assert printed[-1] == f"mtpjax generate: {len(BAD)} line(s) of {tmp_path}/in.jsonl have errors, see above"
    assert f"errors          {len(BAD)} lines" in captured.out
    answers = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in answers if "error" not in row] == ["first", len(lines) - 1, 7]
    assert [f"mtpjax generate: {tmp_path}/in.jsonl:{i}: {row['error']}" for i, row in enumerate(answers[1:-2], 2)] == (
        printed[:-1]
    )


def test_a_text_file_has_a_prompt_a_line(job: Callable, tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbfw1 w2\r", b"", b'{"prompt": "w3"}', b"w4\xe2\x80\xa8w5"]
    assert job(lines, "--limit", "4", name="in.txt") == 0
    assert [(row["id"], row["prompt"]) for row in rows(tmp_path / "out.jsonl")] == [
        (1, "w1 w2"),
        (3, '{"prompt": "w3"}'),
        (4, "w4\u2028w5"),
    ]


def test_an_input_of_bad_lines_only_gives_their_errors(job: Callable, tmp_path: Path) -> None:
    assert job([[], {}, 5]) == 1
    assert [(row["id"], "error" in row) for row in rows(tmp_path / "out.jsonl")] == [(1, True), (2, True), (3, True)]


def test_only_a_window_of_the_input_is_read_ahead(job: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    read, ahead = [0], []
    read_prompt_lines = generate.read_prompt_lines

    def counted(file: Path) -> Iterator[Any]:
        for item in read_prompt_lines(file):
            read[0] += 1
            yield item

    monkeypatch.setattr(generate, "read_prompt_lines", counted)
    watch_answers(monkeypatch, lambda number: ahead.append(read[0] - number))
    assert job(prompt_lines(30)) == 0
    assert 3 < max(ahead) < 6 + 3  # of a window and those in the slots


def test_a_pipe_can_be_the_input(job: Callable, llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stream:
        stream.write(b'{"prompt": "w1"}\n{"prompt": "w2 w3"}\n')
    where = ["--model", "model", "--input", f"/dev/fd/{reading}", *SETTINGS]
    assert main([*where, "--max-tokens", "3"]) == 0
    os.close(reading)
    printed = capsys.readouterr().out
    assert (
        "[1] w1\n  > w" in printed and "[2] w2 w3\n  > w" in printed and "prompts          2 with 3 tokens" in printed
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "nowhere"], "nowhere: does not exist"),
        (["--num-speculative-tokens", "9"], "num_speculative_tokens is 9; expected a whole number from 0 to 8"),
        (["--max-model-len", "1000"], "made for at most 512 positions"),
        (["--output", "/nowhere/out.jsonl"], "/nowhere/out.jsonl.part"),
        (["--output", "."], "is a folder"),
    ],
)
def test_a_job_that_cannot_start_says_why(
    options: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "w1"}')
    assert main(["--model", str(folder), "--input", "in.jsonl", "--output", "out.jsonl", *options]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("mtpjax generate: ") and message in printed
    assert [f.name for f in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("option", ["--max-num-seqs", "--limit"])
def test_counts_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([option, "0"])
    assert f"{option} is 0, expected at least 1" in capsys.readouterr().err


def test_a_small_job_has_no_more_slots_than_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.txt").write_text("w1\n\nw2\nw3\n")
    calls: list[int] = []

    def stop(model: Path, *, max_num_seqs: int, **_: Any) -> LLM:
        calls.append(max_num_seqs)
        raise ValueError("enough")

    monkeypatch.setattr(generate, "LLM", stop)
    for more in ([], ["--limit", "2"], ["--max-num-seqs", "1"]):
        assert main(["--input", str(tmp_path / "in.txt"), *more]) == 2
    assert calls == [3, 2, 1]


def output(prompt: int, tokens: int, rounds: int, positions: tuple[int, ...]) -> RequestOutput:
    metrics = Metrics(prompt, 1.0, 2.0, rounds, rounds, 2 * rounds, sum(positions), positions, 1.0)
    return RequestOutput("p", [0] * prompt, [CompletionOutput(0, "text", [0] * tokens, "length")], 0, metrics)


def test_the_summary_adds_up() -> None:
    totals = JobTotals()
    for one in (output(10, 30, 12, (10, 8)), output(30, 10, 8, (2, 0)), output(20, 0, 0, (0, 0))):
        totals.add(one)
    engine = SimpleNamespace(
        num_prompt_tokens=40,
        num_cached_tokens=20,
        prefill_seconds=4.0,
        decode_seconds=8.0,
        compile_seconds=4.25,
        slot_steps=25,
    )
    assert totals.summary(cast(Engine, engine), 20.0).splitlines() == [
        "prompts          3 with 60 tokens, 20 of them from common beginnings",
        "prefill       10.0 tokens/s",  # 40 read, for a prompt of 20 came twice
        "decode         5.0 tokens/s: 40 tokens in 20 rounds, 2.00 a round",  # in 8
        "drafts   50.0% of 40 accepted; by position 60%, 40%",
        "slots          80% busy",
        "seconds       20.0 in all, 4.2 of them compiling",
    ]
    plain = JobTotals()
    printed = plain.summary(cast(Engine, SimpleNamespace(**dict.fromkeys(vars(engine), 0))), 1.0)
    assert "drafts   none" in printed and "- tokens/s" in printed


def test_without_arguments_the_embedded_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--limit", "1", "--max-tokens", "12", "--max-model-len", "100"]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"(?s)^\[\S+\] \S.*\n  > \S.*\n  12 new tokens in \d+ rounds: \d+ were drafted and accepted", printed
    )
    assert re.search(r"drafts +\d+\.\d% of \d+ accepted; by position \d+%, \d+%, \d+%\n", printed)
