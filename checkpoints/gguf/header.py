"""Reading the head of a GGUF file: metadata and where each tensor lies. Every length is checked before it is used."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError
from checkpoints.folder import unreadable
from checkpoints.gguf.block_types import BLOCKS, BlockType
from checkpoints.gguf.codebooks import POINTS, points

_AGAIN = "Download the file again."
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
TYPES = BLOCKS | POINTS
# Types that this program does not read, by number, for the message.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of `file`: numpy `shape` (rows last but one), absolute `offset` and length in bytes."""

    file: Path
    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    nbytes: int


class _Cursor:
    """A place in the head of a file of `size` bytes; reads no further than its end."""

    def __init__(self, file: Path, size: int):
        self.file, self.size, self.at = file, size, 0
        self.stream = open(file, "rb")  # noqa: SIM115  # closed by `read_gguf_header`

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise CheckpointError(
                f"{self.file}: {what} needs {count:,} bytes at byte {self.at:,}, but the file has only {self.size:,}. {_AGAIN}"
            )
        raw = self.stream.read(count)
        if len(raw) != count:
            raise CheckpointError(f"{self.file}: ends inside {what}; it was longer when it was opened. {_AGAIN}")
        self.at += count
        return raw

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "surrogateescape")  # a key or token that is no UTF-8 harms nobody

    def value(self, what: str) -> Any:
        return self._of_type(self.number("I", what), what, nested=False)

    def _of_type(self, kind: int, what: str, nested: bool) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY or nested:
            raise CheckpointError(f"{self.file}: {what} has the value type {kind}, expected 0 to 12. {_AGAIN}")
        inner, count = self.number("I", what), self.number("Q", what)
        if inner in _SCALARS:
            code = _SCALARS[inner]
            raw = self.take(count * struct.calcsize("<" + code), what)
            return np.frombuffer(raw, "<" + code if code != "?" else "?").tolist()
        if count > (self.size - self.at) // 8:
            raise CheckpointError(f"{self.file}: {what} lists {count:,} items, more than fit into the file. {_AGAIN}")
        return [self._of_type(inner, what, nested=True) for _ in range(count)]


def read_gguf_header(file: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata by key, and all tensors in the order of the file; reads no weights.

    Raises CheckpointError that names the file and what is wrong with it: another format or version, another byte order,
    an end inside the head or a tensor, tensors that overlap, occur twice or are of a type that is not supported.
    """
    try:
        cursor = _Cursor(file, os.path.getsize(file))
        with cursor.stream:
            return _read(cursor)
    except OSError as error:
        raise unreadable(file, error) from error


def _read(cursor: _Cursor) -> tuple[dict[str, Any], list[GgufTensor]]:
    file = cursor.file
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise CheckpointError(f"{file}: begins with {magic!r}, expected b'GGUF'. Is this a GGUF file? {_AGAIN}")
    version = cursor.number("I", "the version")
    if version != 3:
        if version == 3 << 24:
            raise CheckpointError(
                f"{file}: is big-endian, expected little-endian. Use the little-endian file of this model."
            )
        raise CheckpointError(
            f"{file}: has GGUF version {version}, supported: 3. Use a file made by a newer converter."
        )
    tensors, pairs = cursor.number("Q", "the tensor count"), cursor.number("Q", "the metadata count")
    for count, least, what in ((tensors, 24, "tensors"), (pairs, 13, "metadata entries")):
        if count > cursor.size // least:
            raise CheckpointError(
                f"{file}: says it has {count:,} {what}, more than fit into its {cursor.size:,} bytes. {_AGAIN}"
            )
    metadata: dict[str, Any] = {}
    for i in range(pairs):
        key = cursor.string(f"metadata key {i}")
        if key in metadata:
            raise CheckpointError(f"{file}: has the metadata key {key!r} twice. {_AGAIN}")
        metadata[key] = cursor.value(f"metadata {key!r}")
    raw = [_tensor_info(cursor, i) for i in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{file}: general.alignment is {alignment!r}, expected a number of bytes. {_AGAIN}")
    start = -(-cursor.at // alignment) * alignment
    return metadata, _placed(file, cursor.size, start, alignment, raw)


def _tensor_info(cursor: _Cursor, number: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"the name of tensor {number}")
    dimensions = cursor.number("I", f"tensor {name!r}")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise CheckpointError(
            f"{cursor.file}: tensor {name!r} has {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}. {_AGAIN}"
        )
    shape = tuple(cursor.number("Q", f"tensor {name!r}") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("I", f"tensor {name!r}"), cursor.number("Q", f"tensor {name!r}")


def _placed(
    file: Path, size: int, start: int, alignment: int, raw: list[tuple[str, tuple[int, ...], int, int]]
) -> list[GgufTensor]:
    """The tensors with absolute offsets, all inside the file, none twice, none over another."""
    placed, seen = [], set()
    for name, shape, number, offset in raw:
        if name in seen:
            raise CheckpointError(f"{file}: has the tensor {name!r} twice. {_AGAIN}")
        seen.add(name)
        kind = TYPES.get(number)
        if kind is None:
            supported = ", ".join(t.name for t in TYPES.values())
            called = _OTHER_TYPES.get(number, f"number {number}")
            raise CheckpointError(
                f"{file}: tensor {name!r} has the type {called}, supported: {supported}. Use another file."
            )
        if kind.points:
            try:
                points(kind.points)
            except ImportError:
                raise CheckpointError(
                    f"{file}: tensor {name!r} has the type {kind.name}, which needs the package gguf: pip install 'mtpjax[gguf]'"
                ) from None
        if shape[-1] % kind.elements:
            raise CheckpointError(
                f"{file}: tensor {name!r} has rows of {shape[-1]:,} elements, "
                f"expected whole blocks of {kind.elements} for {kind.name}. {_AGAIN}"
            )
        nbytes = math.prod(shape) // kind.elements * kind.size
        if offset % alignment or min(shape) < 1 or start + offset + nbytes > size:
            raise CheckpointError(
                f"{file}: tensor {name!r} {list(shape)} {kind.name} would lie at bytes {start + offset:,} to "
                f"{start + offset + nbytes:,}, the file has {size:,}. {_AGAIN}"
            )
        placed.append(GgufTensor(file, name, shape, kind, start + offset, nbytes))
    by_offset = sorted(placed, key=lambda t: t.offset)
    for one, other in zip(by_offset, by_offset[1:], strict=False):
        if one.offset + one.nbytes > other.offset:
            raise CheckpointError(f"{file}: the tensors {one.name!r} and {other.name!r} overlap. {_AGAIN}")
    return placed
