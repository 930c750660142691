"""`Slots`: which request each slot of the loop serves, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from mtpjax.decoding.penalties import TokenCounts
from mtpjax.decoding.speculative import DecodeState
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.request import Request, Result, as_host_array, prompts_seen, stack_requests
from mtpjax.model.cache import Cache

TokenCallback = Callable[[Result, list[int]], None]


class Slots:
    """B slots, filled `width` at a time.

    With `width` = B there is one cache: the slots are filled when all are idle. Otherwise prompts are read into a cache of
    their own, of `width` sequences, while the state of the slots waits; requests with one prompt share its reading.
    """

    def __init__(self, compiled: ModelRunner, batch: int, width: int):
        self.compiled, self.batch, self.width = compiled, batch, width
        self.results: list[Result | None] = [None] * batch
        self._state: Any = None
        self._asked = stack_requests([None] * batch)

    @property
    def idle(self) -> int:
        return self.results.count(None)

    def needed(self, waiting: int) -> int:
        """Idle slots that the next of `waiting` requests wait for."""
        return self.batch if self.width == self.batch else min(self.width, waiting)

    def admit(self, group: Sequence[Request]) -> Iterator[Result]:
        """Give each request an idle slot, having read their prompts, `width` different ones at most.

        Yields those that want no token.
        """
        places = [place for place, result in enumerate(self.results) if result is None][: len(group)]
        results = [Result(request, accepted_per_position=[0] * self.compiled.draft) for request in group]
        for place, result in zip(places, results, strict=True):
            self.results[place] = result
        self._asked = stack_requests([None if result is None else result.request for result in self.results])
        one_batch = self.width == self.batch
        if one_batch:
            self._state = None  # its cache goes before the next one is made
        elif self._state is None:
            self._state = self._at_rest([None] * self.batch, self.compiled.empty_cache(self.batch))
        cache = jax.block_until_ready(self.compiled.empty_cache(self.width))

        began = self.compiled.clock()
        prompts = [r.prompt for r in group] if one_batch else list(dict.fromkeys(r.prompt for r in group))
        # The last prompt token is the loop's first input: a prompt program never needs the LM head.
        rows = [prompt[:-1] for prompt in prompts] + [()] * (self.width - len(prompts))
        mtp_prompt = self.compiled.mtp_prompt if self.compiled.draft else None
        cache, hidden, _ = self.compiled.read(rows, cache=cache, mtp_prompt=mtp_prompt)
        if one_batch:
            self._state = self._at_rest(self._padded(group), cache, hidden)
        else:
            self._insert(group, places, cache, hidden, [prompts.index(r.prompt) for r in group])
        jax.block_until_ready(self._state)
        seconds = self.compiled.clock() - began
        self.compiled.prefill_seconds += seconds
        self.compiled.prompt_tokens += sum(map(len, prompts))
        for result in results:
            result.prefill_seconds = seconds
        yield from self._finished()

    def _insert(
        self, group: Sequence[Request], places: list[int], cache: Cache, hidden: Array, rows: list[int]
    ) -> None:
        """Each request begins in its place behind the prompt in its row, `width` of them at a time."""
        state = self._state
        if (state.seen is None) == (self._asked.penalties is not None):
            state = state.replace(seen=self._seen([None] * self.batch))
        for start in range(0, len(group), self.width):
            part = slice(start, start + self.width)
            fresh = self._at_rest(self._padded(group[part]), cache, hidden)
            state = self.compiled.insert(state, fresh, rows[part], places[part])
        self._state = state

    def _padded(self, group: Sequence[Request]) -> list[Request | None]:
        return [*group, *[None] * (self.width - len(group))]

    def decode(self, enough: int, on_tokens: TokenCallback | None = None) -> Iterator[Result]:
        """Some rounds of the loop, fewer once `enough` slots are idle. Yields the results that are done."""
        before, began = np.array(self._state.rounds), self.compiled.clock()
        self._state, out, used = self.compiled.decode(self._state, self._asked, enough)
        seconds = self.compiled.clock() - began
        self.compiled.decode_seconds += seconds
        self.compiled.slot_steps += self.batch * int(np.max(np.asarray(self._state.rounds) - before))
        for place, result in enumerate(self.results):
            if result is not None:
                new = out[place, : used[place]].tolist()
                result.tokens += new
                result.decode_seconds += seconds
                if on_tokens:
                    on_tokens(result, new)
        yield from self._finished()

    def _finished(self) -> Iterator[Result]:
        state = self._state
        done, stopped, rounds, accepted = map(np.asarray, (state.done, state.stopped, state.rounds, state.accepted))
        for place, result in enumerate(self.results):
            if result is not None and done[place]:
                result.done, result.stopped, result.rounds = True, bool(stopped[place]), int(rounds[place])
                result.accepted_per_position = accepted[place].tolist()
                self.results[place] = None
                yield result

    def _at_rest(self, slots: Sequence[Request | None], cache: Cache, hidden: Array | None = None) -> DecodeState:
        """Before the first round; empty slots are done."""
        batch, compiled = len(slots), self.compiled
        if hidden is None:
            hidden = as_host_array(np.zeros((batch, compiled.model.cfg.hidden_size), compiled.compute_dtype))
        return DecodeState(
            cache=cache,
            hidden=hidden,
            token=as_host_array(np.array([r.prompt[-1] if r else 0 for r in slots], np.int32)),
            count=as_host_array(np.zeros(batch, np.int32)),
            done=as_host_array(np.array([r is None or r.max_tokens == 0 for r in slots])),
            stopped=as_host_array(np.zeros(batch, bool)),
            rounds=as_host_array(np.zeros(batch, np.int32)),
            accepted=as_host_array(np.zeros((batch, compiled.draft), np.int32)),
            seen=self._seen(slots),
        )

    def _seen(self, slots: Sequence[Request | None]) -> TokenCounts | None:
        """What penalties count, where somebody who has a slot has any."""
        return prompts_seen(slots, self.compiled.model.cfg.vocab_size) if self._asked.penalties else None
