"""The loop under a drafter that knows the text: every number of accepted drafts, and what is left in the cache."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax.decoding.sampling import BatchSamplingParams
from mtpjax.decoding.speculative import DecodeState, mtp_drafter
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request
from mtpjax.engine.stack_requests import stack_requests
from mtpjax.model import Model
from mtpjax.model.cache import Cache
from tests.helpers.models import make_engine
from tests.helpers.speculation import (
    BATCH,
    MAX_MODEL_LEN,
    NUM_TOKENS,
    PROMPT_LENGTHS,
    check_figures,
    plain_texts,
    small_engine,
    small_model,
    unequal_requests,
)

# Slots are filled from the longest prompt down; every other slot is greedy.
REQUEST_OF_SLOT = sorted(range(BATCH), key=lambda i: -PROMPT_LENGTHS[i])
TEMPERATURE_OF_SLOT = (0.8, 0.0, 0.8, 0.0, 0.8)


def requests_by_slot() -> list[Request]:
    return [unequal_requests(t)[i] for i, t in zip(REQUEST_OF_SLOT, TEMPERATURE_OF_SLOT, strict=True)]


@cache
def texts_by_slot(kind: str) -> list[list[int]]:
    """Return the true continuation of each slot."""
    return [plain_texts(kind, t)[i] for i, t in zip(REQUEST_OF_SLOT, TEMPERATURE_OF_SLOT, strict=True)]


def forced_length(step: Any, slot: Any, k: int) -> Any:
    """Return how many drafts are right in a step, of numbers or of arrays: each of 0...k comes up in each slot."""
    return (7 * step + 3 * slot) % (k + 1)


@cache
def forcing_engine(kind: str, num_speculative_tokens: int) -> Engine:
    """Return an engine whose drafter proposes `forced_length` true tokens and wrong ones after them.

    The MTP head drafts, too, and its provisional keys and values stay in its cache for `sync_mtp_cache` to replace.
    """
    texts = np.array(texts_by_slot(kind))

    def drafter(
        model: Model, state: DecodeState, sampling_params: BatchSamplingParams, k: int, vocab_size: int
    ) -> tuple[jax.Array, Cache]:
        _, cache = mtp_drafter(model, state, sampling_params, k, vocab_size)
        num_right = forced_length(state.num_steps, jnp.arange(BATCH), k)[:, None]
        ahead = state.num_tokens[:, None] + jnp.arange(k)
        true = jnp.take_along_axis(jnp.asarray(texts), ahead, axis=1, mode="fill", fill_value=0)
        return jnp.where(jnp.arange(k) < num_right, true, (true + 1) % vocab_size), cache

    return make_engine(
        small_model(kind), num_speculative_tokens=num_speculative_tokens, max_model_len=MAX_MODEL_LEN, drafter=drafter
    )


def forced_figures(slot: int, k: int) -> tuple[int, list[int]]:
    """Return the steps until `NUM_TOKENS` tokens, and how often each draft position is accepted in them."""
    num_steps, num_tokens, accepted = 0, 0, np.zeros(k, int)
    while num_tokens < NUM_TOKENS:
        num_right = forced_length(num_steps, slot, k)
        accepted += np.arange(k) < num_right
        num_tokens += num_right + 1
        num_steps += 1
    return num_steps, accepted.tolist()


@pytest.mark.parametrize(("kind", "num_speculative_tokens"), [("moe", 4), ("dense", 8)])
def test_any_number_of_accepted_drafts_gives_the_text_of_plain_decoding(kind: str, num_speculative_tokens: int) -> None:
    """Every number 0...k in every slot, in changing order, and exactly these figures."""
    states = forcing_engine(kind, num_speculative_tokens).run(requests_by_slot(), BATCH)
    for slot, state in enumerate(states):
        assert state.tokens == texts_by_slot(kind)[slot][:NUM_TOKENS]
        figures = state.num_steps, state.num_accepted_tokens_per_pos
        assert figures == forced_figures(slot, num_speculative_tokens)
        check_figures(state, num_speculative_tokens)


def state_after_prompts(engine: Engine, requests: list[Request], finished: list[bool]) -> DecodeState:
    """Return the state before the first step, on the host."""
    cache, hidden, _ = engine.runner.prefill([r.prompt_token_ids[:-1] for r in requests])
    zeros = jnp.zeros(BATCH, jnp.int32)
    state = DecodeState(
        cache=cache,
        hidden=hidden,
        token=jnp.array([r.prompt_token_ids[-1] for r in requests], jnp.int32),
        num_tokens=zeros,
        finished=jnp.array(finished),
        stopped=jnp.zeros(BATCH, bool),
        num_steps=zeros,
        num_accepted_per_pos=jnp.zeros((BATCH, engine.runner.num_speculative_tokens), jnp.int32),
    )
    return jax.tree.map(np.array, state)


def run_steps(engine: Engine, state: DecodeState, requests: list[Request]) -> tuple[DecodeState, list[list[int]]]:
    """Run the loop once, with the program of the engine: the state after it on the host, and the new tokens."""
    on_device = jax.tree.map(jnp.array, state)  # copies: the loop takes over the memory of its argument
    after, tokens, counts, _ = engine.runner.decode(on_device, stack_requests(requests), BATCH)
    new_tokens = [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
    return jax.tree.map(np.array, after), new_tokens


def test_the_cache_after_forced_acceptance_is_that_of_reading_the_text() -> None:
    """State, convolution inputs, keys and values, those of the MTP head included: rejected rows have left no trace."""
    engine, requests, texts = forcing_engine("moe", 4), requests_by_slot(), texts_by_slot("moe")
    state, new_tokens = run_steps(engine, state_after_prompts(engine, requests, [False] * BATCH), requests)
    assert all(tokens == text[: len(tokens)] for tokens, text in zip(new_tokens, texts, strict=True))
    assert not any(state.finished) and len({len(tokens) for tokens in new_tokens}) > 1
    # The last token is sampled but not in the cache.
    read = [(*request.prompt_token_ids, *tokens[:-1]) for request, tokens in zip(requests, new_tokens, strict=True)]
    cache, hidden, _ = engine.runner.prefill(read)
    assert state.cache.length.tolist() == cache.length.tolist() == [len(text) for text in read]
    assert float(np.abs(state.hidden - hidden).max()) <= 1e-4
    for name in ("state", "conv"):
        assert float(np.abs(getattr(state.cache, name) - getattr(cache, name)).max()) <= 2e-5, name
    # The next draft adds the MTP head's last keys and values.
    for name, missing in (("k", 0), ("v", 0), ("mtp_k", 1), ("mtp_v", 1)):
        for slot, text in enumerate(read):
            a, b = (np.asarray(getattr(c, name))[:, slot, :, : len(text) - missing] for c in (state.cache, cache))
            assert float(np.abs(a - b).max()) <= 1e-4, name  # rounding: few rows take all experts, many take windows


def test_an_inactive_slot_keeps_every_bit() -> None:
    """While the other slots advance. Activated again, it continues as if nothing had been."""
    engine, requests, texts = small_engine("moe", 3), requests_by_slot(), texts_by_slot("moe")
    inactive = [False, True, False, True, False]
    before = state_after_prompts(engine, requests, inactive)
    after, new_tokens = run_steps(engine, before, requests)
    assert [tokens == [] for tokens in new_tokens] == inactive
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    changed = {slot: 0 for slot in range(BATCH)}
    for (path, a), b in leaves:
        batch_axis = int(a.ndim > 2)  # [layer, batch, ...] in the cache, [batch, ...] elsewhere
        for slot in range(BATCH):
            if not np.array_equal(a.take(slot, batch_axis), b.take(slot, batch_axis)):
                assert not inactive[slot], jax.tree_util.keystr(path)
                changed[slot] += 1
    assert all(changed[slot] >= 10 for slot in range(BATCH) if not inactive[slot])
    _, new_tokens = run_steps(engine, after.replace(finished=np.zeros(BATCH, bool)), requests)
    for slot in (1, 3):
        num_new = len(new_tokens[slot])
        assert new_tokens[slot] == texts[slot][:num_new] and num_new >= engine.runner.max_steps_per_call
