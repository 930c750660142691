"""The tree of common beginnings of requests: which of them are worth reading once. On the host, without arrays.

The rows of a prompt are its tokens but the last one. What a sequence remembers can be shared at a border: after a
multiple of `GRID` rows, if the token after these is shared, too (the MTP head pairs each row with the token after it).
It can also be shared after all rows, by requests whose rows are equal.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mtpjax.engine.prompt_chunks import GRID

MIN_SAVED_TOKENS = 256  # a beginning is read once if that saves so many tokens, since it costs a call of its own


class Beginning(NamedTuple):
    """A beginning of a sequence that can be shared.

    Attributes:
        key: names its tokens and the token after them; SHA-256.
        length: number of tokens.
        is_whole: whether it is all rows of a prompt. The token after them is then not part of it.
    """

    key: bytes
    length: int
    is_whole: bool


def border_below(num_rows: int) -> int:
    """Return the last border of a sequence of `num_rows` rows: at least one row follows it."""
    return max(0, (num_rows - 1) // GRID * GRID)


def beginnings(rows: Sequence[int]) -> list[Beginning]:
    """Return everything that a sequence of these rows can share, the shortest first."""
    tokens = np.asarray(rows, np.int32)
    digest, found = hashlib.sha256(), list[Beginning]()
    for border in range(GRID, border_below(len(rows)) + 1, GRID):
        digest.update(tokens[border - GRID : border].tobytes())
        with_next = digest.copy()
        with_next.update(tokens[border].tobytes())
        found.append(Beginning(with_next.digest(), border, False))
    if len(rows) >= GRID:
        digest.update(tokens[border_below(len(rows)) :].tobytes() + b"whole")
        found.append(Beginning(digest.digest(), len(rows), True))
    return found


class PrefixTree:
    """Counts how many of the requests that wait share each beginning."""

    def __init__(self) -> None:
        self._of_request: dict[int, list[Beginning]] = {}
        self._counts: Counter[bytes] = Counter()

    def __contains__(self, index: int) -> bool:
        return index in self._of_request

    def add(self, requests: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Add requests, each as its index and its rows. Those that are there already change nothing."""
        for index, rows in requests:
            if index not in self._of_request:
                self._of_request[index] = beginnings(rows)
                self._counts.update(b.key for b in self._of_request[index])

    def remove(self, indices: Iterable[int]) -> None:
        """Remove requests that wait no longer; those that are not there change nothing."""
        for index in indices:
            for beginning in self._of_request.pop(index, ()):
                self._counts[beginning.key] -= 1
                if not self._counts[beginning.key]:
                    del self._counts[beginning.key]

    def retain(self, indices: Container[int]) -> None:
        """Remove all other requests: those that were cancelled while they waited, too."""
        self.remove([index for index in self._of_request if index not in indices])

    def count(self, key: bytes) -> int:
        """Return how many requests share a beginning."""
        return self._counts[key] if key in self._counts else 0

    def branches(self, index: int) -> list[Beginning]:
        """Return the beginnings of a request that should be read once, the shortest first.

        They are those after which the requests that share them part, where that saves `MIN_SAVED_TOKENS` tokens.
        """
        path, found, parent = self._of_request.get(index, []), list[Beginning](), 0
        counts = [self.count(b.key) for b in path] + [1]
        for beginning, count, next_count in zip(path, counts, counts[1:], strict=False):
            if count > next_count and (count - 1) * (beginning.length - parent) >= MIN_SAVED_TOKENS:
                found.append(beginning)
                parent = beginning.length
        return found
