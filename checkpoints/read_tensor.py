"""Read one tensor from its file into memory that the caller owns, chunk by chunk.

Files are read with seek and readinto, never mapped: mapped pages count as resident memory, and a checkpoint may
be larger than the machine's memory.
"""

from __future__ import annotations

import math
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import can_convert, is_float, non_finite
from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.folder import read_error
from checkpoints.source import TensorInfo

CHUNK_BYTES = 1 << 20  # of the file: fits a core's cache, and is large enough to make the cost of a call negligible


def read_tensor_into(info: TensorInfo, out: NDArray[Any], check_finite: bool = True) -> None:
    """Read the tensor at `info` into `out`, a writable C-contiguous array (or view) of the same shape.

    If `out` has another dtype, the values are converted: a float to any float (rounded to nearest even), an
    integer only to a type that holds all its values. Beyond `out`, this needs a few chunks of `CHUNK_BYTES`.

    Raises:
        CheckpointError: the shape differs, the conversion is not allowed, the file ends early, or, with
            `check_finite`, a value of `out` is NaN or infinite. `out` is then partly or wholly overwritten.
        ValueError: `out` is read-only or not contiguous.
    """
    label = f"{info.file}: {info.name!r}"
    if out.shape != info.shape:
        raise CheckpointError(
            f"{label} has shape {list(info.shape)}, expected {list(out.shape)}. "
            "Do config.json and the weights belong together?"
        )
    if not can_convert(info.dtype, out.dtype):
        raise CheckpointError(
            f"{label} has dtype {info.dtype.name}, which cannot be read as {out.dtype.name} without loss. "
            "Is this quantisation format supported?"
        )
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(f"{label}: the array to read into must be C-contiguous and writable")
    flat = out.reshape(-1)  # a view
    same_dtype = out.dtype == info.dtype
    chunk_size = max(1, CHUNK_BYTES // info.dtype.itemsize)
    scratch = np.empty(0 if same_dtype else min(chunk_size, flat.size), info.dtype)
    check = check_finite and is_float(info.dtype)
    non_finite_in_file, overflowed = _NonFiniteCount(), _NonFiniteCount()
    try:
        with open(info.file, "rb", buffering=0) as stream:
            stream.seek(info.offset)
            for start in range(0, flat.size, chunk_size):
                target = flat[start : start + chunk_size]
                stored = target if same_dtype else scratch[: target.size]
                _fill(stream, stored, info)
                if not same_dtype:
                    with np.errstate(over="ignore", invalid="ignore"):  # the errors below name the tensor
                        np.copyto(target, stored, casting="unsafe")
                if check and (bad := non_finite(target)).any():
                    bad_in_file = non_finite(stored)
                    non_finite_in_file.add(bad_in_file, start)
                    overflowed.add(bad & ~bad_in_file, start)
    except OSError as error:
        raise read_error(info.file, error) from error
    if non_finite_in_file.count:
        raise CheckpointError(
            f"{label} has {non_finite_in_file.count:,} NaN or infinite values "
            f"{non_finite_in_file.describe_first(info.shape)}; expected none. {REDOWNLOAD}"
        )
    if overflowed.count:
        raise CheckpointError(
            f"{label} ({info.dtype.name}) has {overflowed.count:,} values {overflowed.describe_first(info.shape)}, "
            f"that are too large for {out.dtype.name}. Load it in a wider type."
        )


def _fill(stream: FileIO, chunk: NDArray[Any], info: TensorInfo) -> None:
    """Fill the contiguous `chunk` from `stream`, whose reads may return fewer bytes than requested."""
    view = chunk.view(np.uint8).data
    num_filled = 0
    while num_filled < len(view):
        num_read = stream.readinto(view[num_filled:])
        if not num_read:
            raise CheckpointError(
                f"{info.file}: ends inside {info.name!r}; it was longer when the checkpoint was opened. "
                "Do not change a checkpoint while it is read."
            )
        num_filled += num_read
    if chunk.dtype == np.bool_ and chunk.view(np.uint8).max(initial=0) > 1:
        raise CheckpointError(f"{info.file}: {info.name!r} is BOOL but has bytes other than 0 and 1. {REDOWNLOAD}")


class _NonFiniteCount:
    """The number of masked elements of a tensor, and the index of the first one."""

    def __init__(self) -> None:
        self.count = 0
        self.first = 0  # flat index

    def add(self, mask: NDArray[Any], start: int) -> None:
        """Count the masked elements of a chunk whose first element has the flat index `start`."""
        if self.count == 0:
            self.first = start + int(mask.argmax())
        self.count += int(np.count_nonzero(mask))

    def describe_first(self, shape: tuple[int, ...]) -> str:
        """Describe the first element, as in "of 1,024, the first at index [3, 17]"."""
        index = [int(i) for i in np.unravel_index(self.first, shape)]
        return f"of {math.prod(shape):,}, the first at index {index}"
