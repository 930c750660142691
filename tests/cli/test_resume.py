"""Interrupted jobs of `mtpjax generate`: nothing is lost, and a resumed job ends with the same texts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtpjax.cli.generate import main
from mtpjax.cli.jsonl import PromptLine
from mtpjax.cli.resumable_output import ResumableJsonl
from tests.helpers.batch_job import clockless_rows, interrupted_part, prompt_lines, rows, watch_answers


def test_answers_are_on_disk_as_soon_as_they_are_ready(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    watch_answers(
        monkeypatch,
        lambda number: seen.append((len(rows(tmp_path / "out.jsonl.part")), (tmp_path / "out.jsonl").exists())),
    )
    assert job(prompt_lines(14)) == 0
    assert seen == [(n, False) for n in range(14)]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_answers_stay_when_the_job_stops_and_a_resumed_job_finishes_them(
    error: type[BaseException],
    job: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(number: int) -> None:
        if number == 7:
            raise error("stopped")

    lines, out, part = prompt_lines(14), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    assert job(lines) == 0
    expected = clockless_rows(out)
    out.unlink()
    with monkeypatch.context() as patch:
        watch_answers(patch, stop)
        if error is KeyboardInterrupt:
            assert job(lines) == 130
        else:
            with pytest.raises(RuntimeError, match="stopped"):
                job(lines)
    assert f"stopped; 6 answers are in {part}" in capsys.readouterr().err
    assert not out.exists() and len(rows(part)) == 6

    assert job(lines) == 2  # a partial output is kept
    assert (
        "out.jsonl.part: is the partial output of an earlier run; continue it with --resume" in capsys.readouterr().err
    )
    calls: list[int] = []
    with monkeypatch.context() as patch:
        watch_answers(patch, calls.append)
        assert job(lines, "--resume") == 0
    assert len(calls) == 14 - 6 and clockless_rows(out) == expected
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert job(lines, "--overwrite") == 0 and clockless_rows(out) == expected


def test_a_resumed_job_ends_with_the_same_texts_wherever_it_was_killed(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, out, part = prompt_lines(9), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    whole = interrupted_part(job, lines, tmp_path, monkeypatch, "--temperature", "5")
    settings = (tmp_path / "out.jsonl.part.settings").read_bytes()
    assert job(lines, "--temperature", "5", "--overwrite") == 0
    expected = clockless_rows(out)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, ends[0] - 1, *ends[:2], *np.random.default_rng(0).integers(2, len(whole), 8)):
        out.unlink()
        part.write_bytes(whole[:cut])
        (tmp_path / "out.jsonl.part.settings").write_bytes(settings)
        assert job(lines, "--temperature", "5", "--resume") == 0
        assert clockless_rows(out) == expected and not part.exists()


def test_a_job_resumes_only_its_own_answers(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, part = prompt_lines(6), tmp_path / "out.jsonl.part"
    whole = interrupted_part(job, lines, tmp_path, monkeypatch)
    assert job(lines, "--resume", "--temperature", "0.5") == 2
    assert (
        "out.jsonl.part: was made with temperature = None, not 0.5; continue with the same" in capsys.readouterr().err
    )
    assert job([lines[0] | {"prompt": [9]}, *lines[1:]], "--resume") == 2
    assert (
        "in.jsonl:1: " in (printed := capsys.readouterr().err) and "answers another prompt under the id 'é0'" in printed
    )
    part.write_bytes(b"[1]\n" + whole)
    assert job(lines, "--resume") == 2
    assert "out.jsonl.part: the bytes from 0 are not an answer" in capsys.readouterr().err
    part.write_bytes(whole)
    (tmp_path / "out.jsonl.part.settings").unlink()
    assert job(lines, "--resume") == 2
    assert "out.jsonl.part.settings: cannot be read" in capsys.readouterr().err
    assert part.read_bytes() == whole  # nothing of it was lost
    with pytest.raises(SystemExit):
        main(["--resume"])
    assert "--resume continues an --output" in capsys.readouterr().err


def test_an_existing_output_is_kept(job: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    assert job(prompt_lines(6)) == 2
    assert "out.jsonl: exists already" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "mine" and not (tmp_path / "out.jsonl.part").exists()
    assert job(prompt_lines(6), "--overwrite") == 0
    assert len(rows(tmp_path / "out.jsonl")) == 6


def test_an_output_that_appears_in_the_meantime_is_kept(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_answers(monkeypatch, lambda number: (tmp_path / "out.jsonl").write_text("mine"))
    with pytest.raises(FileExistsError, match="has appeared in the meantime"):
        job(prompt_lines(6))
    assert (tmp_path / "out.jsonl").read_text() == "mine" and len(rows(tmp_path / "out.jsonl.part")) == 6


def test_errors_of_an_earlier_run_are_left_out(tmp_path: Path) -> None:
    """Lines with errors are checked anew; an answer of the earlier run alone is no reason to keep their rows."""
    out, line = tmp_path / "out.jsonl", PromptLine("in.jsonl:2", 2, "b", "w1")
    answers = ResumableJsonl(out, {})
    answers.write(1, {"id": "a", "error": "has an unknown key"})
    answers.write(2, {"id": "b", "prompt": "w1", "text": "w2"})
    assert len(answers) == 1
    answers.close()
    resumed = ResumableJsonl(out, {}, resume=True)
    assert not resumed.has(PromptLine("in.jsonl:1", 1, "a", "w1")) and resumed.has(line)
    resumed.finish()
    assert rows(out) == [{"id": "b", "prompt": "w1", "text": "w2"}]
