"""Read the head of a GGUF file: metadata and the location of every tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length is checked before it is used.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.folder import read_error
from checkpoints.gguf.block_types import BLOCK_TYPES, BlockType
from checkpoints.gguf.codebooks import CODEBOOK_TYPES, load_grid
from checkpoints.gguf.other_types import describe_type

TENSOR_TYPES = BLOCK_TYPES | CODEBOOK_TYPES
# Value types of metadata, by number: format letters of `struct`, and the two types without one.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
# The smallest entries: a name's length, the number of dimensions, type and offset; a key's length, a value type and
# one byte.
_MIN_TENSOR_BYTES, _MIN_METADATA_BYTES = 24, 13


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of `file`: numpy `shape` (rows last but one), absolute `offset` and length in bytes."""

    file: Path
    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    nbytes: int


class _Reader:
    """Reads the head of a file of `size` bytes from front to back, never past its end.

    Every method takes a `description` of the value that it reads, for the error message.
    """

    def __init__(self, file: Path, size: int, stream: BinaryIO) -> None:
        self.file, self.size, self.stream, self.position = file, size, stream, 0

    def read_bytes(self, count: int, description: str) -> bytes:
        if count > self.size - self.position:
            raise CheckpointError(
                f"{self.file}: {description} needs {count:,} bytes at byte {self.position:,}, but the file has only "
                f"{self.size:,}. {REDOWNLOAD}"
            )
        raw = self.stream.read(count)
        if len(raw) != count:
            raise CheckpointError(
                f"{self.file}: ends inside {description}; it was longer when it was opened. {REDOWNLOAD}"
            )
        self.position += count
        return raw

    def read_number(self, code: str, description: str) -> Any:
        """Read one number; `code` is its format letter in `struct`."""
        return struct.unpack("<" + code, self.read_bytes(struct.calcsize("<" + code), description))[0]

    def read_string(self, description: str) -> str:
        raw = self.read_bytes(self.read_number("Q", description), description)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "surrogateescape")  # a key or token that is not UTF-8 is harmless

    def read_value(self, description: str) -> Any:
        """Read the type number and the value of a metadata entry."""
        return self._read_typed(self.read_number("I", description), description, nested=False)

    def _read_typed(self, value_type: int, description: str, nested: bool) -> Any:
        if value_type in _SCALARS:
            return self.read_number(_SCALARS[value_type], description)
        if value_type == _STRING:
            return self.read_string(description)
        if value_type != _ARRAY or nested:
            raise CheckpointError(
                f"{self.file}: {description} has the value type {value_type}, expected 0 to 12. {REDOWNLOAD}"
            )
        item_type, count = self.read_number("I", description), self.read_number("Q", description)
        if item_type in _SCALARS:
            code = _SCALARS[item_type]
            raw = self.read_bytes(count * struct.calcsize("<" + code), description)
            return np.frombuffer(raw, "<" + code if code != "?" else "?").tolist()
        if count > (self.size - self.position) // 8:  # a string takes at least the 8 bytes of its length
            raise CheckpointError(
                f"{self.file}: {description} lists {count:,} items, more than fit into the file. {REDOWNLOAD}"
            )
        return [self._read_typed(item_type, description, nested=True) for _ in range(count)]


