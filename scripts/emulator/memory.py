"""Bytes that kernels load and store, each access checked: aligned, and inside a buffer that the kernel was given."""

from __future__ import annotations

from typing import Any

import numpy as np

from scripts.emulator.ptx import EmulationError

GUARD = 256  # bytes between buffers, which nobody may touch; buffers begin at multiples of it
UNSET = 0xFF  # what a byte holds that nobody wrote: NaN as float32, bfloat16 and float8


class Memory:
    """A range of addresses from 0.

    Attributes:
        bytes: uint8; `allowed`, of the same length, tells which of them may be touched.
    """

    def __init__(self, size: int, what: str):
        self.bytes = np.full(-(-size // 16) * 16, UNSET, np.uint8)
        self.allowed = np.zeros(len(self.bytes), bool)
        self.what = what

    def _places(self, addresses: Any, size: int, times: int, used: int | None = None) -> Any:
        """Checked addresses of accesses of `size * times` bytes each, in units of `size`; only the first `used` bytes count."""
        addresses, whole = np.asarray(addresses), size * times
        last = (used or whole) - 1
        if not addresses.size:
            return addresses.astype(np.int64)
        low, high = int(addresses.min()), int(addresses.max())
        if np.any(addresses & np.asarray(whole - 1, addresses.dtype)):
            raise EmulationError(f"an access of {whole} bytes of {self.what} is not aligned: address {low:#x} or another")
        if high + whole > len(self.bytes):
            raise EmulationError(f"{whole} bytes at address {high:#x} of {self.what}, which has {len(self.bytes)} bytes")
        places = addresses.astype(np.int64)
        if not (self.allowed[places].all() and self.allowed[places + last].all()):
            wrong = places[~(self.allowed[places] & self.allowed[places + last])] if places.ndim else places
            raise EmulationError(f"{whole} bytes at address {int(np.min(wrong)):#x} of {self.what} are in no buffer of this kernel")
        return places // size

    def load(self, addresses: Any, size: int, times: int = 1, used: int | None = None) -> list[Any]:
        """`times` unsigned numbers of `size` bytes that follow one another, at each address."""
        places = self._places(addresses, size, times, used)
        view = self.bytes.view(f"u{size}")
        return [view[places + i] for i in range(times)]

    def store(self, addresses: Any, values: list[Any], size: int) -> None:
        """The opposite of `load`."""
        places = self._places(addresses, size, len(values))
        view = self.bytes.view(f"u{size}")
        for i, value in enumerate(values):
            view[places + i] = value

    def lines(self, addresses: Any, size: int) -> Any:
        """uint8 `[n, size]`: what lies at n addresses."""
        places = self._places(addresses, size, 1) * size
        return self.bytes[places[:, None] + np.arange(size)]

    def store_lines(self, addresses: Any, lines: Any) -> None:
        """The opposite of `lines`."""
        size = lines.shape[1]
        self.bytes[(self._places(addresses, size, 1) * size)[:, None] + np.arange(size)] = lines
