"""Write a folder of safetensors files with one tensor in memory at a time."""

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
    """A tensor to write. `make` returns its array and is called once, just before the array is written."""

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
    """Write a checkpoint folder: config.json, weights, and copies of files.

    The weights are in `model.safetensors` if they fit into `max_shard_bytes`, else in
    `model-00001-of-0000N.safetensors` and so on, with an index. Shards are filled in the given order; a tensor
    larger than `max_shard_bytes` gets its own shard. Within a shard, wide types come first, which aligns every
    tensor. Arrays are made in that order, and each one is dropped before the next one is made.

    Everything is written to a temporary folder beside `path`, which is renamed at the end: `path` either becomes
    the whole checkpoint or stays as it was.

    Args:
        path: the folder to make; it may exist if it is empty.
        config: the content of config.json.
        tensors: name, shape and dtype of every tensor, and the function that makes its array.
        generation_config: the content of generation_config.json. None: no such file.
        tokenizer_file: copied as tokenizer.json.
        extra_files: copied under their own names.
        max_shard_bytes: the largest number of data bytes in a file.

    Raises:
        CheckpointError: `path` exists and is not an empty folder, a name or dtype cannot be stored, or an array
            has another shape or dtype than announced.
        OSError: the disk is full or a file cannot be copied.
    """
    target = Path(path).resolve()
    _check_unused(target)
    shards = _split_into_shards(_check_entries(target, tensors), max_shard_bytes)
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
        shard_names = _shard_names(len(shards))
        for shard_name, shard in zip(shard_names, shards, strict=True):
            _write_shard(partial / shard_name, shard)
        if len(shards) > 1:
            _write_json(partial / INDEX, _make_index(shard_names, shards))
        _check_unused(target)  # again: writing may have taken an hour
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_unused(target: Path) -> None:
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
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise CheckpointError(f"{target}: two tensors are named {entry.name!r}. Rename one of them.")
        if entry.name == "__metadata__":
            raise CheckpointError(f"{target}: safetensors reserves the name {entry.name!r}. Rename the tensor.")
        names.add(entry.name)
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{target}: {entry.name!r} has dtype {entry.dtype}, expected one of "
                f"{', '.join(dtype.name for dtype in DTYPE_NAMES)}. Convert it first."
            )
        if any(size < 0 for size in entry.shape):
            shape = list(entry.shape)
            raise CheckpointError(f"{target}: {entry.name!r} has shape {shape}, expected no negative size.")
    return entries


def _split_into_shards(entries: list[_Entry], max_shard_bytes: int) -> list[list[_Entry]]:
    """Split `entries` into runs of at most `max_shard_bytes` but at least one tensor; sort each, wide types first."""
    shards: list[list[_Entry]] = [[]]
    bytes_left = max_shard_bytes
    for entry in entries:
        if entry.nbytes > bytes_left and shards[-1]:
            shards.append([])
            bytes_left = max_shard_bytes
        shards[-1].append(entry)
        bytes_left -= entry.nbytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _plan_copies(
    target: Path, tokenizer_file: str | os.PathLike[str] | None, extra_files: Iterable[str | os.PathLike[str]]
) -> dict[str, Path]:
    """Return name in the new folder -> file to copy. The check comes before the writing, which may take an hour."""
    pairs = [(Path(file).name, Path(file)) for file in extra_files]
    if tokenizer_file is not None:
        pairs.insert(0, (TOKENIZER, Path(tokenizer_file)))
    copies: dict[str, Path] = {}
    for name, source in pairs:
        if name in copies or name in (CONFIG, GENERATION_CONFIG, INDEX) or name.endswith(".safetensors"):
            raise CheckpointError(f"{target}: {source} would be a second {name}. Leave it out of extra_files.")
        if not source.is_file():
            raise CheckpointError(f"{source}: cannot be copied to {target}, as it is not a file. Check the path.")
        copies[name] = source
    return copies


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _make_index(shard_names: Sequence[str], shards: Sequence[Sequence[_Entry]]) -> dict[str, Any]:
    total = sum(entry.nbytes for shard in shards for entry in shard)
    weight_map = {entry.name: name for name, shard in zip(shard_names, shards, strict=True) for entry in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_shard(file: Path, shard: Sequence[_Entry]) -> None:
    with open(file, "xb") as stream:
        stream.write(encode_header([(entry.name, entry.shape, entry.dtype) for entry in shard]))
        for entry in shard:
            stream.write(_make_bytes(entry, file))
        stream.flush()
        os.fsync(stream.fileno())  # the rename must not reach the disk before the data


def _make_bytes(entry: _Entry, file: Path) -> memoryview:
    """Make the array of `entry` and return its bytes. In the caller a local variable would keep the array alive."""
    array = np.asarray(entry.make())
    if array.shape != entry.shape or array.dtype != entry.dtype:
        raise CheckpointError(
            f"{file.name}: {entry.name!r} has shape {list(array.shape)} and dtype "
            f"{array.dtype.name}, expected {list(entry.shape)} and {entry.dtype.name} as announced."
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
