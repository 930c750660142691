"""The batch job: every good line is answered as `LLM` answers it, every bad one is named, and nothing is lost."""

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace as did
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import write_safetensors_directory
from mtpjax import LLM, CompletionOutput, Metrics, RequestOutput, SamplingParams
from mtpjax.cli import generate as batch_generate
from mtpjax.cli.generate import Totals, main
from mtpjax.engine import scheduler
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.weight_map import export_tensors
from mtpjax.sampling_params import PENALTIES
from tests.helpers.models import numpy_model, tiny_config

CFG = tiny_config(moe=False, num_superblocks=1, max_position=512)
SETTINGS = ("--draft", "2", "--mtp-prompt", "9", "--max-len", "40", "--batch", "3", "--admit", "2")
KEYS = {"id", "prompt", "text", "token_ids", "finish_reason", "metrics"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 96 words."""
    path = tmp_path_factory.mktemp("batch") / "model"
    write_safetensors_directory(path, config_to_hf(CFG), export_tensors(numpy_model(CFG, seed=1, scale=0.5)))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_speculative_tokens=2, max_model_len=40, max_num_seqs=3, max_prefill_seqs=2)


@pytest.fixture
def job(llm: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`job(lines, *options)` runs the script on a file of these lines with one compiled model; answers go to out.jsonl."""

    def the_same(model: Path, **arguments: Any) -> LLM:
        wanted = {
            "num_speculative_tokens": 2,
            "mtp_prompt_tokens": 9,
            "dtype": "float32",
            "quantization": None,
            "max_model_len": 40,
            "max_num_seqs": 3,
            "max_prefill_seqs": 2,
        }
        assert (model.name, arguments) == ("model", wanted)
        return llm

    def run(lines: list[Any], *options: str, name: str = "in.jsonl") -> int:
        data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
        (tmp_path / name).write_bytes(data)
        where = ["--model", "model", "--input", str(tmp_path / name), "--output", str(tmp_path / "out.jsonl")]
        return main([*where, *SETTINGS, "--max-tokens", "6", *options])

    monkeypatch.setattr(batch_generate, "LLM", the_same)
    monkeypatch.setattr(scheduler, "LOOKAHEAD_BATCHES", 2)  # six prompts
    return run


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def some_lines(number: int) -> list[dict[str, Any]]:
    """Unequal prompts, as texts and as ids, some with options of their own."""
    lines: list[dict[str, Any]] = []
    for i, length in enumerate(np.random.default_rng(0).integers(1, 30, number).tolist()):
        ids = [(7 * i + j) % 95 for j in range(length)]
        lines.append({"id": f"é{i}", "prompt": ids if i % 3 else " ".join(f"w{t}" for t in ids)})
    lines[2] |= {"max_tokens": 0}
    lines[4] |= {"temperature": 5.0}  # so hot that noise decides, and drafts are often right
    lines[5] |= {"temperature": 5, "seed": 77, "max_tokens": 3, "unknown": "stays out"}
    lines[5] |= {"top_k": 9, "top_p": 0.5, "min_p": 0.0}
    lines[3] |= {"presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.5}
    return lines


def test_answers_are_those_of_the_model_in_the_order_of_the_input(job: Callable, llm: LLM, tmp_path: Path) -> None:
    lines = some_lines(14)  # windows of 6, 6 and 2; batches of 3, the last of 2
    assert job(lines, "--ignore-eos", "--seed", "100", "--min-p", "0.01") == 0
    params = [
        SamplingParams(
            max_tokens=line.get("max_tokens", 6), temperature=line.get("temperature", 0.0),
            seed=line.get("seed", 100 + i), ignore_eos=True, top_k=line.get("top_k", 0), top_p=line.get("top_p", 1.0),
            min_p=line.get("min_p", 0.01), **{name: line[name] for name in PENALTIES if name in line},
        )
        for i, line in enumerate(lines)
    ]  # fmt: skip
    # Chunks of 16 rows; an empty cache for what is read and one for the slots; the loop and what fills its slots, each with
    # penalties and without.
    assert llm.engine.num_programs == 7
    wanted = llm.generate([line["prompt"] for line in lines], params)
    got = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in got] == [line["id"] for line in lines]
    for row, line, want in zip(got, lines, wanted, strict=True):
        assert row.keys() == KEYS and row["prompt"] == line["prompt"]
        assert (row["token_ids"], row["text"], row["finish_reason"]) == (want.token_ids, want.text, "length")
        assert row["metrics"]["num_prompt_tokens"] == len(want.prompt_token_ids)
        assert row["metrics"]["num_accepted_tokens"] == want.metrics.num_accepted_tokens
    assert len({tuple(row["token_ids"]) for row in got}) > 10 and any(
        want.metrics.num_accepted_tokens for want in wanted
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert "é0" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")  # not \u00e9


def test_as_the_checkpoint_advises(job: Callable, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line goes before the command line, and that before the advice."""
    monkeypatch.setattr(
        llm, "_generation_config", {"temperature": 5.0, "top_k": 7, "presence_penalty": 1.5, "top_p": 0.9}
    )
    lines = [{"prompt": [n], "top_p": 0.6} if n == 2 else {"prompt": [n]} for n in (1, 2, 3)]  # three: as many as slots
    assert job(lines, "--advised", "--top-k", "50", "--ignore-eos") == 0
    how = {"max_tokens": 6, "temperature": 5.0, "top_k": 50, "presence_penalty": 1.5, "ignore_eos": True}
    want = llm.generate(
        [[1], [2], [3]], [SamplingParams(**how, top_p=p, seed=seed) for seed, p in enumerate((0.9, 0.6, 0.9))]
    )
    advised = [row["token_ids"] for row in rows(tmp_path / "out.jsonl")]
    assert advised == [out.token_ids for out in want]
    assert job(lines, "--ignore-eos", "--overwrite") == 0
    assert [row["token_ids"] for row in rows(tmp_path / "out.jsonl")] != advised


def test_stop_tokens_and_limit(job: Callable, tmp_path: Path) -> None:
    lines = some_lines(6)
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
    ({"prompt": "w1", "id": "first"}, "the id 'first' stands in line 1 already"),
    ({"prompt": "w1", "max_tokens": -1}, "max_tokens is -1"),
    ({"prompt": "w1", "max_tokens": "6"}, "max_tokens is '6'"),
    ({"prompt": "w1", "temperature": -1}, "temperature is -1"),
    (b'{"prompt": "w1", "temperature": NaN}', "temperature is nan"),
    ({"prompt": "w1", "seed": "s"}, "seed is 's'"),
    ({"prompt": "w1", "top_p": 0}, "top_p is 0; expected a number above 0 and at most 1"),
    ({"prompt": "w1", "presence_penalty": 3}, "presence_penalty is 3; expected a number from -2 to 2"),
]


def test_bad_lines_are_named_and_the_others_answered(
    job: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"id": "first", "prompt": "w1 w2"}, {"id": None, "prompt": [3], "seed": None}, {"id": 7, "prompt": "w3"}]
    lines = [good[0], *(line for line, _ in BAD), b"  ", *good[1:]]
    assert job(lines) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(BAD) + 1
    for number, ((_, says), line) in enumerate(zip(BAD, said, strict=False), start=2):
        assert re.match(f"batch_generate.py: {tmp_path}/in.jsonl:{number}: .*{says}", line), line
    assert said[-1] == f"batch_generate.py: {len(BAD)} lines of {tmp_path}/in.jsonl were left out, see above"
    assert [row["id"] for row in rows(tmp_path / "out.jsonl")] == ["first", len(lines) - 1, 7]


def test_a_text_file_has_a_prompt_a_line(job: Callable, tmp_path: Path) -> None:
    lines = [b"\xef\xbb\xbfw1 w2\r", b"", b'{"prompt": "w3"}', b"w4\xe2\x80\xa8w5"]
    assert job(lines, "--limit", "4", name="in.txt") == 0
    assert [(row["id"], row["prompt"]) for row in rows(tmp_path / "out.jsonl")] == [
        (1, "w1 w2"), (3, '{"prompt": "w3"}'), (4, "w4\u2028w5")
    ]  # fmt: skip


def test_an_input_of_bad_lines_only_gives_an_empty_file(job: Callable, tmp_path: Path) -> None:
    assert job([[], {}, 5]) == 1
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def watch(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call `before(n)` ahead of answer number n = 1, 2, ..."""
    row, number = batch_generate.row, [0]

    def watched(*args: Any) -> dict[str, object]:
        number[0] += 1
        before(number[0])
        return row(*args)

    monkeypatch.setattr(batch_generate, "row", watched)


def test_answers_are_on_disk_as_soon_as_they_are_ready(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    watch(
        monkeypatch,
        lambda number: found.append((len(rows(tmp_path / "out.jsonl.part")), (tmp_path / "out.jsonl").exists())),
    )
    assert job(some_lines(14)) == 0
    assert found == [(n, False) for n in range(14)]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def texts(file: Path) -> list[tuple]:
    """What does not depend on the clock."""
    return [(row["id"], row["prompt"], row["text"], row["token_ids"], row["finish_reason"]) for row in rows(file)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_answered_stays_when_the_job_stops_and_another_goes_on(
    error: type[BaseException], job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(number: int) -> None:
        if number == 7:
            raise error("stopped")

    lines, out, part = some_lines(14), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    assert job(lines) == 0
    want = texts(out)
    out.unlink()
    with monkeypatch.context() as patch:
        watch(patch, stop)
        if error is KeyboardInterrupt:
            assert job(lines) == 130
        else:
            with pytest.raises(RuntimeError, match="stopped"):
                job(lines)
    assert f"stopped; 6 answers are in {part}" in capsys.readouterr().err
    assert not out.exists() and len(rows(part)) == 6

    assert job(lines) == 2  # what is left behind is not thrown away unasked
    assert "out.jsonl.part: is what an earlier run left behind; go on with it by --resume" in capsys.readouterr().err
    asked = []
    with monkeypatch.context() as patch:
        watch(patch, asked.append)
        assert job(lines, "--resume") == 0
    assert len(asked) == 14 - 6 and texts(out) == want
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert job(lines, "--overwrite") == 0 and texts(out) == want


def left_behind(job: Callable, lines: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> bytes:
    """The part of a run that stopped before its last answer."""

    def stop(number: int) -> None:
        if number == len(lines):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch(patch, stop)
        assert job(lines, *options) == 130
    return (tmp_path / "out.jsonl.part").read_bytes()


def test_a_run_goes_on_wherever_the_one_before_was_killed(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, out, part = some_lines(9), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    whole = left_behind(job, lines, tmp_path, monkeypatch, "--temperature", "5")
    settings = (tmp_path / "out.jsonl.part.settings").read_bytes()
    assert job(lines, "--temperature", "5", "--overwrite") == 0
    want = texts(out)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, ends[0] - 1, *ends[:2], *np.random.default_rng(0).integers(2, len(whole), 8)):
        out.unlink()
        part.write_bytes(whole[:cut])
        (tmp_path / "out.jsonl.part.settings").write_bytes(settings)
        assert job(lines, "--temperature", "5", "--resume") == 0
        assert texts(out) == want and not part.exists()


def test_a_run_goes_on_only_with_its_own_answers(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, part = some_lines(6), tmp_path / "out.jsonl.part"
    whole = left_behind(job, lines, tmp_path, monkeypatch)
    assert job(lines, "--resume", "--temperature", "0.5") == 2
    assert "out.jsonl.part: was made with temperature = None, not 0.5; go on with the same" in capsys.readouterr().err
    assert job([lines[0] | {"prompt": [9]}, *lines[1:]], "--resume") == 2
    assert "in.jsonl:1: " in (said := capsys.readouterr().err) and "answers another prompt under the id 'é0'" in said
    part.write_bytes(b"[1]\n" + whole)
    assert job(lines, "--resume") == 2
    assert "out.jsonl.part: at byte 0 is no answer" in capsys.readouterr().err
    part.write_bytes(whole)
    (tmp_path / "out.jsonl.part.settings").unlink()
    assert job(lines, "--resume") == 2
    assert "out.jsonl.part.settings: cannot be read" in capsys.readouterr().err
    assert part.read_bytes() == whole  # nothing of it was lost
    with pytest.raises(SystemExit):
        main(["--resume"])
    assert "--resume goes on with the answers of an --output" in capsys.readouterr().err


def test_an_existing_output_is_kept(job: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    assert job(some_lines(6)) == 2
    assert "out.jsonl: exists already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine" and not (tmp_path / "out.jsonl.part").exists()
    assert job(some_lines(6), "--overwrite") == 0
    assert len(rows(tmp_path / "out.jsonl")) == 6


def test_an_output_that_comes_into_being_meanwhile_is_kept(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch(monkeypatch, lambda number: (tmp_path / "out.jsonl").write_text("mine"))
    with pytest.raises(FileExistsError, match="has come into being meanwhile"):
        job(some_lines(6))
    assert (tmp_path / "out.jsonl").read_text() == "mine" and len(rows(tmp_path / "out.jsonl.part")) == 6


def test_only_a_window_of_the_input_is_read_ahead(job: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    read, ahead = [0], []
    read_jobs = batch_generate.read_jobs

    def counted(file: Path) -> Iterator[Any]:
        for item in read_jobs(file):
            read[0] += 1
            yield item

    monkeypatch.setattr(batch_generate, "read_jobs", counted)
    watch(monkeypatch, lambda number: ahead.append(read[0] - number))
    assert job(some_lines(30)) == 0
    assert 3 < max(ahead) < 6 + 3  # of a window and those in the slots


def test_a_pipe_can_be_the_input(job: Callable, llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as stream:
        stream.write(b'{"prompt": "w1"}\n{"prompt": "w2 w3"}\n')
    where = ["--model", "model", "--input", f"/dev/fd/{reading}", *SETTINGS]
    assert main([*where, "--max-tokens", "3"]) == 0
    os.close(reading)
    said = capsys.readouterr().out
    assert "[1] w1\n  > w" in said and "[2] w2 w3\n  > w" in said and "prompts          2 with 3 tokens" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--input", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "nowhere"], "nowhere: does not exist"),
        (["--draft", "9"], "num_speculative_tokens is 9; expected a whole number from 0 to 8"),
        (["--max-len", "1000"], "made for at most 512 positions"),
        (["--output", "/nowhere/out.jsonl"], "/nowhere/out.jsonl.part"),
        (["--output", "."], "is a folder"),
    ],
)
def test_a_job_that_cannot_start(
    options: list[str], says: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "w1"}')
    assert main(["--model", str(folder), "--input", "in.jsonl", "--output", "out.jsonl", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("batch_generate.py: ") and says in said
    assert [f.name for f in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("option", ["--batch", "--limit"])
def test_counts_are_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([option, "0"])
    assert f"{option} is 0, expected at least 1" in capsys.readouterr().err


def test_a_small_job_computes_no_idle_rows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.txt").write_text("w1\n\nw2\nw3\n")
    asked: list[int] = []

    def stop(model: Path, *, max_num_seqs: int, **_: Any) -> LLM:
        asked.append(max_num_seqs)
        raise ValueError("enough")

    monkeypatch.setattr(batch_generate, "LLM", stop)
    for more in ([], ["--limit", "2"], ["--batch", "1"]):
        assert main(["--input", str(tmp_path / "in.txt"), *more]) == 2
    assert asked == [3, 2, 1]


def output(prompt: int, tokens: int, rounds: int, positions: tuple[int, ...]) -> RequestOutput:
    metrics = Metrics(prompt, 1.0, 2.0, rounds, rounds, 2 * rounds, sum(positions), positions, 1.0)
    return RequestOutput("p", [0] * prompt, [CompletionOutput(0, "text", [0] * tokens, "length")], 0, metrics)


def test_the_summary_adds_up() -> None:
    totals = Totals()
    for one in (output(10, 30, 12, (10, 8)), output(30, 10, 8, (2, 0)), output(20, 0, 0, (0, 0))):
        totals.add(one)
    engine = did(num_prompt_tokens=40, prefill_seconds=4.0, decode_seconds=8.0, compile_seconds=4.25, slot_steps=25)
    assert totals.summary(engine, 20.0).splitlines() == [
        "prompts          3 with 60 tokens",
        "prefill       10.0 tokens/s",  # 40 read, for a prompt of 20 came twice
        "decode         5.0 tokens/s: 40 tokens in 20 rounds, 2.00 a round",  # in 8
        "drafts   50.0% of 40 accepted; by position 60%, 40%",
        "slots          80% busy",
        "seconds       20.0 in all, 4.2 of them compiling",
    ]
    plain = Totals()
    said = plain.summary(did(**dict.fromkeys(vars(engine), 0)), 1.0)
    assert "drafts   none" in said and "- tokens/s" in said


def test_without_arguments_the_embedded_model_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--limit", "1", "--max-tokens", "12", "--max-len", "100"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"(?s)^\[\S+\] \S.*\n  > \S.*\n  12 new tokens in \d+ rounds: \d+ were drafted and accepted", said)
    assert re.search(r"drafts +\d+\.\d% of \d+ accepted; by position \d+%, \d+%, \d+%\n", said)


def test_the_bar_shows_speed_and_acceptance(job: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    bar = batch_generate.tqdm

    class OnScreen(bar):  # type: ignore[misc,valid-type]
        def __init__(self, **kw: Any):
            super().__init__(**(kw | {"disable": False, "file": screen, "mininterval": 0, "ncols": 120}))

    monkeypatch.setattr(batch_generate, "tqdm", OnScreen)
    assert job([*some_lines(6), b"bad"]) == 1
    assert re.search(r"6/7 \[[^]]*, [1-9][\d,]* tokens/s, \d+% of drafts accepted\]", screen.getvalue())
