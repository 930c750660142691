"""Writing a folder of safetensors files, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from checkpoints.dtypes import DTYPE_NAMES
from checkpoints.errors import CheckpointError
from checkpoints.folder import CONFIG, GENERATION_CONFIG, TOKENIZER
from checkpoints.safetensors.header import encode_header
from checkpoints.safetensors.reader import INDEX


class _Entry(NamedTuple):
    """A tensor to be written; `make` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors_directory(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Sequence[int], DTypeLike, Callable[[], NDArray[Any]]]],
    *,
    generation_config: Mapping[str, Any] | None = None,
    tokenizer_file: str | os.PathLike[str] | None = None,
    extra_files: Iterable[str | os.PathLike[str]] = (),
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write config.json, `tensors` (name, shape, dtype, function that makes the array), copies of files.

    `model.safetensors` when the data fits in `max_shard_bytes`, else `model-00001-of-0000N.safetensors` and
    an index; shards are filled in the given order, and a tensor larger than a shard gets one of its own.
    Within a shard wide types come first, so that every tensor is aligned: the functions are called in that
    order, each result dropped before the next. `tokenizer_file` is copied as tokenizer.json, `extra_files`
    under their own names.

    Everything is written to a temporary folder beside `path` and renamed at the end: `path` is the whole
    checkpoint or is as it was. Raises CheckpointError when `path` exists and is not an empty folder, a name
    or dtype cannot be stored, or an array is not what was announced; OSError when the disk is full or a file
    cannot be copied.
    """
    target = Path(path).resolve()
    _check_free(target)
    shards = _split(_check_entries(target, tensors), max_shard_bytes)
    copies = _plan_copies(target, tokenizer_file, extra_files)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        _write_json(partial / CONFIG, config)
        if generation_config is not None:
            _write_json(partial / GENERATION_CONFIG, generation_config)
        for name, source in copies.items():
            shutil.copyfile(source, partial / name)
        files = _shard_names(len(shards))
        for file, shard in zip(files, shards, strict=True):
            _write_shard(partial / file, shard)
        if len(shards) > 1:
            _write_json(partial / INDEX, _index(files, shards))
        _check_free(target)  # again: writing may have taken an hour
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_free(target: Path) -> None:
    if target.is_dir():
        if any(target.iterdir()):
            raise CheckpointError(f"{target}: already exists and is not empty. Choose another folder or empty it.")
    elif target.exists():
        raise CheckpointError(f"{target}: already exists and is a file, expected a folder. Choose another name.")


def _check_entries(
    target: Path, tensors: Iterable[tuple[str, Sequence[int], DTypeLike, Callable[[], NDArray[Any]]]]
) -> list[_Entry]:
    entries = [
        _Entry(name, tuple(int(size) for size in shape), np.dtype(dtype), make) for name, shape, dtype, make in tensors
    ]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen or entry.name == "__metadata__":
            why = "twice" if entry.name in seen else "but safetensors keeps that name for itself"
            raise CheckpointError(f"{target}: {entry.name!r} is to be written {why}. Rename the tensor.")
        seen.add(entry.name)
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{target}: {entry.name!r} has dtype {entry.dtype}, expected one of "
                f"{', '.join(dtype.name for dtype in DTYPE_NAMES)}. Convert it first."
            )
        if any(size < 0 for size in entry.shape):
            shape = list(entry.shape)
            raise CheckpointError(f"{target}: {entry.name!r} has shape {shape}, expected no negative size.")
    return entries


def _split(entries: list[_Entry], max_shard_bytes: int) -> list[list[_Entry]]:
    """Runs of `entries` of at most `max_shard_bytes` but at least one tensor; wide types first in each."""
    shards: list[list[_Entry]] = [[]]
    room = max_shard_bytes
    for entry in entries:
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _plan_copies(
    target: Path, tokenizer_file: str | os.PathLike[str] | None, extra_files: Iterable[str | os.PathLike[str]]
) -> dict[str, Path]:
    """Name in the new folder → file to copy, checked before an hour of writing rather than after it."""
    pairs = [(Path(file).name, Path(file)) for file in extra_files]
    if tokenizer_file is not None:
        pairs.insert(0, (TOKENIZER, Path(tokenizer_file)))
    copies: dict[str, Path] = {}
    for name, source in pairs:
        if name in copies or name in (CONFIG, GENERATION_CONFIG, INDEX) or name.endswith(".safetensors"):
            raise CheckpointError(f"{target}: {source} would be a second {name}. Leave it out of extra_files.")
        if not source.is_file():
            raise CheckpointError(f"{source}: is to be copied to {target} but is no file. Check the path.")
        copies[name] = source
    return copies


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _index(files: Sequence[str], shards: Sequence[Sequence[_Entry]]) -> dict[str, Any]:
    total = sum(entry.nbytes for shard in shards for entry in shard)
    weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_shard(file: Path, shard: Sequence[_Entry]) -> None:
    with open(file, "xb") as stream:
        stream.write(encode_header([(entry.name, entry.shape, entry.dtype) for entry in shard]))
        for entry in shard:
            stream.write(_bytes_of(entry, file))
        stream.flush()
        os.fsync(stream.fileno())  # the rename must not reach the disk before the data


def _bytes_of(entry: _Entry, file: Path) -> memoryview:
    """The array of `entry` as bytes. A function of its own, so that no name keeps the array alive."""
    array = np.asarray(entry.make())
    if array.shape != entry.shape or array.dtype != entry.dtype:
        raise CheckpointError(
            f"{file.name}: {entry.name!r} was made with shape {list(array.shape)} and dtype "
            f"{array.dtype.name}, expected {list(entry.shape)} and {entry.dtype.name} as announced."
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
