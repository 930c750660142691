"""Memory of a kernel. Every access is checked: aligned, inside a buffer of the kernel, and without a race."""

from typing import Any

import numpy as np

from .ptx import EmulationError

GUARD_BYTES = 256  # between buffers, where no access is allowed; buffers begin at multiples of it
UNSET_BYTE = 0xFF  # value of a byte before the first write: NaN as float32, bfloat16 and float8
NO_OWNER = -1


class Memory:
    """A range of addresses from 0.

    Accesses carry the number of their owner: `num_owners * epoch + n`. Here n < num_owners - 1 identifies a warp or a
    block, and an epoch is a period within which owners do not wait for one another. Within an epoch an owner must not
    write a byte that another owner reads or writes, unless it writes the value that the byte already has.

    Args:
        size: bytes.
        name: for error messages.
        num_owners: None turns the search for races off.
    Attributes:
        bytes: uint8 `[size]`, rounded up to a multiple of 16.
        readable, writable: bool, of the same length.
    """

    def __init__(self, size: int, name: str, num_owners: int | None = None):
        self.bytes = np.full(-(-size // 16) * 16, UNSET_BYTE, np.uint8)
        self.readable, self.writable = (np.zeros(len(self.bytes), bool) for _ in range(2))
        self.name, self.num_owners = name, num_owners or 0
        if num_owners:
            self._last_reader, self._last_writer = (np.full(len(self.bytes), NO_OWNER, np.int64) for _ in range(2))
            self._awaits_copy = np.zeros(len(self.bytes), bool)  # bytes that an asynchronous copy will write
            self._held = np.zeros(len(self.bytes), bool)  # bytes that an asynchronous product reads until `release`

    def _check_addresses(self, addresses: Any, size: int, used: int | None = None, writes: bool = False) -> Any:
        """Return addresses of accesses of `size` bytes as int64. Only the first `used` bytes must be in a buffer."""
        addresses = np.asarray(addresses)
        if not addresses.size:
            return addresses.astype(np.int64)
        low, high = int(addresses.min()), int(addresses.max())
        if np.any(addresses & np.asarray(size - 1, addresses.dtype)):
            raise EmulationError(f"access of {size} bytes of {self.name} is not aligned: address {low:#x} or another")
        if low < 0 or high + size > len(self.bytes):
            raise EmulationError(f"{size} bytes at {low:#x} to {high:#x} of {self.name}, which has {len(self.bytes)}")
        addresses = addresses.astype(np.int64)
        allowed = self.writable if writes else self.readable
        valid = allowed[addresses] & allowed[addresses + (used or size) - 1]
        if not valid.all():
            first = int(addresses[~valid].min()) if addresses.ndim else int(addresses)
            kind = "result" if writes and self.readable[first] else "buffer"
            raise EmulationError(f"{size} bytes at address {first:#x} of {self.name} are in no {kind} of this kernel")
        return addresses

    def load(
        self, addresses: Any, size: int, count: int = 1, used: int | None = None, owner: Any = None, hold: bool = False
    ) -> list[Any]:
        """Return `count` consecutive unsigned integers of `size` bytes at each address.

        `hold`: no owner may change these bytes until `release`.
        """
        addresses = self._check_addresses(addresses, size * count, used)
        self._record_reads(addresses, size * count, owner, hold)
        view, index = self.bytes.view(f"u{size}"), addresses // size
        return [view[index + i] for i in range(count)]

    def store(self, addresses: Any, values: list[Any], size: int, owner: Any = None) -> None:
        """Write consecutive unsigned integers of `size` bytes at each address."""
        addresses = self._check_addresses(addresses, size * len(values), writes=True)
        view, index = self.bytes.view(f"u{size}"), addresses // size
        for i, value in enumerate(values):
            if self.num_owners and owner is not None:
                self._record_writes(addresses + i * size, size, owner, view[index + i] != value)
            view[index + i] = value
            if self.num_owners and owner is not None:  # if several threads write to one address, the last one wins
                lost = view[index + i] != value
                if np.any(lost) and (self._last_writer[addresses + i * size] != owner)[lost].any():
                    raise EmulationError(f"a race: {self.name} is written at once with different values by others")

    def load_bytes(self, addresses: Any, size: int, owner: Any = None) -> Any:
        """Return uint8 `[n, size]`, the bytes at n addresses."""
        addresses = self._check_addresses(addresses, size)
        self._record_reads(addresses, size, owner)
        return self.bytes[addresses[:, None] + np.arange(size)]

    def store_bytes(self, addresses: Any, values: Any, owner: Any = None) -> None:
        """Write uint8 `[n, size]` to n addresses; ends the copies that `begin_copy` announced there."""
        size = values.shape[1]
        addresses = self._check_addresses(addresses, size, writes=True)
        index = addresses[:, None] + np.arange(size)
        if self.num_owners and owner is not None:
            self._awaits_copy[index] = False
            self._record_writes(addresses, size, owner, (self.bytes[index] != values).any(1))
        self.bytes[index] = values

    def begin_copy(self, addresses: Any, size: int, owner: Any) -> None:
        """Announce a copy to these addresses, which may write at any time until `store_bytes`."""
        if self.num_owners:
            addresses = self._check_addresses(addresses, size, writes=True)
            self._record_writes(addresses, size, owner, True)
            self._awaits_copy[addresses[:, None] + np.arange(size)] = True

    def release(self, addresses: Any, size: int) -> None:
        """End reads that `load` began with `hold`."""
        if self.num_owners:
            self._held[addresses[..., None] + np.arange(size)] = False

    def _record_reads(self, addresses: Any, size: int, owner: Any, hold: bool = False) -> None:
        if not self.num_owners or owner is None:
            return
        writable = self.writable[addresses]
        if not writable.any():  # bytes that no owner may write have no races
            return
        if np.ndim(addresses) and not writable.all():
            addresses, owner = addresses[writable], np.broadcast_to(owner, addresses.shape)[writable]
        if not np.ndim(addresses) and np.ndim(owner):  # all owners read one address
            several = self.num_owners - 1 + owner[0] // self.num_owners * self.num_owners
            owner = owner[0] if (owner == owner[0]).all() else several
        index, owners = _each_byte(addresses, size, owner)
        awaited = index[self._awaits_copy[index]]
        if awaited.size:
            raise EmulationError(f"{self.name} is read at {int(awaited.min()):#x} before a copy to it has arrived")
        self._check_races(index, self._last_writer[index], owners, "read", "written")
        if hold:
            self._held[index] = True
            return
        before, epoch_start = self._last_reader[index], owners // self.num_owners * self.num_owners
        several = epoch_start + self.num_owners - 1  # owner number of bytes that several owners read in this epoch
        self._last_reader[index] = np.where((before >= epoch_start) & (before != owners), several, owners)
        conflict = self._last_reader[index] != owners  # two owners of this very call may read one byte
        self._last_reader[index[conflict]] = several[conflict]

    def _record_writes(self, addresses: Any, size: int, owner: Any, changed: Any) -> None:
        """`changed`: whether each access changes the value. Bytes that keep theirs cannot take part in a race."""
        index, owners = _each_byte(addresses, size, owner)
        changed = np.broadcast_to(np.asarray(changed)[..., None], (*np.shape(addresses), size)).reshape(-1)
        new, writers = index[changed], owners[changed]
        if self._held[new].any():
            raise EmulationError(f"{self.name} is written at {int(new.min()):#x} while a product reads it")
        self._check_races(new, self._last_reader[new], writers, "written", "read")
        self._check_races(new, self._last_writer[new], writers, "written", "written")
        self._last_writer[index] = owners

    def _check_races(self, index: Any, before: Any, owners: Any, access: str, earlier: str) -> None:
        conflict = index[(before >= owners // self.num_owners * self.num_owners) & (before != owners)]
        if conflict.size:
            where = f"{access} at {int(conflict.min()):#x}, which others have {earlier} since the last barrier"
            raise EmulationError(f"a race: {self.name} is {where}")


def _each_byte(addresses: Any, size: int, owner: Any) -> tuple[Any, Any]:
    """Return the index and the owner of each byte of accesses of `size` bytes."""
    index = addresses[..., None] + np.arange(size)
    return index.reshape(-1), np.broadcast_to(np.asarray(owner)[..., None], index.shape).reshape(-1)
