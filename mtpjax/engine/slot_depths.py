"""`SlotDepths`: how many tokens each slot of a batch may draft, how many it has drafted, and the depth of a call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtpjax.decoding.speculative import DecodeState
from mtpjax.engine.depth import Choice, DepthController, depth_for
from mtpjax.engine.request import Request

POWERS = (0, 1, 2, 4, 8)


def program_depths(max_depth: int) -> tuple[int, ...]:
    """Return the depths of the programs that serve requests with smaller limits than `max_depth`, ascending."""
    return (*(d for d in POWERS if d < max_depth), max_depth)


class SlotDepths:
    """The draft limits and counts of the slots of one batch.

    Args:
        max_depth: tokens drafted in a step at most.
        num_slots: slots of the batch.
        controller: chooses the depth; None: it is the largest limit of the requests, rounded up. Requests that have
            finished count until others start, so that no program is made for the end of a batch.

    Attributes:
        depths: that programs are made for, ascending.
        limits: drafts that the request of each slot allows, `[B]`.
        num_drafts: steps that drafted for it, `[B]`.
        num_draft_tokens: tokens that were drafted for it, `[B]`.
    """

    def __init__(self, max_depth: int, num_slots: int, controller: DepthController | None = None):
        self.depths = program_depths(max_depth) if controller is None else controller.depths
        self.limits = np.full(num_slots, max_depth)
        self.num_drafts, self.num_draft_tokens = np.zeros(num_slots, int), np.zeros(num_slots, int)
        self._auto = None if controller is None else controller.for_batch(num_slots)
        self._max_depth = max_depth
        self._occupied = np.zeros(num_slots, bool)
        self._accepted_before = np.zeros((num_slots, max_depth), int)  # the last call of the loop

    def start(self, requests_by_slot: Sequence[Request | None], slots: Sequence[int]) -> None:
        """Begin to count for new requests in some slots."""
        self._occupied = np.array([r is not None for r in requests_by_slot])
        own = [None if r is None else r.num_speculative_tokens for r in requests_by_slot]
        self.limits = np.array([self._max_depth if n is None else n for n in own])
        self.num_drafts[list(slots)] = self.num_draft_tokens[list(slots)] = 0
        if self._auto is not None:
            self._auto.start(list(slots))

    def first_depths(self) -> tuple[int, ...]:
        """Return the depths that calls may have now that requests have begun."""
        largest = depth_for(self.limits[self._occupied], self.depths)
        return (largest,) if self._auto is None else tuple(d for d in self.depths if d <= largest)

    def choose(self, state: DecodeState, step_limit: int | None) -> Choice:
        """Choose the depth of the next call, which starts from `state` and makes at most `step_limit` steps."""
        if self._auto is not None:
            self._accepted_before = np.array(state.num_accepted_per_pos)
            return self._auto.choose(~np.asarray(state.finished), self.limits, step_limit)
        return Choice(depth_for(self.limits[self._occupied], self.depths), step_limit)

    def has_limits(self, depth: int) -> bool:
        """Return whether a request allows fewer drafts than a call of this depth makes."""
        return bool((self.limits[self._occupied] < depth).any())

    def observe(self, depth: int, num_steps: np.ndarray, state: DecodeState, seconds: float) -> None:
        """Count the drafts of a call, and learn from it.

        Args:
            depth: that it had.
            num_steps: steps of each slot in it, `[B]`.
            state: after it.
            seconds: that it took.
        """
        drafted = np.minimum(self.limits, depth)
        self.num_drafts += np.where(drafted > 0, num_steps, 0)
        self.num_draft_tokens += drafted * num_steps
        if self._auto is not None:
            accepted = np.asarray(state.num_accepted_per_pos) - self._accepted_before
            self._auto.observe(depth, num_steps, accepted, self.limits, seconds)
