"""Constraints of the requests in B slots, as arrays for the decode loop."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from mtpjax.decoding.constraints import (
    MAX_BAD_WORD_TOKENS,
    NO_TOKEN,
    Constraints,
    Forbidden,
    RecentTokens,
)
from mtpjax.decoding.sampling import MAX_STOP_TOKENS
from mtpjax.engine.batch_parts import BatchParts
from mtpjax.engine.request import Request

MAX_EARLY_STOP_TOKENS = 2 * MAX_STOP_TOKENS  # stop tokens of a request, and those that it ignores


def stack_constraints(
    requests: Sequence[Request | None], padded_vocab_size: int, parts: BatchParts
) -> Constraints | None:
    """Put the constraints of the requests in B slots side by side; None if the program has no part for any.

    Args:
        requests: of B slots.
        padded_vocab_size: number of logits V of a row.
        parts: of the program; they cover what the requests need.
    """
    bias = forbidden = None
    if parts.bias:
        bias = np.zeros((len(requests), padded_vocab_size), np.float32)
        for row, request in zip(bias, requests, strict=True):
            if request is not None and request.allowed_token_ids:
                row[:] = -np.inf
                row[list(request.allowed_token_ids)] = 0
            for token, value in () if request is None else request.logit_bias:
                row[token] += np.float32(value)
    if parts.bad_words is not None:
        forbidden = _forbidden(requests, parts.bad_words)
    if bias is None and forbidden is None:
        return None
    bias, forbidden = jax.device_put((bias, forbidden))
    return Constraints(bias=bias, forbidden=None if forbidden is None else Forbidden(**forbidden))


def no_recent_tokens(batch: int) -> RecentTokens:
    """Return what bad words and `min_tokens` know of B texts that have no token yet."""
    tokens = np.full((batch, MAX_BAD_WORD_TOKENS - 1), NO_TOKEN, np.int32)
    tokens, num_tokens = jax.device_put((tokens, np.zeros(batch, np.int32)))
    return RecentTokens(tokens=tokens, num_tokens=num_tokens)


def _forbidden(requests: Sequence[Request | None], capacity: tuple[int, int]) -> dict[str, np.ndarray]:
    min_tokens = np.zeros(len(requests), np.int32)
    stop_token_ids = np.full((len(requests), MAX_EARLY_STOP_TOKENS), NO_TOKEN, np.int32)
    bad_words = np.full((len(requests), *capacity), NO_TOKEN, np.int32)
    for slot, request in enumerate(requests):
        if request is not None:
            min_tokens[slot] = request.min_tokens
            stop_token_ids[slot, : len(request.early_stop_token_ids)] = request.early_stop_token_ids
            for row, word in zip(bad_words[slot], request.bad_words, strict=False):
                row[-len(word) :] = word
    return {"min_tokens": min_tokens, "stop_token_ids": stop_token_ids, "bad_words": bad_words}
