"""A batch job of `mtpjax generate`: its progress, its shards, its summary, and several samples of a line."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from mtpjax import LLM, SamplingParams
from mtpjax.cli import generate
from mtpjax.cli.generate import main
from mtpjax.cli.progress import JobProgress
from tests.helpers.batch_job import clockless_rows, prompt_lines, rows


def test_the_bar_shows_speed_acceptance_and_slots(job: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(generate, "JobProgress", lambda total: JobProgress(total, console))
    assert job([*prompt_lines(6), b"bad"]) == 1
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"\d/7 prompts [1-9][\d,]* tokens/s, \d+% of drafts accepted, slots \d+% busy", shown)


def test_without_a_terminal_the_progress_prints_nothing_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with JobProgress(3) as progress:
        progress.show("5 tokens/s")
        progress.advance()
        progress.write("an answer")
        progress.warn("a [red]problem[/red]")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("an answer\n", "a [red]problem[/red]\n")


def test_shards_answer_each_line_once_and_as_the_whole_job_does(
    job: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, out = prompt_lines(8), tmp_path / "out.jsonl"
    assert job(lines, "--ignore-eos", "--temperature", "3", "--limit", "7") == 0
    whole = clockless_rows(out)
    parts = {}
    for number in (1, 2, 3):
        out.unlink()
        assert job(lines, "--ignore-eos", "--temperature", "3", "--limit", "7", "--shard", f"{number}/3") == 0
        parts[number] = clockless_rows(out)
    assert [len(part) for part in parts.values()] == [3, 2, 2]
    assert [parts[1 + i % 3][i // 3] for i in range(7)] == whole
    for bad in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(SystemExit):
            main(["--shard", bad])
        assert "is not I/N with 1 <= I <= N" in capsys.readouterr().err


def test_the_summary_is_a_json_object(job: Callable, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    assert job([*prompt_lines(7), b"bad"], "--summary", str(file)) == 1
    figures = json.loads(file.read_text())
    assert (figures["num_prompts"], figures["num_texts"], figures["num_errors"]) == (7, 7, 1)
    assert figures["num_new_tokens"] == sum(len(row.get("token_ids", ())) for row in rows(tmp_path / "out.jsonl"))
    assert figures["num_accepted_tokens"] == sum(figures["num_accepted_tokens_per_pos"])
    assert figures["engine"]["slot_steps"] >= figures["num_steps"] > 0 and figures["seconds"] > 0


def test_samples_and_log_probabilities_of_a_line(job: Callable, llm: LLM, tmp_path: Path) -> None:
    """The options of the job hold for lines that say nothing else."""
    lines = [{"prompt": [1, 2], "n": 3}, {"prompt": [3]}, {"prompt": [4], "logprobs": 0, "prompt_logprobs": 2, "n": 1}]
    options = ("--ignore-eos", "--temperature", "3", "--logprobs", "2", "--n", "2", "--min-tokens", "6")
    assert job(lines, *options) == 0
    first, second, third = rows(tmp_path / "out.jsonl")
    (want,) = llm.generate([[1, 2]], SamplingParams(max_tokens=6, n=3, temperature=3.0, seed=0, ignore_eos=True))
    assert [one["token_ids"] for one in first["outputs"]] == [one.token_ids for one in want.outputs]
    assert [one["seed"] for one in first["outputs"]] == [one.seed for one in want.outputs]
    assert first["token_ids"] == want.outputs[0].token_ids
    assert [one["index"] for one in second["outputs"]] == [0, 1] and "outputs" not in third
    for token, logprobs in zip(first["token_ids"], first["logprobs"], strict=True):
        assert str(token) in logprobs and 2 <= len(logprobs) <= 3
    assert [list(logprobs) for logprobs in third["logprobs"]] == [[str(token)] for token in third["token_ids"]]
    assert third["prompt_logprobs"] == [None] and third["cumulative_logprob"] < 0
