"""What every checkpoint folder holds besides weights: config.json, generation_config.json, tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
MAX_JSON_BYTES = 100_000_000  # the limit of safetensors' own headers; an index of 64,196 tensors has 6 MB


def parse_json_object(
    text: bytes, what: str, make_object: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict
) -> dict[str, Any]:
    """The JSON object in `text`; anything else raises a CheckpointError whose message begins with `what`.

    `make_object` builds every object from its pairs, and may refuse them with a ValueError.
    """
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=make_object)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, an endless number
        raise CheckpointError(f"{what} is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        found = type(value).__name__
        raise CheckpointError(f"{what} holds a JSON {found}, expected an object. Is it the right file?")
    return value


def read_json_file(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; CheckpointError when it cannot be read, is too large or no JSON object."""
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            limit = f"{MAX_JSON_BYTES:,}"
            raise CheckpointError(f"{file}: has {size:,} bytes, expected at most {limit}. Is it JSON?")
        text = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    return parse_json_object(text, f"{file}:")


def unreadable(file: Path, error: OSError) -> CheckpointError:
    """The CheckpointError for a file that the operating system does not let us read."""
    return CheckpointError(
        f"{file}: cannot be read ({error.strerror or error}). Check that it exists, its rights and the disk."
    )


def read_generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json` of `folder`, or {} where there is none."""
    file = folder / GENERATION_CONFIG
    return read_json_file(file) if file.exists() else {}


def find_tokenizer(folder: Path) -> Path | None:
    """`tokenizer.json` of `folder`, or None."""
    file = folder / TOKENIZER
    return file if file.is_file() else None


def list_names(folder: Path, limit: int = 20) -> str:
    """The names in `folder` for an error message, folders with a trailing slash, at most `limit` of them."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror}). Check its rights.") from error
    names = [entry.name + "/" * entry.is_dir() for entry in entries[:limit]]
    if len(entries) > limit:
        names.append(f"and {len(entries) - limit} more")
    return ", ".join(names) or "nothing"
