"""Prompts out of a file, checked line by line."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTIONS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
)  # fmt: skip


class LineError(ValueError):
    """A line that cannot be used; the message begins with file and line number."""


@dataclass(frozen=True)
class Job:
    """One line: a prompt, or a conversation in `messages`, which becomes the prompt through a chat template.

    `options` are those of `OPTIONS` that it gives. `where` is file and line for messages.
    """

    where: str
    line: int
    id: str | int
    prompt: str | list[Any]
    messages: list[Any] | None
    options: dict[str, Any]


def count_lines(file: Path) -> int | None:
    """Lines that are not blank; None where counting would use them up (a pipe). OSError when there is no such file."""
    if not stat.S_ISREG(file.stat().st_mode):
        return None
    with open(file, "rb") as stream:
        return sum(bool(line.strip()) for line in stream)


def read_jobs(file: Path) -> Iterator[Job | LineError]:
    """The lines of `file` one by one: prompts as they stand (`.txt`), JSON objects otherwise. Blank lines are skipped.

    A line that cannot be used comes as a LineError, and reading goes on. An id that a line does not give is its number.
    """
    first_line: dict[str, int] = {}
    with open(file, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                job = _parse(raw, file, number)
            except LineError as error:
                yield error
                continue
            before = first_line.setdefault(json.dumps(job.id), number)
            if before != number:
                yield LineError(f"{job.where}: the id {job.id!r} stands in line {before} already; each needs its own")
                continue
            yield job


def _parse(raw: bytes, file: Path, number: int) -> Job:
    where = f"{file}:{number}"
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"{where}: is not UTF-8 ({error})") from None
    if file.suffix == ".txt":
        return Job(where, number, number, text.rstrip("\r\n"), None, {})
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise LineError(f"{where}: is not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number without end, nesting without end
        raise LineError(f"{where}: is not JSON ({error})") from None
    if not isinstance(line, dict):
        found = type(line).__name__
        raise LineError(f'{where}: is a JSON {found}, expected an object like {{"id": "a", "prompt": "Once"}}')
    prompt, name, messages = line.get("prompt"), line.get("id"), line.get("messages")
    if messages is not None:
        if prompt is not None:
            raise LineError(f"{where}: has both 'prompt' and 'messages', expected one of them")
        if not isinstance(messages, list):
            raise LineError(f"{where}: has 'messages' of type {type(messages).__name__}, expected a list")
        prompt = ""
    if not isinstance(prompt, str | list):
        found = "has no 'prompt'" if "prompt" not in line else f"has a 'prompt' of type {type(prompt).__name__}"
        raise LineError(f"{where}: {found}, expected a text or a list of token ids, or 'messages'")
    if _half_surrogate(prompt) or _half_surrogate(json.dumps(messages, ensure_ascii=False)):
        raise LineError(f"{where}: the prompt holds half of a surrogate pair (\\ud800...\\udfff), which is no text")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise LineError(f"{where}: has an 'id' of type {type(name).__name__}, expected a text or a whole number")
    options = {key: line[key] for key in OPTIONS if line.get(key) is not None}
    return Job(where, number, number if name is None else name, prompt, messages, options)


def _half_surrogate(text: object) -> bool:
    return isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text)