def read_gguf_header(file: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Return metadata by key, and all tensors in the order of the file; reads no weights.

    Raises:
        CheckpointError: the file cannot be read, has another format, version or byte order, or ends early; or
            tensors overlap, occur twice or have a type that is not supported. The message names the file.
    """
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            return _read_header(_Reader(file, size, stream))
    except OSError as error:
        raise read_error(file, error) from error


def _read_header(reader: _Reader) -> tuple[dict[str, Any], list[GgufTensor]]:
    file = reader.file
    magic = reader.read_bytes(4, "the magic")
    if magic != b"GGUF":
        raise CheckpointError(f"{file}: begins with {magic!r}, expected b'GGUF'. Is this a GGUF file? {REDOWNLOAD}")
    version = reader.read_number("I", "the version")
    if version == 3 << 24:
        raise CheckpointError(
            f"{file}: is big-endian, expected little-endian. Use the little-endian file of this model."
        )
    if version != 3:
        raise CheckpointError(
            f"{file}: has GGUF version {version}, supported: 3. Use a file made by a newer converter."
        )
    num_tensors = reader.read_number("Q", "the tensor count")
    num_metadata = reader.read_number("Q", "the metadata count")
    for count, min_bytes, label in (
        (num_tensors, _MIN_TENSOR_BYTES, "tensors"),
        (num_metadata, _MIN_METADATA_BYTES, "metadata entries"),
    ):
        if count > reader.size // min_bytes:
            raise CheckpointError(
                f"{file}: claims {count:,} {label}, more than fit into its {reader.size:,} bytes. {REDOWNLOAD}"
            )
    metadata: dict[str, Any] = {}
    for i in range(num_metadata):
        key = reader.read_string(f"metadata key {i}")
        if key in metadata:
            raise CheckpointError(f"{file}: has the metadata key {key!r} twice. {REDOWNLOAD}")
        metadata[key] = reader.read_value(f"metadata {key!r}")
    entries = [_read_tensor_entry(reader, i) for i in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{file}: general.alignment is {alignment!r}, expected a number of bytes. {REDOWNLOAD}")
    data_start = -(-reader.position // alignment) * alignment
    tensors = [_check_entry(file, reader.size, data_start, alignment, entry) for entry in entries]
    _check_layout(file, tensors)
    return metadata, tensors


@dataclass(frozen=True)
class _TensorEntry:
    """One entry of the table of tensors, as read: `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def _read_tensor_entry(reader: _Reader, number: int) -> _TensorEntry:
    name = reader.read_string(f"the name of tensor {number}")
    label = f"tensor {name!r}"
    num_dimensions = reader.read_number("I", label)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{reader.file}: {label} has {num_dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}. {REDOWNLOAD}"
        )
    shape = tuple(reader.read_number("Q", label) for _ in range(num_dimensions))[::-1]
    return _TensorEntry(name, shape, reader.read_number("I", label), reader.read_number("Q", label))


def _check_entry(file: Path, size: int, data_start: int, alignment: int, entry: _TensorEntry) -> GgufTensor:
    """Check that the type is supported and that the tensor is aligned and inside the file."""
    label, shape = f"{file}: tensor {entry.name!r}", entry.shape
    tensor_type = TENSOR_TYPES.get(entry.type_number)
    if tensor_type is None:
        supported = ", ".join(t.name for t in TENSOR_TYPES.values())
        raise CheckpointError(
            f"{label} has the type {describe_type(entry.type_number)}, supported: {supported}. Use another file."
        )
    if tensor_type.codebook:
        try:
            load_grid(tensor_type.codebook)
        except ImportError:
            raise CheckpointError(
                f"{label} has the type {tensor_type.name}, which needs the package gguf: pip install 'mtpjax[gguf]'"
            ) from None
    if shape[-1] % tensor_type.elements_per_block:
        raise CheckpointError(
            f"{label} has rows of {shape[-1]:,} elements, expected whole blocks of {tensor_type.elements_per_block} "
            f"for {tensor_type.name}. {REDOWNLOAD}"
        )
    nbytes = math.prod(shape) // tensor_type.elements_per_block * tensor_type.bytes_per_block
    start = data_start + entry.offset
    if entry.offset % alignment or min(shape) < 1 or start + nbytes > size:
        raise CheckpointError(
            f"{label} {list(shape)} {tensor_type.name} would occupy the bytes {start:,} to {start + nbytes:,}; "
            f"expected a multiple of {alignment} and an end within the file's {size:,} bytes. {REDOWNLOAD}"
        )
    return GgufTensor(file, entry.name, shape, tensor_type, start, nbytes)


def _check_layout(file: Path, tensors: list[GgufTensor]) -> None:
    """Check that no tensor occurs twice and that none overlaps another one."""
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise CheckpointError(f"{file}: has the tensor {tensor.name!r} twice. {REDOWNLOAD}")
        names.add(tensor.name)
    by_offset = sorted(tensors, key=lambda tensor: tensor.offset)
    for tensor, following in zip(by_offset, by_offset[1:], strict=False):
        if tensor.offset + tensor.nbytes > following.offset:
            raise CheckpointError(f"{file}: the tensors {tensor.name!r} and {following.name!r} overlap. {REDOWNLOAD}")
