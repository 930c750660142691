"""Prompts from a file of JSON lines or plain lines; each line is checked by itself."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Sampling parameters that a line may give for itself.
LINE_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


class LineError(ValueError):
    """A line that cannot be used. The message begins with the file and the number of the line."""


@dataclass(frozen=True)
class PromptLine:
    """One line of the input.

    Attributes:
        source: file and line number, for messages.
        line: the line number, from 1.
        id: the "id" of the line; lines without an "id" use their line number.
        prompt: a text, or a list of token ids; empty until `messages` have gone through the chat template.
        messages: a conversation in place of a prompt, or None.
        options: those of `LINE_OPTIONS` that the line gives.
    """

    source: str
    line: int
    id: str | int
    prompt: str | list[Any]
    messages: list[Any] | None
    options: dict[str, Any]


def count_lines(file: Path) -> int | None:
    """Count the lines that are not blank. Returns None for a pipe, which counting would use up.

    Raises:
        OSError: there is no such file.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        return None
    with open(file, "rb") as stream:
        return sum(bool(line.strip()) for line in stream)


def read_prompt_lines(file: Path) -> Iterator[PromptLine | LineError]:
    """Read the lines of `file` one by one: a prompt each (`.txt`), or a JSON object each. Blank lines are skipped.

    A line that cannot be used gives a LineError, and reading continues.
    """
    first_line_of_id: dict[str, int] = {}
    with open(file, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                line = _parse(raw, file, number)
            except LineError as error:
                yield error
                continue
            first = first_line_of_id.setdefault(json.dumps(line.id), number)
            if first != number:
                yield LineError(
                    f"{line.source}: the id {line.id!r} is already that of line {first}; each line needs its own"
                )
                continue
            yield line


def _parse(raw: bytes, file: Path, number: int) -> PromptLine:
    source = f"{file}:{number}"
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"{source}: is not UTF-8 ({error})") from None
    if file.suffix == ".txt":
        return PromptLine(source, number, number, text.rstrip("\r\n"), None, {})
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise LineError(f"{source}: is not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number with too many digits, or nesting that is too deep
        raise LineError(f"{source}: is not JSON ({error})") from None
    if not isinstance(row, dict):
        found = type(row).__name__
        raise LineError(f'{source}: is a JSON {found}, expected an object like {{"id": "a", "prompt": "Once"}}')
    prompt, name, messages = row.get("prompt"), row.get("id"), row.get("messages")
    if messages is not None:
        if prompt is not None:
            raise LineError(f"{source}: has both 'prompt' and 'messages', expected one of them")
        if not isinstance(messages, list):
            raise LineError(f"{source}: has 'messages' of type {type(messages).__name__}, expected a list")
        prompt = ""
    if not isinstance(prompt, str | list):
        found = "has no 'prompt'" if "prompt" not in row else f"has a 'prompt' of type {type(prompt).__name__}"
        raise LineError(f"{source}: {found}, expected a text or a list of token ids, or 'messages'")
    if _has_lone_surrogate(prompt) or _has_lone_surrogate(json.dumps(messages, ensure_ascii=False)):
        raise LineError(f"{source}: the prompt holds half of a surrogate pair (\\ud800...\\udfff), which is not text")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise LineError(f"{source}: has an 'id' of type {type(name).__name__}, expected a text or a whole number")
    options = {key: row[key] for key in LINE_OPTIONS if row.get(key) is not None}
    return PromptLine(source, number, number if name is None else name, prompt, messages, options)


def _has_lone_surrogate(text: object) -> bool:
    return isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text)
