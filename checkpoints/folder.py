"""The files of a checkpoint folder besides its weights: config.json, generation_config.json and tokenizer.json."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from checkpoints.errors import REDOWNLOAD, CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
MAX_JSON_BYTES = 100_000_000  # the limit of safetensors' own headers; an index of 64,196 tensors has 6 MB


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raises ValueError for a key that occurs twice, of which one would be lost."""
    table = dict(pairs)
    if len(table) < len(pairs):
        ((duplicate, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {duplicate!r} occurs twice")
    return table


def parse_json_object(text: bytes, source: str) -> dict[str, Any]:
    """Return the JSON object in `text`.

    Args:
        text: UTF-8, with or without a byte-order mark.
        source: the beginning of every error message, which says where the text comes from.

    Raises:
        CheckpointError: `text` is anything but a JSON object, or a key occurs twice in one.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, or a number of too many digits
        raise CheckpointError(f"{source} is not valid JSON ({error}). {REDOWNLOAD}") from error
    if not isinstance(value, dict):
        found = type(value).__name__
        raise CheckpointError(f"{source} holds a JSON {found}, expected an object. Is it the right file?")
    return value


def read_json_file(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; raises CheckpointError if it is unreadable, too large or no JSON object."""
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            limit = f"{MAX_JSON_BYTES:,}"
            raise CheckpointError(f"{file}: has {size:,} bytes, expected at most {limit}. Is it JSON?")
        text = file.read_bytes()
    except OSError as error:
        raise read_error(file, error) from error
    return parse_json_object(text, f"{file}:")


def read_error(file: Path, error: OSError) -> CheckpointError:
    """Return the CheckpointError for a file that the operating system cannot read."""
    return CheckpointError(
        f"{file}: cannot be read ({error.strerror or error}). Check that it exists, its permissions and the disk."
    )


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of `generation_config.json` in `folder`, or {} if there is no such file."""
    file = folder / GENERATION_CONFIG
    return read_json_file(file) if file.exists() else {}


def find_tokenizer(folder: Path) -> Path | None:
    """Return the path of `tokenizer.json` in `folder`, or None if there is no such file."""
    file = folder / TOKENIZER
    return file if file.is_file() else None


def list_names(folder: Path, limit: int = 20) -> str:
    """List at most `limit` names in `folder` for an error message; a folder's name ends with a slash."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror}). Check its permissions.") from error
    names = [entry.name + "/" * entry.is_dir() for entry in entries[:limit]]
    if len(entries) > limit:
        names.append(f"and {len(entries) - limit} more")
    return ", ".join(names) or "nothing"
