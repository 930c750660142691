"""Prompts and an interruptible job for the tests of `mtpjax generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtpjax.cli import generate

SETTINGS = (
    *("--num-speculative-tokens", "2", "--mtp-prompt-tokens", "9", "--max-model-len", "40"),
    *("--max-num-seqs", "3", "--max-prefill-seqs", "2"),
)


def rows(file: Path) -> list[dict[str, Any]]:
    """Read the lines of an output file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def prompt_lines(number: int) -> list[dict[str, Any]]:
    """Unequal prompts, as clockless_rows and as ids, some with options of their own."""
    lines: list[dict[str, Any]] = []
    for i, length in enumerate(np.random.default_rng(0).integers(1, 30, number).tolist()):
        ids = [(7 * i + j) % 95 for j in range(length)]
        lines.append({"id": f"é{i}", "prompt": ids if i % 3 else " ".join(f"w{t}" for t in ids)})
    lines[2] |= {"max_tokens": 0}
    lines[4] |= {"temperature": 5.0}  # at this temperature the noise decides, and drafts are often accepted
    lines[5] |= {"temperature": 5, "seed": 77, "max_tokens": 3}
    lines[5] |= {"top_k": 9, "top_p": 0.5, "min_p": 0.0}
    lines[3] |= {"presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.5}
    return lines


def watch_answers(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> None:
    """Call `before(n)` before answer number n = 1, 2, ... is written."""
    row, number = generate.output_row, [0]

    def watched(*args: Any) -> dict[str, object]:
        number[0] += 1
        before(number[0])
        return row(*args)

    monkeypatch.setattr(generate, "output_row", watched)


def clockless_rows(file: Path) -> list[tuple[Any, ...]]:
    """Read an output file without what depends on the clock."""
    return [(row["id"], row["prompt"], row["text"], row["token_ids"], row["finish_reason"]) for row in rows(file)]


def interrupted_part(
    job: Callable[..., int], lines: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> bytes:
    """Return the partial file of a run that was stopped before its last answer."""

    def stop(number: int) -> None:
        if number == len(lines):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch_answers(patch, stop)
        assert job(lines, *options) == 130
    return (tmp_path / "out.jsonl.part").read_bytes()
