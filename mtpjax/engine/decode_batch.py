"""`DecodeBatch`: the state of all slots on the device, filled by prefills and advanced by the decode loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mtpjax.decoding.logits_processors import TextState
from mtpjax.decoding.penalties import Penalties, TokenCounts, round_to_bfloat16
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams, TruncationParams
from mtpjax.decoding.speculative import DecodeState
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.request import Request
from mtpjax.engine.scheduler import PrefillGroup
from mtpjax.engine.shared_prefixes import SharedPrefixes
from mtpjax.model.cache import Cache


class DecodedTokens(NamedTuple):
    """What one call of the decode loop gave.

    Attributes:
        tokens: new tokens of each slot.
        num_steps: steps that the loop made.
        seconds: that it took, without compilation.
    """

    tokens: list[list[int]]
    num_steps: int
    seconds: float


class SlotFigures(NamedTuple):
    """What is known of B slots.

    Attributes:
        finished: whether the request is finished, `[B]`; also true for a free slot.
        stopped: whether a stop token ended it, `[B]`.
        num_steps: steps that it took part in, `[B]`.
        accepted: steps in which the draft at each of k positions was accepted, `[B, k]`.
    """

    finished: np.ndarray
    stopped: np.ndarray
    num_steps: np.ndarray
    accepted: np.ndarray


class DecodeBatch:
    """Cache, last token and counters of `num_slots` slots.

    If `prefill_batch` is `num_slots`, prompts are read into the cache of the batch itself, which is made anew each
    time. A smaller `prefill_batch` has a cache of its own, out of which the prompts are copied into their slots while
    the other slots keep theirs.
    """

    def __init__(self, runner: ModelRunner, num_slots: int, prefill_batch: int, prefixes: SharedPrefixes | None = None):
        self.runner, self.num_slots, self.prefill_batch = runner, num_slots, prefill_batch
        self.prefixes = prefixes
        self.num_tokens_read = 0  # of prompts
        self.state: DecodeState | None = None  # made by the first prefill
        self._params = stack_requests([None] * num_slots)
        self._begun: set[tuple[str, ...]] = set()  # parts of the text state whose program has been begun

    def prefill(self, group: PrefillGroup, requests_by_slot: Sequence[Request | None]) -> float:
        """Read the prompts of a group and start its requests in their slots.

        Args:
            group: what to read, and the slots that it goes to.
            requests_by_slot: the requests of all slots, with those of the group.

        Returns:
            seconds, synchronised with the device, without compilation.
        """
        runner, static_batch = self.runner, self.prefill_batch == self.num_slots
        self._params = stack_requests(requests_by_slot)
        if static_batch:
            self.state = None  # frees its cache before the next one is made
        elif self.state is None:
            self.state = self._initial_state([None] * self.num_slots, runner.new_cache(self.num_slots))
        cache = jax.block_until_ready(runner.new_cache(self.prefill_batch))

        start = runner.seconds_without_compile()
        # The last prompt token is the loop's first input, so a prompt program never needs the LM head.
        prompts = [prompt[:-1] for prompt in group.prompts]
        if any(state.request.max_tokens for state in group.states):
            self._begin_decode(cache)
        prompts += [()] * (self.prefill_batch - len(prompts))
        mtp_prompt_tokens = runner.mtp_prompt_tokens if runner.num_speculative_tokens else None
        if self.prefixes is None:
            self.num_tokens_read += sum(map(len, group.prompts))
            cache, hidden, _ = runner.prefill(prompts, cache=cache, mtp_prompt_tokens=mtp_prompt_tokens)
        else:
            cache, hidden, num_read = self.prefixes.prefill(prompts, group, cache, mtp_prompt_tokens)
            self.num_tokens_read += num_read
        requests = [state.request for state in group.states]
        if static_batch:
            self.state = self._initial_state(self._padded(requests), cache, hidden)
        else:
            self._insert(requests, group, cache, hidden)
        jax.block_until_ready(self.state)
        return runner.seconds_without_compile() - start

    def _begin_decode(self, cache: Cache) -> None:
        """Make the programs that follow the prompts, whose cache is `cache`, ready while the prompts are read."""
        parts = initial_text_state([None], self._params, 1).parts
        if parts in self._begun:
            return
        self._begun.add(parts)

        def shapes(cache: Cache, batch: int) -> DecodeState:
            state = self._initial_state([None] * batch, cache)
            return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), state)

        new = shapes(cache, self.prefill_batch)
        if self.state is None:
            self.runner.begin_decode(new, self._params)
        else:
            self.runner.begin_decode(shapes(self.state.cache, self.num_slots), self._params, new)

    def decode(self, return_when_finished: int, step_limit: int | None = None) -> DecodedTokens:
        """Advance all slots by one call of the loop, which returns early when `return_when_finished` slots are done.

        With `step_limit`, it makes no more than so many steps.
        """
        state = self._started()
        steps_before, start = np.array(state.num_steps), self.runner.seconds_without_compile()
        self.state, out, counts = self.runner.decode(state, self._params, return_when_finished, step_limit)
        seconds = self.runner.seconds_without_compile() - start
        num_steps = int(np.max(np.asarray(self.state.num_steps) - steps_before))
        return DecodedTokens([row[:count].tolist() for row, count in zip(out, counts, strict=True)], num_steps, seconds)

    def figures(self) -> SlotFigures:
        """Copy what is known of each slot from the device."""
        state = self._started()
        return SlotFigures(
            *map(np.asarray, (state.finished, state.stopped, state.num_steps, state.num_accepted_per_pos))
        )

    def _started(self) -> DecodeState:
        assert self.state is not None, "nothing has been prefilled"
        return self.state

    def _insert(self, requests: Sequence[Request], group: PrefillGroup, cache: Cache, hidden: Array) -> None:
        """Copy the row of each prefilled prompt into the slot of every request that uses it.

        One call of the program copies up to `prefill_batch` rows.
        """
        state = self._started()
        fresh = self._text_state([None] * self.num_slots)  # parts that no request needed so far
        kept = {name: getattr(state.text_state, name) for name in fresh.parts if name in state.text_state.parts}
        state = state.replace(text_state=fresh.replace(**kept))
        for start in range(0, len(requests), self.prefill_batch):
            part = slice(start, start + self.prefill_batch)
            new = self._initial_state(self._padded(requests[part]), cache, hidden)
            state = self.runner.insert(state, new, group.prompt_rows[part], group.slots[part])
        self.state = state

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


def stack_requests(requests: Sequence[Request | None]) -> BatchSamplingParams:
    """Put the settings of the requests in B slots side by side; penalties are None if no request has any."""

    def column(get: Callable[[Request], float], dtype: Any, free: float = 0.0) -> np.ndarray:
        return np.array([free if r is None else get(r) for r in requests], dtype)

    stop_token_ids = np.full((len(requests), MAX_STOP_TOKENS), -1, np.int32)
    for row, request in zip(stop_token_ids, requests, strict=True):
        if request is not None:
            row[: len(request.all_stop_token_ids)] = request.all_stop_token_ids
    columns = {
        "max_tokens": column(lambda r: r.max_tokens, np.int32),
        "temperature": column(lambda r: r.temperature, np.float32),
        "seed": column(lambda r: r.seed & 0xFFFFFFFF, np.uint32),
        "stop_token_ids": stop_token_ids,
    }
    truncation = {
        "top_k": column(lambda r: r.top_k, np.int32),
        "top_p": column(lambda r: r.top_p, np.float32, 1.0),
        "min_p": column(lambda r: r.min_p, np.float32),
    }
    penalties = None
    if any(r is not None and r.has_penalties for r in requests):
        penalties = {
            "presence": column(lambda r: r.presence_penalty, np.float32),
            "frequency": column(lambda r: round_to_bfloat16(r.frequency_penalty), np.float32),
            "repetition": column(lambda r: r.repetition_penalty, np.float32, 1.0),
        }
    columns, truncation, penalties = jax.device_put((columns, truncation, penalties))
    return BatchSamplingParams(
        **columns,
        truncation=TruncationParams(**truncation),
        penalties=None if penalties is None else Penalties(**penalties),
    )


def initial_text_state(
    requests: Sequence[Request | None], params: BatchSamplingParams, padded_vocab_size: int
) -> TextState:
    """Return what the processors know before the first new token of each slot.

    Args:
        requests: of B slots, or some of them.
        params: of all slots, whose parts say which parts of the state are needed.
        padded_vocab_size: number of logits V of a row.
    """
    return TextState(token_counts=count_prompt_tokens(requests, padded_vocab_size) if params.penalties else None)


def count_prompt_tokens(requests: Sequence[Request | None], padded_vocab_size: int) -> TokenCounts:
    """Return what penalties count before the first new token of each slot: the tokens of its prompt.

    Args:
        requests: of B slots.
        padded_vocab_size: number of logits V of a row.
    """
    prompt = np.zeros((len(requests), padded_vocab_size), bool)
    for row, request in zip(prompt, requests, strict=True):
        if request is not None:
            row[list(request.prompt_token_ids)] = True
    prompt, counts = jax.device_put((prompt, np.zeros(prompt.shape, np.int32)))
    return TokenCounts(in_prompt=prompt, counts=counts)
