"""A `ModelRunner` without a model: its texts are arithmetic on the prompt, so tests of scheduling need no device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mtpjax.decoding.sampling import BatchSamplingParams
from mtpjax.decoding.speculative import DecodeResult, DecodeState
from mtpjax.engine.request import Request

VOCAB = 13
MODULUS = 1_000_003


def extend(context: int, token: int) -> int:
    """The context of a text after one more token; it stands for keys and values of all tokens so far."""
    return (context * 31 + token + 7) % MODULUS


def next_token(context: int, seed: int, penalized: int) -> int:
    return (context * 17 + seed * 5 + penalized) % VOCAB


def expected_tokens(request: Request) -> list[int]:
    """What a request gets if it is alone."""
    context = 0
    tokens: list[int] = []
    for token in request.prompt_token_ids:
        context = extend(context, token)
    penalized = sum(set(request.prompt_token_ids)) if request.has_penalties else 0
    while len(tokens) < request.max_tokens:
        tokens.append(next_token(context, request.seed, penalized))
        context = extend(context, tokens[-1])
        if tokens[-1] in request.all_stop_token_ids:
            break
    return tokens


class FakeRunner:
    """Stands for a `ModelRunner` of `num_speculative_tokens` drafts, of which a number that varies is accepted.

    A cache is an int64 `[B]`: the context of each sequence. `prefills` lists the prompts of each prefill.
    """

    mtp_prompt_tokens, padded_vocab_size, compile_seconds, num_programs = None, VOCAB, 0.0, 0
    auto_depths = None
    max_logprobs, logprobs_mode = 20, "raw_logprobs"

    def __init__(self, num_speculative_tokens: int, max_steps_per_call: int):
        self.num_speculative_tokens, self.max_steps_per_call = num_speculative_tokens, max_steps_per_call
        self.prefills: list[list[tuple[int, ...]]] = []
        self.batch_parts: dict[int, list[Any]] = {}
        self._seconds = 0.0

    def seconds_without_compile(self) -> float:
        self._seconds += 1.0
        return self._seconds

    def new_cache(self, batch: int) -> Any:
        return np.zeros(batch, np.int64)

    def zero_hidden(self, batch: int) -> Any:
        return np.zeros((batch, 1), np.float32)

    def begin_decode(
        self, state: Any, params: BatchSamplingParams, new: Any = None, logprobs: Any = None, depth: int | None = None
    ) -> None:
        pass

    def prefill(self, prompts: Sequence[tuple[int, ...]], *, cache: Any, mtp_prompt_tokens: int | None) -> Any:
        assert len(prompts) == len(cache) and not cache.any() and mtp_prompt_tokens is None
        self.prefills.append([p for p in prompts if p])
        for row, prompt in enumerate(prompts):
            for token in prompt:
                cache[row] = extend(int(cache[row]), token)
        return cache, self.zero_hidden(len(prompts)), []

    def decode(
        self,
        state: DecodeState,
        params: BatchSamplingParams,
        return_when_finished: int,
        step_limit: int | None = None,
        logprobs: Any = None,
        depth: int | None = None,
    ) -> Any:
        state, params = jax.tree.map(np.asarray, (state, params))
        batch, width = len(state.token), self.num_speculative_tokens + 1
        arrays = {
            name: np.array(getattr(state, name)) for name in ("cache", "token", "num_tokens", "finished", "stopped")
        }
        num_steps, accepted = np.array(state.num_steps), np.array(state.num_accepted_per_pos)
        out, counts = np.zeros((batch, self.max_steps_per_call * width), np.int32), np.zeros(batch, np.int32)
        assert arrays["finished"].sum() < return_when_finished <= batch  # otherwise the call would do nothing
        for _ in range(min(step_limit or self.max_steps_per_call, self.max_steps_per_call)):
            if arrays["finished"].sum() >= return_when_finished:
                break
            for slot in np.flatnonzero(~arrays["finished"]).tolist():
                num_accepted = int(arrays["cache"][slot] + num_steps[slot]) % width
                num_steps[slot] += 1
                accepted[slot, :num_accepted] += 1
                for _ in range(num_accepted + 1):
                    self._one_token(arrays, slot, state, params)
                    out[slot, counts[slot]] = arrays["token"][slot]
                    counts[slot] += 1
                    if arrays["finished"][slot]:
                        break
        state = state.replace(**arrays, num_steps=num_steps, num_accepted_per_pos=accepted)
        return DecodeResult(state, out, counts)

    def _one_token(self, arrays: dict[str, Any], slot: int, state: Any, params: Any) -> None:
        penalized = 0
        if params.penalties is not None and params.penalties.presence[slot]:
            penalized = int(np.flatnonzero(state.text_state.token_counts.in_prompt[slot]).sum())  # type: ignore[union-attr]
        context = extend(int(arrays["cache"][slot]), int(arrays["token"][slot]))
        token = next_token(context, int(params.seed[slot]), penalized)
        arrays["cache"][slot], arrays["token"][slot] = context, token
        arrays["num_tokens"][slot] += 1
        arrays["stopped"][slot] = token in params.stop_token_ids[slot].tolist()
        arrays["finished"][slot] = arrays["stopped"][slot] or arrays["num_tokens"][slot] >= params.max_tokens[slot]

    def insert(self, state: Any, new: Any, rows: Sequence[int], slots: Sequence[int]) -> Any:
        def moved(old: np.ndarray, source: np.ndarray, source_rows: Sequence[int]) -> np.ndarray:
            result = np.array(old)
            result[list(slots)] = np.asarray(source)[list(source_rows)]
            return result

        own = range(len(slots))
        names = ("token", "num_tokens", "finished", "stopped", "num_steps", "num_accepted_per_pos")
        changes: dict[str, Any] = {name: moved(getattr(state, name), getattr(new, name), own) for name in names}
        counts, new_counts = state.text_state.token_counts, new.text_state.token_counts
        if counts is not None and new_counts is not None:
            counts = counts.replace(in_prompt=moved(counts.in_prompt, new_counts.in_prompt, own))
            changes["text_state"] = state.text_state.replace(token_counts=counts)
        return state.replace(cache=moved(state.cache, new.cache, rows), **changes)  # type: ignore[arg-type]
