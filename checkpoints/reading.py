"""Moving one tensor from its file into memory that the caller owns, in small pieces.

Files are read by seek and readinto, never mapped: mapped pages count as resident memory, and a checkpoint may
be larger than the machine's memory.
"""

from __future__ import annotations

import math
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import can_convert, is_float, not_finite
from checkpoints.errors import CheckpointError
from checkpoints.folder import unreadable
from checkpoints.source import TensorInfo

PIECE_BYTES = 1 << 20  # of the file at a time: fits a core's cache, yet the calls cost nothing


def read_tensor_into(info: TensorInfo, out: NDArray[Any], check_finite: bool = True) -> None:
    """Read the tensor at `info` into `out`, a writable C-contiguous array (or view) of the same shape.

    Where `out` has another dtype the values are converted, a float to any float (rounded to nearest even), an
    integer only to a type that holds all its values. Needs no more than a few pieces of `PIECE_BYTES` beyond
    `out`.

    Raises CheckpointError when the shape differs, the conversion is none of these, the file ends early, or,
    with `check_finite`, a value of `out` is NaN or infinite; `out` is then partly or wholly overwritten.
    Raises ValueError when `out` is read-only or not contiguous.
    """
    where = f"{info.file}: {info.name!r}"
    if out.shape != info.shape:
        raise CheckpointError(
            f"{where} has shape {list(info.shape)}, expected {list(out.shape)}. "
            "Do config.json and the weights belong together?"
        )
    if not can_convert(info.dtype, out.dtype):
        raise CheckpointError(
            f"{where} has dtype {info.dtype.name}, which cannot be read as {out.dtype.name} without loss. "
            "Is this quantisation format supported?"
        )
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(f"{where}: the array to read into must be C-contiguous and writable")
    flat = out.reshape(-1)  # a view
    direct = out.dtype == info.dtype
    step = max(1, PIECE_BYTES // info.dtype.itemsize)
    scratch = np.empty(0 if direct else min(step, flat.size), info.dtype)
    check = check_finite and is_float(info.dtype)
    in_file, too_large = _Tally(), _Tally()
    try:
        with open(info.file, "rb", buffering=0) as stream:
            stream.seek(info.offset)
            for start in range(0, flat.size, step):
                target = flat[start : start + step]
                piece = target if direct else scratch[: target.size]
                _fill(stream, piece, info)
                if not direct:
                    with np.errstate(over="ignore", invalid="ignore"):  # reported below, with names
                        np.copyto(target, piece, casting="unsafe")
                if check and (bad := not_finite(target)).any():
                    bad_in_file = not_finite(piece)
                    in_file.add(bad_in_file, start)
                    too_large.add(bad & ~bad_in_file, start)
    except OSError as error:
        raise unreadable(info.file, error) from error
    if in_file.count:
        raise CheckpointError(
            f"{where} has {in_file.count:,} NaN or infinite values {in_file.place(info.shape)}; "
            "expected none. Download the file again."
        )
    if too_large.count:
        raise CheckpointError(
            f"{where} ({info.dtype.name}) has {too_large.count:,} values {too_large.place(info.shape)}, "
            f"that are too large for {out.dtype.name}. Load it in a wider type."
        )


def _fill(stream: FileIO, piece: NDArray[Any], info: TensorInfo) -> None:
    """Fill the contiguous `piece` from `stream`, which may hand out less than it is asked for."""
    view = piece.view(np.uint8).data
    filled = 0
    while filled < len(view):
        got = stream.readinto(view[filled:])
        if not got:
            raise CheckpointError(
                f"{info.file}: ends inside {info.name!r}; it was longer when the checkpoint was opened. "
                "Do not change a checkpoint while it is read."
            )
        filled += got
    if piece.dtype == np.bool_ and piece.view(np.uint8).max(initial=0) > 1:
        raise CheckpointError(
            f"{info.file}: {info.name!r} is BOOL but has bytes other than 0 and 1. Download the file again."
        )


class _Tally:
    """How many elements of a tensor were marked, and which was the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first = 0  # flat index

    def add(self, mask: NDArray[Any], start: int) -> None:
        """Count the marked elements of a piece whose first element has the flat index `start`."""
        if self.count == 0:
            self.first = start + int(mask.argmax())
        self.count += int(np.count_nonzero(mask))

    def place(self, shape: tuple[int, ...]) -> str:
        """As in: of 1,024, the first at index [3, 17]."""
        index = [int(i) for i in np.unravel_index(self.first, shape)]
        return f"of {math.prod(shape):,}, the first at index {index}"
