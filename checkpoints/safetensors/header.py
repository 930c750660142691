"""Read and write the header of one safetensors file. The reader checks every number before it uses it.

Format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON object
{name: {dtype, shape, data_offsets}}, then the data, which the tensors cover without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.dtypes import DTYPE_NAMES, DTYPES
from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.folder import parse_json_object, read_error
from checkpoints.source import TensorInfo

MAX_HEADER_BYTES = 100_000_000  # as in the reference reader
MAX_RANK = 64  # numpy's own limit
MAX_TENSOR_BYTES = 1 << 62
_LFS_POINTER = b"version https://git-lfs"


def read_header(file: Path) -> list[TensorInfo]:
    """Return all tensors of `file` in the order of their data; raises CheckpointError and nothing else.

    Reads the header only, and allocates no more than its size, which is limited by the file's size and by
    `MAX_HEADER_BYTES`.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: has {size} bytes, too short for a safetensors file. {REDOWNLOAD}")
            length = int.from_bytes(prefix, "little")
            if _LFS_POINTER.startswith(prefix):
                raise CheckpointError(
                    f"{file}: is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder."
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: claims a header of {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}. "
                    f"Is it a safetensors file? If it is, it is damaged. {REDOWNLOAD}"
                )
            if length > size - 8:
                raise CheckpointError(
                    f"{file}: is truncated: claims a header of {length:,} bytes but only {size - 8:,} "
                    f"follow; {length - (size - 8):,} bytes are missing, and all data. {REDOWNLOAD}"
                )
            text = stream.read(length)
    except OSError as error:
        raise read_error(file, error) from error
    if not text.startswith(b"{"):
        raise CheckpointError(f"{file}: the header starts with {text[:1]!r}, expected b'{{'. {REDOWNLOAD}")
    header = parse_json_object(text, f"{file}: the header")
    _check_metadata(file, header.pop("__metadata__", {}))
    infos = [_tensor_info(file, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(file, infos, data_start=8 + length, file_size=size)
    return infos


def _check_metadata(file: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: '__metadata__' of the header is not a table of strings. {REDOWNLOAD}")


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Parse one header entry and make all checks that need no other tensor."""
    label = f"{file}: {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{label} has no table of dtype, shape and data_offsets in the header. {REDOWNLOAD}")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(
            f"{label} has dtype {_shorten(dtype_name)}, expected one of {', '.join(DTYPES)}. "
            "Convert the checkpoint to one of these, or download the file again if it is damaged."
        )
    if not _are_counts(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{label} has shape {_shorten(shape)}, expected a list of sizes. {REDOWNLOAD}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{label} has data_offsets {_shorten(offsets)}, expected [begin, end]. {REDOWNLOAD}")
    dtype, (begin, end) = DTYPES[dtype_name], offsets
    # Sizes of zero count as one: numpy multiplies the sizes of an empty array too.
    if math.prod(size or 1 for size in shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise CheckpointError(f"{label} has the impossible shape {_shorten(shape)}. {REDOWNLOAD}")
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{label} has shape {shape} and dtype {dtype_name}, that is {expected:,} bytes, but its data_offsets "
            f"[{begin}, {end}] hold {end - begin:,}. {REDOWNLOAD}"
        )
    return TensorInfo(name, tuple(shape), dtype, file, data_start + begin, expected)


def _are_counts(values: Any) -> bool:
    """Return whether `values` is a list of integers that are not negative and fit into a signed 64-bit integer.

    Booleans do not count as integers.
    """
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_layout(file: Path, infos: Sequence[TensorInfo], data_start: int, file_size: int) -> None:
    """Check that the tensors, in the order of their data, cover exactly the rest of the file."""
    end, previous = data_start, "the header"
    for info in infos:
        if info.offset < end:
            raise CheckpointError(
                f"{file}: {info.name!r} begins {end - info.offset:,} bytes before the end of {previous}; "
                f"tensors must not overlap. {REDOWNLOAD}"
            )
        if info.offset > end:
            raise CheckpointError(
                f"{file}: between {previous} and {info.name!r} are {info.offset - end:,} bytes that belong to "
                f"no tensor; expected none. {REDOWNLOAD}"
            )
        end, previous = info.offset + info.nbytes, repr(info.name)
    if end > file_size:
        first = next(info for info in infos if info.offset + info.nbytes > file_size)
        raise CheckpointError(
            f"{file}: is truncated: has {file_size:,} bytes, expected {end:,}; {end - file_size:,} bytes are "
            f"missing, from {first.name!r} on. {REDOWNLOAD}"
        )
    if end < file_size:
        raise CheckpointError(
            f"{file}: has {file_size:,} bytes, expected {end:,}; {file_size - end:,} bytes after {previous} "
            f"belong to no tensor. {REDOWNLOAD}"
        )


def encode_header(entries: Sequence[tuple[str, tuple[int, ...], np.dtype[Any]]]) -> bytes:
    """Return length and header of a file that holds `entries` (name, shape, dtype) in this order.

    Spaces pad the header to a multiple of 8 bytes, for aligned data. Dtypes must be in `DTYPE_NAMES`.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in entries:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
