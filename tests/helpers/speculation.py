"""What tests of speculative decoding share: small models, five unequal requests, and the texts of plain decoding."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request, RequestState
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.models import make_engine, numpy_model, tiny_config

NUM_TOKENS = 200  # new tokens of a request
REFERENCE_TOKENS = NUM_TOKENS + 8  # of a text of plain decoding; a drafter looks ahead in it
PROMPT_LENGTHS = (34, 1, 3, 17, 31)  # of a batch; the loop reads the last token, so with chunks of 32: 2, 0, 1, 1, 1
BATCH = len(PROMPT_LENGTHS)
VOCAB = 96
MAX_MODEL_LEN = max(PROMPT_LENGTHS) + REFERENCE_TOKENS


@cache
def small_model(kind: str) -> LoadedModel:
    """Return a model with experts ("moe", four layers) or without ("dense", two layers), and an MTP head."""
    moe = kind == "moe"
    return numpy_model(tiny_config(moe=moe, num_superblocks=1 + moe, vocab_size=VOCAB), seed=7, scale=0.15)


@cache
def small_engine(kind: str, num_speculative_tokens: int) -> Engine:
    """Return the engine that tests share."""
    return make_engine(small_model(kind), num_speculative_tokens=num_speculative_tokens, max_model_len=MAX_MODEL_LEN)


def unequal_requests(temperature: float, **changes: Any) -> list[Request]:
    """Return five requests with unequal prompts and without stop tokens."""
    rng = np.random.default_rng(11)
    prompts = [tuple(rng.integers(0, VOCAB, length).tolist()) for length in PROMPT_LENGTHS]
    requests = [Request(i, prompt, NUM_TOKENS, temperature, 100 + i) for i, prompt in enumerate(prompts)]
    return [replace(request, **changes) for request in requests]


@cache
def plain_texts(kind: str, temperature: float) -> list[list[int]]:
    """Return what decoding without drafts generates for `unequal_requests`, `REFERENCE_TOKENS` tokens each."""
    requests = unequal_requests(temperature, max_tokens=REFERENCE_TOKENS)
    return [state.tokens for state in small_engine(kind, 0).run(requests, BATCH)]


def check_figures(state: RequestState, num_speculative_tokens: int) -> None:
    """Check that a step gives one token of the trunk and its accepted drafts; only the last step may be cut short."""
    accepted = state.num_accepted_tokens_per_pos
    assert len(accepted) == num_speculative_tokens and accepted == sorted(accepted, reverse=True)
    num_tokens = state.num_steps + sum(accepted)
    assert len(state.tokens) <= num_tokens <= len(state.tokens) + num_speculative_tokens
    assert all(0 <= a <= state.num_steps for a in accepted)
