"""`Scheduler`: decides which requests wait, which run, and in which slot of the batch; without models and devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice

from mtpjax.engine.live_requests import LiveRequests
from mtpjax.engine.request import Request, RequestState

LOOKAHEAD_BATCHES = 64  # batches of requests that are taken from the source together and sorted by length


@dataclass(frozen=True)
class PrefillGroup:
    """Requests that start together.

    Attributes:
        states: one for each request, in the order of `slots`.
        slots: slot of the batch that each request gets.
        prompts: the prompts to read, at most `Scheduler.prefill_batch`.
        prompt_rows: for each request the index of its prompt in `prompts`.
        is_read: the prompts are those of the group before, which kept them: nothing is to be read.
        keep: the next group has one of these prompts, and finds it read.
    """

    states: list[RequestState]
    slots: list[int]
    prompts: list[tuple[int, ...]]
    prompt_rows: list[int]
    is_read: bool = False
    keep: bool = False


class Scheduler:
    """Continuous batching: freed slots are refilled while other requests keep decoding. One scheduler serves one run.

    There are two ways to fill the slots:

    * static batch: all slots are filled when all are free, and the prompts are read into the cache of the batch itself.
      This is used if all requests fit into the batch at once, or if `max_prefill_seqs` is as large as the batch.
    * otherwise up to `prefill_batch` different prompts are read together, into a cache of their own, whenever that many
      slots are free. Requests with the same prompt share its prefill, also those for which slots become free later.

    `LiveRequests` are always filled in the second way.

    Requests are taken from the source only when none waits, and the samples of a prompt together. They are sorted:
    those that may generate most tokens first (by powers of two), so that few slots are busy alone at the end; of these
    the longest prompt first, because prompts of one length are read together without padding. Equal prompts stand
    together.

    Args:
        requests: the source, read only as far as needed.
        num_slots: requests that run at the same time.
        max_prefill_seqs: prompts that are read together when slots become free; None: a quarter of the slots.
        lookahead: requests that are taken from the source together; None: `LOOKAHEAD_BATCHES` batches. At least one
            more than there are slots.

    Attributes:
        waiting: requests without a slot, in the order in which they will start.
        running: for each slot the state of its request, or None if the slot is free.
        static_batch: whether all slots are filled at once.
        prefill_batch: sequences in the batch that prompts are read in.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        num_slots: int,
        *,
        max_prefill_seqs: int | None = None,
        lookahead: int | None = None,
    ):
        self._source = iter(requests)
        self._lookahead = max(lookahead or LOOKAHEAD_BATCHES * num_slots, num_slots + 1)
        self.num_slots = num_slots
        self.running: list[RequestState | None] = [None] * num_slots
        self.waiting: deque[Request] = deque()
        self._kept: list[tuple[int, ...]] = []  # prompts that the last group read and the next one shares
        limit = max_prefill_seqs or max(1, num_slots // 4)
        if isinstance(requests, LiveRequests):  # the next requests are unknown: any slot is refilled when it is free
            self.static_batch, self.prefill_batch = num_slots == 1, max(1, min(limit, num_slots - 1))
            return
        self._refill_queue()
        num_prompts = len({r.prompt_token_ids for r in self.waiting})
        repeats = num_prompts < len(self.waiting)
        one_cache = limit >= num_slots and not (repeats and max_prefill_seqs is None)
        self.static_batch = one_cache or not repeats and len(self.waiting) <= num_slots
        self.prefill_batch = num_slots if self.static_batch else min(num_prompts, limit)

    @property
    def num_free_slots(self) -> int:
        """Slots without a request."""
        return self.running.count(None)

    @property
    def has_stop_strings(self) -> bool:
        """Whether a stop string may end a running request."""
        return any(state is not None and state.has_stop_strings for state in self.running)

    @property
    def requests_by_slot(self) -> list[Request | None]:
        """For each slot its request, or None."""
        return [None if state is None else state.request for state in self.running]

    @property
    def min_free_slots(self) -> int:
        """Slots that must be free before the next requests start."""
        return self.num_slots if self.static_batch else min(self.prefill_batch, len(self.waiting))

    @property
    def return_when_finished(self) -> int:
        """Number of free slots at which the decode loop should return: enough for the next group, or all of them."""
        return self.min_free_slots if self.waiting else self.num_slots

    def admit(self) -> PrefillGroup | None:
        """Give the next waiting requests a slot. Returns None if none waits or too few slots are free."""
        if not self.waiting:
            self._refill_queue()
        if not self.waiting or self.num_free_slots < self.min_free_slots:
            return None
        is_read = self.waiting[0].prompt_token_ids in self._kept
        if not is_read:
            self._kept = []
        requests = self._next_requests()
        free = [slot for slot, state in enumerate(self.running) if state is None]
        states, slots = [RequestState(request) for request in requests], free[: len(requests)]
        for slot, state in zip(slots, states, strict=True):
            self.running[slot] = state
        prompts = [r.prompt_token_ids for r in requests]
        if self.static_batch:  # the cache of the batch has one row for each slot
            return PrefillGroup(states, slots, prompts, list(range(len(prompts))))
        different = self._kept if is_read else list(dict.fromkeys(prompts))
        keep = bool(self.waiting) and self.waiting[0].prompt_token_ids in different
        self._kept = different if keep else []
        return PrefillGroup(states, slots, different, [different.index(p) for p in prompts], is_read, keep)

    def finish(self, slot: int) -> RequestState:
        """Free a slot. Returns the state of the request that it had."""
        state = self.running[slot]
        assert state is not None, f"slot {slot} is free"
        state.finished = True
        self.running[slot] = None
        return state

    def abort(self, indices: Collection[int]) -> list[RequestState]:
        """Mark the running requests with these indices as aborted. Returns the states of those that had no slot."""
        for state in self.running:
            if state is not None and state.request.index in indices:
                state.aborted = True
        dropped = [request for request in self.waiting if request.index in indices]
        if isinstance(self._source, LiveRequests):
            dropped += self._source.withdraw(indices)
        self.waiting = deque(request for request in self.waiting if request.index not in indices)
        return [RequestState(request, finished=True, aborted=True) for request in dropped]

    def _next_requests(self) -> list[Request]:
        """Take requests from the queue, one for each free slot, with at most `prefill_batch` different prompts.

        If the next one's prompt is read already, only requests of which this holds are taken.
        """
        requests: list[Request] = []
        num_prompts, num_free_slots = 0, self.num_free_slots
        while self.waiting and len(requests) < num_free_slots:
            if not requests or self.waiting[0].prompt_token_ids != requests[-1].prompt_token_ids:
                num_prompts += 1  # equal prompts stand together in the queue
            if num_prompts > self.prefill_batch:
                break
            if requests and self._kept and self.waiting[0].prompt_token_ids not in self._kept:
                break
            requests.append(self.waiting.popleft())
        return requests

    def _refill_queue(self) -> None:
        taken = list(islice(self._source, self._lookahead))
        if taken:
            taken += islice(self._source, taken[-1].n - 1 - taken[-1].sample)
        # Of the samples of a prompt, and of equal prompts, the longest counts, so that they stay together.
        most: dict[tuple[int, ...], int] = {}
        for request in taken:
            prompt = request.prompt_token_ids
            most[prompt] = max(most.get(prompt, 0), request.max_tokens.bit_length())

        def order(request: Request) -> tuple[int, int, tuple[int, ...]]:
            prompt = request.prompt_token_ids
            return -most[prompt], -len(prompt), prompt

        self.waiting = deque(sorted(taken, key=order))
