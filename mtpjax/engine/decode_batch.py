"""`DecodeBatch`: the state of all slots on the device, filled by prefills and advanced by the decode loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mtpjax.decoding.logits_processors import TextState
from mtpjax.decoding.logprobs import TokenLogprobs
from mtpjax.decoding.sampling import BatchSamplingParams
from mtpjax.decoding.speculative import DecodeState
from mtpjax.engine.batch_parts import PLAIN, BatchParts, choose_parts, parts_of
from mtpjax.engine.depth import DepthController
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.request import Request
from mtpjax.engine.request_logprobs import logprobs_of_slots
from mtpjax.engine.scheduler import PrefillGroup
from mtpjax.engine.shared_prefixes import SharedPrefixes
from mtpjax.engine.slot_depths import SlotDepths
from mtpjax.engine.stack_requests import initial_text_state, stack_requests, text_state_parts
from mtpjax.model.cache import Cache


class DecodedTokens(NamedTuple):
    """What one call of the decode loop gave.

    Attributes:
        tokens: new tokens of each slot.
        num_steps: steps that the loop made.
        seconds: that it took, without compilation.
        logprobs: of the tokens of each slot; None for a slot whose request asks for none.
    """

    tokens: list[list[int]]
    num_steps: int
    seconds: float
    logprobs: list[TokenLogprobs | None]


class SlotFigures(NamedTuple):
    """What is known of B slots.

    Attributes:
        finished: whether the request is finished, `[B]`; also true for a free slot.
        stopped: whether a stop token ended it, `[B]`.
        num_steps: steps that it took part in, `[B]`.
        accepted: steps in which the draft at each of k positions was accepted, `[B, k]`.
        num_drafts: steps that drafted, `[B]`.
        num_draft_tokens: tokens that were drafted, `[B]`.
    """

    finished: np.ndarray
    stopped: np.ndarray
    num_steps: np.ndarray
    accepted: np.ndarray
    num_drafts: np.ndarray
    num_draft_tokens: np.ndarray


class DecodeBatch:
    """Cache, last token and counters of `num_slots` slots.

    In a static batch, `prefill_batch` is `num_slots` and prompts are read into the cache of the batch itself, which is
    made anew each time. Otherwise they are read into a cache of their own, out of which they are copied into their
    slots while the other slots keep theirs. It stays until the next prompts are read, if their group says so.

    `depths` chooses how many tokens a call drafts, `prefixes` keeps common beginnings of prompts. Without `depths`
    every call drafts the runner's number, and without `prefixes` every prompt is read whole.
    """

    def __init__(
        self,
        runner: ModelRunner,
        num_slots: int,
        prefill_batch: int,
        static_batch: bool | None = None,
        depths: DepthController | None = None,
        prefixes: SharedPrefixes | None = None,
    ):
        self.runner, self.num_slots, self.prefill_batch = runner, num_slots, prefill_batch
        self.static_batch = prefill_batch == num_slots if static_batch is None else static_batch
        self.prefixes = prefixes
        self.num_tokens_read = 0  # of prompts
        self.state: DecodeState | None = None  # made by the first prefill
        self._parts: BatchParts | None = None  # of the program that runs the batch
        self._params = self._stack([None] * num_slots)
        self._kept: tuple[Cache, Array] | None = None  # prompts that the next group has too, and their hidden states
        self._requests: Sequence[Request | None] = [None] * num_slots
        self._begun: set[tuple[Any, ...]] = set()  # parts, and depths, whose programs have been begun
        self._depths = SlotDepths(runner.num_speculative_tokens, num_slots, depths)

    def prefill(
        self, group: PrefillGroup, requests_by_slot: Sequence[Request | None], waiting: Iterable[Request] = ()
    ) -> float:
        """Read the prompts of a group and start its requests in their slots.

        Args:
            group: what to read, and the slots that it goes to.
            requests_by_slot: the requests of all slots, with those of the group.
            waiting: requests that come later. A program that can serve them, too, saves the next one.

        Returns:
            seconds, synchronised with the device, without compilation.
        """
        runner, static_batch = self.runner, self.static_batch
        made = runner.batch_parts.setdefault(self.num_slots, [])
        needed = parts_of(requests_by_slot, waiting, runner.max_logprobs, runner.logprobs_mode)
        self._parts = choose_parts(needed, self._parts, made)
        if self._parts not in made:
            made.append(self._parts)
        self._params = self._stack(requests_by_slot)
        self._requests = requests_by_slot
        self._depths.start(requests_by_slot, group.slots)
        if static_batch:
            self.state = None  # frees its cache before the next one is made
        elif self.state is None:
            self.state = self._initial_state([None] * self.num_slots, runner.new_cache(self.num_slots))
        requests, kept, self._kept = [state.request for state in group.states], self._kept, None
        if group.is_read:
            assert kept is not None, "the group before did not keep its prompts"
            start = runner.seconds_without_compile()
            self._insert(requests, group, *kept)
            for state in group.states:
                state.num_cached_tokens = len(state.request.prompt_token_ids) - 1
            self._kept = kept if group.keep else None
            jax.block_until_ready(self.state)
            return runner.seconds_without_compile() - start
        cache = jax.block_until_ready(runner.new_cache(self.prefill_batch))

        start = runner.seconds_without_compile()
        # The last prompt token is the loop's first input, so a prompt program never needs the LM head.
        prompts = [prompt[:-1] for prompt in group.prompts]
        if any(state.request.max_tokens for state in group.states):
            for depth in self._depths.first_depths():
                self._begin_decode(cache, depth)
        prompts += [()] * (self.prefill_batch - len(prompts))
        mtp_prompt_tokens = runner.mtp_prompt_tokens if runner.num_speculative_tokens else None
        if self.prefixes is None:
            self.num_tokens_read += sum(map(len, group.prompts))
            cache, hidden, _ = runner.prefill(prompts, cache=cache, mtp_prompt_tokens=mtp_prompt_tokens)
        else:
            cache, hidden, num_read = self.prefixes.prefill(prompts, group, cache, mtp_prompt_tokens)
            self.num_tokens_read += num_read
        if static_batch:
            self.state = self._initial_state(self._padded(requests), cache, hidden)
        else:
            self._insert(requests, group, cache, hidden)
            self._kept = (cache, hidden) if group.keep else None
        jax.block_until_ready(self.state)
        return runner.seconds_without_compile() - start

    def _begin_decode(self, cache: Cache, depth: int | None = None) -> None:
        """Make the programs that follow the prompts, whose cache is `cache`, ready while the prompts are read.

        `depth` is the number of tokens that a step drafts; None: the runner's.
        """
        depth = self.runner.num_speculative_tokens if depth is None else depth
        params, logprobs = self._params_at(depth), self._parts.logprobs if self._parts else None
        parts = (*text_state_parts(params), *params.parts, logprobs, depth)
        if parts in self._begun:
            return
        self._begun.add(parts)

        def shapes(cache: Cache, batch: int) -> DecodeState:
            state = self._initial_state([None] * batch, cache)
            return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), state)

        new = shapes(cache, self.prefill_batch)
        if self.state is None:
            self.runner.begin_decode(new, params, None, logprobs, depth)
        else:
            self.runner.begin_decode(shapes(self.state.cache, self.num_slots), params, new, logprobs, depth)

    def _params_at(self, depth: int) -> BatchSamplingParams:
        """Return the parameters of a call of this depth; limits on drafts only if one counts."""
        if self._depths.has_limits(depth):
            return self._params
        return self._params.replace(num_speculative_tokens=None)

    def decode(self, return_when_finished: int, step_limit: int | None = None) -> DecodedTokens:
        """Advance all slots by one call of the loop, which returns early when `return_when_finished` slots are done.

        With `step_limit`, it makes no more than so many steps.
        """
        state = self._started()
        choice = self._depths.choose(state, step_limit)
        params = self._params_at(choice.depth)
        steps_before, start = np.array(state.num_steps), self.runner.seconds_without_compile()
        spec = self._parts.logprobs if self._parts else None
        result = self.runner.decode(state, params, return_when_finished, choice.step_limit, spec, choice.depth)
        self.state = result.state
        seconds = self.runner.seconds_without_compile() - start
        steps = np.asarray(self.state.num_steps) - steps_before
        self._depths.observe(choice.depth, steps, self.state, seconds)
        tokens = [row[:count].tolist() for row, count in zip(result.tokens, result.num_tokens, strict=True)]
        logprobs = logprobs_of_slots(result.logprobs, self._requests, result.num_tokens)
        return DecodedTokens(tokens, int(np.max(steps)), seconds, logprobs)

    def figures(self) -> SlotFigures:
        """Copy what is known of each slot from the device."""
        state = self._started()
        return SlotFigures(
            finished=np.asarray(state.finished),
            stopped=np.asarray(state.stopped),
            num_steps=np.asarray(state.num_steps),
            accepted=np.asarray(state.num_accepted_per_pos),
            num_drafts=self._depths.num_drafts,
            num_draft_tokens=self._depths.num_draft_tokens,
        )

    def finish(self, slots: Sequence[int]) -> None:
        """Tell the device that the requests in these slots are finished. They get no more tokens."""
        state = self._started()
        finished = np.array(state.finished)
        finished[list(slots)] = True
        self.state = state.replace(finished=jax.device_put(finished))

    def _started(self) -> DecodeState:
        assert self.state is not None, "nothing has been prefilled"
        return self.state

    def _insert(self, requests: Sequence[Request], group: PrefillGroup, cache: Cache, hidden: Array) -> None:
        """Copy the row of each prefilled prompt into the slot of every request that uses it.

        One call of the program copies up to `prefill_batch` rows.
        """
        state = self._started()
        parts = text_state_parts(self._params)
        if parts != state.text_state.parts:
            fresh = self._text_state([None] * self.num_slots)  # has parts that no request needed so far
            kept = {name: getattr(state.text_state, name) for name in parts if name in state.text_state.parts}
            state = state.replace(text_state=fresh.replace(**kept))
        for start in range(0, len(requests), self.prefill_batch):
            part = slice(start, start + self.prefill_batch)
            new = self._initial_state(self._padded(requests[part]), cache, hidden)
            state = self.runner.insert(state, new, group.prompt_rows[part], group.slots[part])
        self.state = state

    def _stack(self, requests: Sequence[Request | None]) -> BatchSamplingParams:
        return stack_requests(requests, self.runner.padded_vocab_size, self._parts or PLAIN)

    def _padded(self, requests: Sequence[Request]) -> list[Request | None]:
        return [*requests, *[None] * (self.prefill_batch - len(requests))]

    def _initial_state(
        self, requests: Sequence[Request | None], cache: Cache, hidden: Array | None = None
    ) -> DecodeState:
        """The state before the first step; slots without a request are finished."""
        batch, runner = len(requests), self.runner
        if hidden is None:
            hidden = runner.zero_hidden(batch)
        token, num_tokens, finished, stopped, num_steps, num_accepted_per_pos = jax.device_put(
            (
                np.array([r.prompt_token_ids[-1] if r else 0 for r in requests], np.int32),
                np.zeros(batch, np.int32),
                np.array([r is None or r.max_tokens == 0 for r in requests]),
                np.zeros(batch, bool),
                np.zeros(batch, np.int32),
                np.zeros((batch, runner.num_speculative_tokens), np.int32),
            )
        )
        return DecodeState(
            cache=cache,
            hidden=hidden,
            token=token,
            num_tokens=num_tokens,
            finished=finished,
            stopped=stopped,
            num_steps=num_steps,
            num_accepted_per_pos=num_accepted_per_pos,
            text_state=self._text_state(requests),
        )

    def _text_state(self, requests: Sequence[Request | None]) -> TextState:
        return initial_text_state(requests, self._params, self.runner.padded_vocab_size)
