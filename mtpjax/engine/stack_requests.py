"""The settings and the first text state of the requests in B slots, as arrays for the decode loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mtpjax.decoding.logits_processors import TextState
from mtpjax.decoding.penalties import Penalties, TokenCounts, round_to_bfloat16
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams, TruncationParams
from mtpjax.engine.batch_parts import BatchParts, parts_of
from mtpjax.engine.request import Request
from mtpjax.engine.stack_automata import initial_automaton_state, stack_automata
from mtpjax.engine.stack_constraints import no_recent_tokens, stack_constraints

NO_LIMIT = np.iinfo(np.int32).max  # drafts of a request that allows any number


def stack_requests(
    requests: Sequence[Request | None], padded_vocab_size: int = 0, parts: BatchParts | None = None
) -> BatchSamplingParams:
    """Put the settings of the requests in B slots side by side.

    Args:
        requests: of B slots.
        padded_vocab_size: number of logits V of a row; plain sampling does not need it.
        parts: of the program; they cover what the requests need. None: just that.
    """
    parts = parts_of(requests) if parts is None else parts

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
    if parts.penalties:
        penalties = {
            "presence": column(lambda r: r.presence_penalty, np.float32),
            "frequency": column(lambda r: round_to_bfloat16(r.frequency_penalty), np.float32),
            "repetition": column(lambda r: r.repetition_penalty, np.float32, 1.0),
        }
    limits = None
    if any(r is not None and r.num_speculative_tokens is not None for r in requests):
        limits = column(lambda r: NO_LIMIT if r.num_speculative_tokens is None else r.num_speculative_tokens, np.int32)
    columns, truncation, penalties, limits = jax.device_put((columns, truncation, penalties, limits))
    return BatchSamplingParams(
        **columns,
        truncation=TruncationParams(**truncation),
        penalties=None if penalties is None else Penalties(**penalties),
        constraints=stack_constraints(requests, padded_vocab_size, parts),
        automata=stack_automata(
            [None if r is None else r.automaton for r in requests], parts.automata, padded_vocab_size
        ),
        num_speculative_tokens=limits,
    )


def text_state_parts(params: BatchSamplingParams) -> tuple[str, ...]:
    """Return the names of the parts of `TextState` that a batch with these parameters has."""
    return initial_text_state([None], params, 1).parts


def initial_text_state(
    requests: Sequence[Request | None], params: BatchSamplingParams, padded_vocab_size: int
) -> TextState:
    """Return what the processors know before the first new token of each slot.

    Args:
        requests: of B slots, or some of them.
        params: of all slots, whose parts say which parts of the state are needed.
        padded_vocab_size: number of logits V of a row.
    """
    forbids = params.constraints is not None and params.constraints.forbidden is not None
    return TextState(
        token_counts=count_prompt_tokens(requests, padded_vocab_size) if params.penalties else None,
        recent_tokens=no_recent_tokens(len(requests)) if forbids else None,
        automaton=initial_automaton_state(len(requests)) if params.automata else None,
    )


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
