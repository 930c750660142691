"""`PrefixCache`: what sequences remember of their common beginnings, on the device, under a limit, and on disk.

An entry is a copy of keys and values, DeltaNet states, convolution inputs and the MTP head's keys and values after a
`Beginning`. A sequence that continues from it has the same bits as one that read all of its tokens itself, since
DeltaNet rows are added up in groups that are counted from the start of a sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from mtpjax.engine import prefix_files
from mtpjax.engine.fingerprint import weights_fingerprint
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.prefix_tree import Beginning, beginnings
from mtpjax.engine.prompt_chunks import GRID, PastTokens
from mtpjax.model.cache import Cache, new_cache

DEFAULT_GB = 1.0  # where the device does not tell how much memory is free
SHARE_OF_FREE_MEMORY = 0.1


@dataclass(frozen=True)
class PrefixEntry:
    """What one sequence remembers.

    Attributes:
        beginning: what has been read.
        token_ids: the tokens of the beginning, and the token after them at a border.
        past: what a sequence that continues from here has.
        sequence: the copy, a cache of one sequence.
        hidden: hidden state of the last row `[1, D]`, for a sequence that has nothing more to read.
    """

    beginning: Beginning
    token_ids: tuple[int, ...]
    past: PastTokens
    sequence: Cache
    hidden: Array

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(array.nbytes for array in jax.tree.leaves((self.sequence, self.hidden)))


class PrefixCache:
    """Entries by the key of their beginning.

    Args:
        runner: the model.
        max_bytes: of all entries together. The ones that were not used for longest go first, and before them those
            that no waiting request needs. None: a tenth of the free memory of the device, or `DEFAULT_GB`.

    Attributes:
        entries: the one that was used last stands last.
        num_tokens_read: rows read to make entries.
    """

    def __init__(self, runner: ModelRunner, max_bytes: int | None = None):
        self.runner, self.max_bytes = runner, free_bytes() if max_bytes is None else max_bytes
        self.entries: OrderedDict[bytes, PrefixEntry] = OrderedDict()
        self.num_tokens_read = 0
        self._held: dict[bytes, PrefixEntry] = {}
        self._bytes: dict[int, int] = {}  # of an entry, by its room for positions

    @property
    def is_in_use(self) -> bool:
        """Whether there is, or may be, an entry."""
        return self.max_bytes > 0 or bool(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, without those that are held."""
        return sum(entry.nbytes for entry in self.entries.values())

    def find(self, path: Iterable[Beginning]) -> PrefixEntry | None:
        """Return the entry of the longest of some beginnings of one sequence, and mark it as used."""
        for beginning in sorted(path, key=lambda b: -b.length):
            if beginning.key in self._held:
                return self._held[beginning.key]
            if beginning.key in self.entries:
                self.entries.move_to_end(beginning.key)
                return self.entries[beginning.key]
        return None

    def read(
        self, rows: Sequence[int], wanted: Iterable[Beginning], is_needed: Callable[[bytes], object] = lambda key: False
    ) -> PrefixEntry | None:
        """Read the beginnings of a sequence that have no entry yet, each one from the one before it.

        Args:
            rows: of the sequence.
            wanted: beginnings of these rows to make entries of, the shortest first. Those that do not fit are left out.
            is_needed: whether a waiting request shares the beginning with this key; such entries go last.

        Returns:
            the entry of the longest beginning that there is then.
        """
        path = beginnings(rows)
        for beginning in wanted:
            known = beginning.key in self.entries or beginning.key in self._held
            if not known and self._make_room(self.bytes_of(beginning.length), is_needed):
                before = self.find(b for b in path if b.length < beginning.length)
                self.entries[beginning.key] = self.make(rows, beginning, before)
        return self.find(path)

    def make(self, rows: Sequence[int], beginning: Beginning, before: PrefixEntry | None = None) -> PrefixEntry:
        """Read a beginning of a sequence, from `before` on, an entry of a shorter one."""
        runner, start = self.runner, 0 if before is None else before.past.length
        cache = runner.new_cache(1)
        if before is not None:
            cache = runner.put_sequence(cache, before.sequence, 0)
        past = PastTokens() if before is None else before.past
        tokens = tuple(rows[: beginning.length + (not beginning.is_whole)])
        number = runner.mtp_prompt_tokens if runner.num_speculative_tokens else None
        cache, hidden, _ = runner.prefill(
            [tokens[start : beginning.length]],
            cache=cache,
            mtp_prompt_tokens=number,
            past=[past],
            next_tokens=None if beginning.is_whole else [tokens[-1]],
        )
        self.num_tokens_read += beginning.length - start
        mtp_start = past.mtp_start_after(beginning.length - start, number)
        sequence = runner.take_sequence(cache, 0, beginning.length)
        return PrefixEntry(beginning, tokens, PastTokens(beginning.length, mtp_start), sequence, hidden)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What must be equal for an entry to be of use to another cache."""
        runner = self.runner
        dtypes = {"compute_dtype": runner.compute_dtype, "cache_dtype": runner.cache_dtype}
        names = {name: np.dtype(dtype).name for name, dtype in dtypes.items()}
        numbers = {"max_model_len": runner.max_model_len, "mtp_prompt_tokens": runner.mtp_prompt_tokens}
        return weights_fingerprint(runner.model) | names | numbers | {"mtp": runner.num_speculative_tokens > 0}

    def _shapes(self, kv_len: int) -> Cache:
        runner = self.runner
        return jax.eval_shape(lambda: new_cache(runner.model.cfg, 1, kv_len, dtype=runner.cache_dtype))

    def bytes_of(self, num_tokens: int) -> int:
        """Return the bytes of an entry of `num_tokens` tokens."""
        kv_len = self.runner.prefix_kv_len(num_tokens)
        if kv_len not in self._bytes:
            hidden = self.runner.model.cfg.hidden_size * np.dtype(self.runner.compute_dtype).itemsize
            shapes = jax.tree.leaves(self._shapes(kv_len))
            self._bytes[kv_len] = hidden + sum(a.size * a.dtype.itemsize for a in shapes)
        return self._bytes[kv_len]

    @contextmanager
    def holding(self, entries: Iterable[PrefixEntry]) -> Iterator[None]:
        """Offer these entries, too, and keep them whatever the limit is."""
        added = {e.beginning.key: e for e in entries if e.beginning.key not in self._held}
        self._held |= added
        try:
            yield
        finally:
            for key in added:
                del self._held[key]

    def clear(self) -> None:
        """Drop all entries."""
        self.entries.clear()

    def save(self, folder: str | PathLike[str]) -> int:
        """Write every entry that the folder lacks; returns how many. See `prefix_files`."""
        return sum(prefix_files.write(Path(folder), self.settings, entry) for entry in self.entries.values())

    def load(self, folder: str | PathLike[str]) -> int:
        """Read the entries of the same model and settings, as far as they fit; returns how many.

        Files that are damaged, or that were made with other settings, are named in a warning and ignored.
        """
        count, like = 0, self._shapes(self.runner.kv_len)
        for entry in prefix_files.read_all(Path(folder), self.settings, like, self.runner.compute_dtype):
            if entry.beginning.key not in self.entries and self.nbytes + entry.nbytes <= self.max_bytes:
                self.entries[entry.beginning.key] = entry
                count += 1
        return count

    def _make_room(self, nbytes: int, is_needed: Callable[[bytes], object]) -> bool:
        if nbytes > self.max_bytes:
            return False
        used = self.nbytes
        for key in sorted(self.entries, key=lambda key: bool(is_needed(key))):  # stable: the longest unused first
            if used + nbytes <= self.max_bytes:
                break
            used -= self.entries.pop(key).nbytes
        return True


def can_share(buckets: Sequence[int]) -> bool:
    """Return whether prompts that are read in chunks of these lengths have borders at which they can be shared."""
    return any(bucket % GRID == 0 for bucket in buckets)


def free_bytes() -> int:
    """Return the default limit."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats and "bytes_in_use" in stats:
        return int(SHARE_OF_FREE_MEMORY * (stats["bytes_limit"] - stats["bytes_in_use"]))
    return int(DEFAULT_GB * 2**30)
