"""`LiveRequests`: a source of requests that arrive, and are aborted, while others run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator

from mtpjax.engine.request import Request


class LiveRequests:
    """Requests from other threads for one run of the engine.

    As an iterator it gives what has arrived and stops when nothing is there right now; asked again later, it goes on.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._arrived: deque[Request] = deque()
        self._aborted: set[int] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the run is to end."""
        return self._closed

    def add(self, request: Request) -> None:
        """Hand a request in. Raises RuntimeError after `close`."""
        with self._changed:
            if self._closed:
                raise RuntimeError("no more requests are taken: the engine was shut down")
            self._arrived.append(request)
            self._changed.notify_all()

    def abort(self, index: int) -> None:
        """End the request with this index, wherever it is; nothing happens if there is none."""
        with self._changed:
            self._aborted.add(index)
            self._changed.notify_all()

    def close(self) -> None:
        """End the run after the present call of the decode loop; what runs and waits is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self) -> bool:
        """Wait until something has happened. Returns False if the run is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._aborted or self._closed)
            return not self._closed

    def take_aborted(self) -> set[int]:
        """Return the indices that `abort` was called with since the last call."""
        with self._changed:
            aborted, self._aborted = self._aborted, set()
            return aborted

    def withdraw(self, indices: Collection[int]) -> list[Request]:
        """Take back the requests with these indices that have arrived and were not taken."""
        with self._changed:
            withdrawn = [request for request in self._arrived if request.index in indices]
            self._arrived = deque(request for request in self._arrived if request.index not in indices)
            return withdrawn

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        with self._changed:
            if not self._arrived:
                raise StopIteration
            return self._arrived.popleft()
