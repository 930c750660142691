"""Bytes that kernels load and store, each access checked: aligned, inside a buffer that the kernel was given, and not racing with
those of others."""

from __future__ import annotations

from typing import Any

import numpy as np

from scripts.ptx_emulator.ptx import EmulationError

GUARD = 256  # bytes between buffers, which nobody may touch; buffers begin at multiples of it
UNSET = 0xFF  # what a byte holds that nobody wrote: NaN as float32, bfloat16 and float8
NOBODY = -1


class Memory:
    """A range of addresses from 0.

    Accesses come with numbers that say who they are by: `span * epoch + n`, where n, below `span - 1`, tells apart those that do
    not wait for one another within an epoch. Of two by different n in one epoch none may write what the other touches, unless it
    writes what is there already.

    Attributes:
        bytes: uint8; `allowed` and `writable`, of the same length, tell which of them may be read, and written.
    """

    def __init__(self, size: int, what: str, span: int | None = None):
        self.bytes = np.full(-(-size // 16) * 16, UNSET, np.uint8)
        self.allowed, self.writable = (np.zeros(len(self.bytes), bool) for _ in range(2))
        self.what, self.span = what, span
        if span:
            self._reader, self._writer = (np.full(len(self.bytes), NOBODY, np.int64) for _ in range(2))
            self._coming = np.zeros(len(self.bytes), bool)  # bytes that a copy will write
            self._kept = np.zeros(len(self.bytes), bool)  # bytes that are read until somebody says that they are not

    def _places(self, addresses: Any, size: int, times: int, used: int | None = None, writes: bool = False) -> Any:
        """Checked addresses of accesses of `size * times` bytes each; only the first `used` bytes count."""
        addresses, whole = np.asarray(addresses), size * times
        last = (used or whole) - 1
        if not addresses.size:
            return addresses.astype(np.int64)
        low, high = int(addresses.min()), int(addresses.max())
        if np.any(addresses & np.asarray(whole - 1, addresses.dtype)):
            raise EmulationError(
                f"an access of {whole} bytes of {self.what} is not aligned: address {low:#x} or another"
            )
        if low < 0 or high + whole > len(self.bytes):
            raise EmulationError(
                f"{whole} bytes at {low:#x} to {high:#x} of {self.what}, which has {len(self.bytes)} bytes"
            )
        places = addresses.astype(np.int64)
        may = self.writable if writes else self.allowed
        good = may[places] & may[places + last]
        if not good.all():
            wrong = int(places[~good].min()) if places.ndim else int(places)
            kind = "result" if writes and self.allowed[wrong] else "buffer"
            raise EmulationError(f"{whole} bytes at address {wrong:#x} of {self.what} are in no {kind} of this kernel")
        return places

    def load(
        self,
        addresses: Any,
        size: int,
        times: int = 1,
        used: int | None = None,
        by: Any = None,
        until_released: bool = False,
    ) -> list[Any]:
        """`times` unsigned numbers of `size` bytes that follow one another, at each address; nobody may write there until
        `release`, if told so."""
        places = self._places(addresses, size, times, used)
        self._reads(places, size * times, by, until_released)
        view, units = self.bytes.view(f"u{size}"), places // size
        return [view[units + i] for i in range(times)]

    def store(self, addresses: Any, values: list[Any], size: int, by: Any = None) -> None:
        """The opposite of `load`."""
        places = self._places(addresses, size, len(values), writes=True)
        view, units = self.bytes.view(f"u{size}"), places // size
        for i, value in enumerate(values):
            if self.span and by is not None:
                self._writes(places + i * size, size, by, view[units + i] != value)
            view[units + i] = value
            if self.span and by is not None:  # of several that write one place at a time, one was the last
                lost = view[units + i] != value
                if np.any(lost) and (self._writer[places + i * size] != by)[lost].any():
                    raise EmulationError(f"a race: {self.what} is written at once with different values, by others")

    def lines(self, addresses: Any, size: int, by: Any = None) -> Any:
        """uint8 `[n, size]`: what lies at n addresses."""
        places = self._places(addresses, size, 1)
        self._reads(places, size, by)
        return self.bytes[places[:, None] + np.arange(size)]

    def store_lines(self, addresses: Any, lines: Any, by: Any = None) -> None:
        """The opposite of `lines`; what `expect` announced has come."""
        size = lines.shape[1]
        places = self._places(addresses, size, 1, writes=True)
        at = places[:, None] + np.arange(size)
        if self.span and by is not None:
            self._coming[at] = False
            self._writes(places, size, by, (self.bytes[at] != lines).any(1))
        self.bytes[at] = lines

    def expect(self, addresses: Any, size: int, by: Any) -> None:
        """A copy to these addresses has begun and ends at some time before `store_lines`."""
        if self.span:
            places = self._places(addresses, size, 1, writes=True)
            self._writes(places, size, by, True)
            self._coming[places[:, None] + np.arange(size)] = True

    def release(self, addresses: Any, size: int) -> None:
        """What was loaded there with `until_released` is not read any more."""
        if self.span:
            self._kept[addresses[..., None] + np.arange(size)] = False

    def _reads(self, places: Any, size: int, by: Any, until_released: bool = False) -> None:
        if not self.span or by is None:
            return
        changing = self.writable[places]
        if not changing.any():  # nobody writes there
            return
        if np.ndim(places) and not changing.all():
            places, by = places[changing], np.broadcast_to(by, places.shape)[changing]
        if not np.ndim(places) and np.ndim(by):  # all read one place
            several = self.span - 1 + by[0] // self.span * self.span
            by = by[0] if (by == by[0]).all() else several
        at, who = _each_byte(places, size, by)
        if self._coming[at].any():
            raise EmulationError(
                f"{self.what} is read at {int(at[self._coming[at]].min()):#x} before a copy to it has come"
            )
        self._check(at, self._writer[at], who, "read", "written")
        if until_released:
            self._kept[at] = True
            return
        before, now = self._reader[at], who // self.span * self.span
        several = now + self.span - 1  # in an epoch in which different ones read
        self._reader[at] = np.where((before >= now) & (before != who), several, who)
        again = self._reader[at]  # those of this call may be different ones, too
        self._reader[at[again != who]] = several[again != who]

    def _writes(self, places: Any, size: int, by: Any, changed: Any) -> None:
        at, who = _each_byte(places, size, by)
        changed = np.broadcast_to(np.asarray(changed)[..., None], (*np.shape(places), size)).reshape(-1)
        if self._kept[at[changed]].any():
            raise EmulationError(f"{self.what} is written at {int(at[changed].min()):#x} while a product reads it")
        self._check(at[changed], self._reader[at[changed]], who[changed], "written", "read")
        self._check(at[changed], self._writer[at[changed]], who[changed], "written", "written")
        self._writer[at] = who

    def _check(self, at: Any, before: Any, who: Any, now: str, earlier: str) -> None:
        wrong = (before >= who // self.span * self.span) & (before != who)
        if wrong.any():
            place = int(at[wrong].min())
            raise EmulationError(
                f"a race: {self.what} is {now} at {place:#x}, where others have {earlier} since they last met"
            )


def _each_byte(places: Any, size: int, by: Any) -> tuple[Any, Any]:
    """Each byte of accesses, and who accesses it."""
    at = places[..., None] + np.arange(size)
    return at.reshape(-1), np.broadcast_to(np.asarray(by)[..., None], at.shape).reshape(-1)
