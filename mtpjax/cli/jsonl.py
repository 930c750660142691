"""Prompts from a file of JSON lines, plain lines or rows of a table; each line is checked by itself."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.folder import unique_keys
from mtpjax.cli.line_keys import CHAT_KEYS, SAMPLING_KEYS, chat_options, check_keys, sampling_options
from mtpjax.cli.openai_batch import CHAT, error_row, is_batch_line, read_body, request_id
from mtpjax.cli.tables import check_table, is_table, read_rows


class LineError(ValueError):
    """A line that cannot be used. The message begins with the file and the number of the line.

    Attributes:
        line: the line number.
        row: what the output says of the line.
    """

    def __init__(self, message: str, line: int, row: dict[str, Any]) -> None:
        super().__init__(message)
        self.line, self.row = line, row


@dataclass(frozen=True)
class PromptLine:
    """One line of the input.

    Attributes:
        source: file and line number, for messages.
        line: the line number, from 1.
        id: the "id" or "custom_id" of the line; lines without one use their line number.
        prompt: a text, or a list of token ids; empty until `messages` have gone through the chat template.
        messages: a conversation in place of a prompt, or None.
        options: arguments of `SamplingParams` that the line gives.
        tools: for `messages`; None: those of the job.
        chat_template_kwargs: for `messages`, beside those of the job.
        url: of an OpenAI batch line; None for a line of our own form.
        request_id: of an OpenAI batch line.
        model: the name of a model that an OpenAI batch line gives.
    """

    source: str
    line: int
    id: str | int
    prompt: str | list[Any]
    messages: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    url: str | None = None
    request_id: str = ""
    model: str | None = None

    def error(self, message: str) -> LineError:
        """Return the error that this line cannot be used."""
        if self.url is not None:
            return LineError(f"{self.source}: {message}", self.line, error_row(self.request_id, self.id, message))
        return LineError(f"{self.source}: {message}", self.line, {"id": self.id, "error": message})


def count_lines(file: Path) -> int | None:
    """Count the lines that are not blank, or the rows. Returns None for a pipe, which counting would use up.

    Raises:
        OSError: there is no such file.
        ValueError: a table that cannot be read or has unknown columns.
    """
    if is_table(file):
        return check_table(file)
    if not stat.S_ISREG(file.stat().st_mode):
        return None
    with open(file, "rb") as stream:
        return sum(bool(line.strip()) for line in stream)


def read_prompt_lines(file: Path) -> Iterator[PromptLine | LineError]:
    """Read the lines of `file` one by one: a prompt (`.txt`), a row (`.parquet`, `.csv`) or a JSON object each.

    Blank lines are skipped. A line that cannot be used gives a LineError, and reading continues.
    """
    first_line_of_id: dict[str, int] = {}
    for line in _table_lines(file) if is_table(file) else _text_lines(file):
        if isinstance(line, PromptLine):
            first = first_line_of_id.setdefault(json.dumps(line.id), line.line)
            if first != line.line:
                yield line.error(f"the id {line.id!r} is already that of line {first}; each line needs its own")
                continue
        yield line


def _table_lines(file: Path) -> Iterator[PromptLine | LineError]:
    for number, row in read_rows(file):
        yield _read_row(row, f"{file}:{number}", number)


def _text_lines(file: Path) -> Iterator[PromptLine | LineError]:
    with open(file, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if raw.strip():
                yield _parse(raw, file, number)


def _parse(raw: bytes, file: Path, number: int) -> PromptLine | LineError:
    source = f"{file}:{number}"
    unread = PromptLine(source, number, number, "")
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return unread.error(f"is not UTF-8 ({error})")
    if file.suffix == ".txt":
        return PromptLine(source, number, number, text.rstrip("\r\n"))
    try:
        row = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        return unread.error(f"is not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number with too many digits, or nesting that is too deep
        return unread.error(f"is not JSON ({error})")
    if not isinstance(row, dict):
        found = type(row).__name__
        return unread.error(f'is a JSON {found}, expected an object like {{"id": "a", "prompt": "Once"}}')
    return _read_row(row, source, number)


def _read_row(row: dict[str, Any], source: str, number: int) -> PromptLine | LineError:
    """The line that a JSON object or a row of a table is."""
    batch = is_batch_line(row)
    name = row.get("custom_id" if batch else "id")
    identity = request_id(row) if batch else ""
    if isinstance(name, str | int) and not isinstance(name, bool):
        empty = PromptLine(source, number, name, "", url=CHAT if batch else None, request_id=identity)
    else:
        empty = PromptLine(source, number, number, "", url=CHAT if batch else None, request_id=identity)
        if name is not None and not batch:
            return empty.error(f"has an 'id' of type {type(name).__name__}, expected a text or a whole number")
    try:
        if batch:
            url, body = read_body(row)
            return _make_line(empty, url, body)
        check_keys(row, ("id", "prompt", *CHAT_KEYS, *SAMPLING_KEYS))
        return _make_line(empty, None, row)
    except ValueError as error:
        return empty.error(str(error))


def _make_line(empty: PromptLine, url: str | None, row: Mapping[str, Any]) -> PromptLine:
    """The line of a row, or of the body of an OpenAI batch line; raises ValueError for one that cannot be used."""
    prompt, messages = row.get("prompt"), row.get("messages")
    if messages is not None:
        if prompt is not None:
            raise ValueError("has both 'prompt' and 'messages', expected one of them")
        if not isinstance(messages, list):
            raise ValueError(f"has 'messages' of type {type(messages).__name__}, expected a list")
        prompt = ""
    elif url == CHAT:
        raise ValueError("its body has no 'messages'")
    if not isinstance(prompt, str | list):
        found = f"has a 'prompt' of type {type(prompt).__name__}" if "prompt" in row else "has no 'prompt'"
        raise ValueError(f"{found}, expected a text or a list of token ids, or 'messages'")
    if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
        raise ValueError("has several prompts; give each its own line")
    texts = [row.get(key) for key in ("prompt", "messages", "tools", "chat_template_kwargs")]
    if _has_lone_surrogate(json.dumps(texts, ensure_ascii=False, default=repr)):
        raise ValueError("the prompt holds half of a surrogate pair (\\ud800...\\udfff), which is not text")
    tools, kwargs = chat_options(row)
    if messages is None and (tools or kwargs):
        raise ValueError("has tools or variables of the chat template, which a 'prompt' does not use; give 'messages'")
    return PromptLine(
        source=empty.source,
        line=empty.line,
        id=empty.id,
        prompt=prompt,
        messages=messages,
        options=sampling_options(row),
        tools=tools,
        chat_template_kwargs=kwargs,
        url=url,
        request_id=empty.request_id,
        model=row["model"] if url and isinstance(row.get("model"), str) else None,
    )


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)
