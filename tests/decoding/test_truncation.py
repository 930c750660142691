"""Top-k, top-p and min-p: the tokens that are kept are those of a sort, and the loop samples from no others."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.top_k_top_p.shapes import QWEN_VOCAB
from mtpjax import LLM, SamplingParams
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.sampling import apply_top_k_top_p_min_p, sample
from mtpjax.engine.request import Request
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.distributions import (
    LOGITS,
    PLAUSIBLE,
    REFUTED,
    TEMPERATURE,
    batch_sampling_params,
    chi_square_p_value,
    kept_at_least_and_at_most,
    kept_by_sorting,
    logit_values,
    softmax,
    truncation_params,
)
from tests.helpers.models import make_engine, numpy_model, tiny_config

VOCAB, NUM_TOKENS, MAX_MODEL_LEN = 96, 60, 120

truncate = jax.jit(apply_top_k_top_p_min_p)


@pytest.mark.fast
@settings(max_examples=150, deadline=None)
@given(
    st.lists(logit_values, min_size=40, max_size=40),
    st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
    st.integers(0, 50),
    st.sampled_from([0.01, 0.1, 0.5, 0.8, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_kept_tokens_are_those_of_a_sort(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.array(values, np.float32)
    truncated = truncate(logits[None], jnp.full(1, temperature), truncation_params(1, top_k, top_p, min_p))[0]
    kept = np.isfinite(truncated)
    at_least, at_most = kept_at_least_and_at_most(logits, temperature, top_k, top_p, min_p)
    assert (kept >= at_least).all() and (kept <= at_most).all(), (at_least, kept, at_most)
    assert kept[logits.argmax()] and np.array_equal(truncated[kept], logits[kept])


@pytest.mark.fast
@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}])
def test_equal_logits_are_kept_together(how: dict[str, Any]) -> None:
    """Both zeros are one logit."""
    logits = jnp.array([[-1.0, 0.0, -0.0, -2.0, 0.0]])
    kept = np.isfinite(truncate(logits, jnp.ones(1), truncation_params(1, **how)))
    assert kept.tolist() == [[False, True, True, False, True]]


def test_a_published_vocabulary_is_truncated_as_by_a_sort() -> None:
    logits = np.random.default_rng(0).normal(size=(3, QWEN_VOCAB)).astype(np.float32) * 3
    for how in ((20, 1.0, 0.0), (0, 0.95, 0.0), (50, 0.8, 0.01), (0, 0.3, 0.0)):
        kept = np.isfinite(truncate(logits, jnp.full(3, 0.7), truncation_params(3, *how)))
        for row, kept_of_row in zip(logits, kept, strict=True):
            want = int(kept_by_sorting(row, 0.7, *how).sum())
            assert abs(want - int(kept_of_row.sum())) <= 1e-3 * want, how
            assert kept_of_row.sum() == 20 or how[0] != 20


@pytest.mark.parametrize(
    "how", [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.4}, {"top_k": 6, "top_p": 0.9, "min_p": 0.2}]
)
def test_tokens_follow_the_softmax_of_the_kept_ones(how: dict[str, Any]) -> None:
    num_requests, vocab = 20_000, len(LOGITS)
    params = batch_sampling_params(num_requests, TEMPERATURE, truncation=truncation_params(num_requests, **how))
    logits = jnp.broadcast_to(LOGITS, (num_requests, 1, vocab))
    tokens = np.asarray(sample(logits, jnp.full((num_requests, 1), 5), params, vocab))[:, 0]
    counts, kept = np.bincount(tokens, minlength=vocab), kept_by_sorting(LOGITS, TEMPERATURE, **how)
    assert 1 < kept.sum() < vocab
    assert chi_square_p_value(counts, softmax(np.where(kept, LOGITS / TEMPERATURE, -np.inf))) > PLAUSIBLE
    assert chi_square_p_value(np.where(kept, counts, 0), softmax(LOGITS / TEMPERATURE)) < REFUTED


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return numpy_model(tiny_config(moe=False, num_superblocks=1, vocab_size=VOCAB), seed=7, scale=0.15)


def mixed_requests() -> list[Request]:
    """Requests that sample from all tokens, from few, from a share, greedily, and with every condition at once."""
    rng = np.random.default_rng(3)
    how: tuple[dict[str, Any], ...] = (
        {}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.0, "top_k": 2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1},
    )  # fmt: skip
    return [
        Request(
            i, tuple(rng.integers(0, VOCAB, 4 + 5 * i).tolist()), NUM_TOKENS, seed=50 + i, **{"temperature": 0.9} | h
        )
        for i, h in enumerate(how)
    ]


def test_the_text_is_the_same_at_any_draft_length_and_batch(model: LoadedModel) -> None:
    """One program serves requests that keep all tokens and those that do not; each token is among the kept ones."""
    requests = mixed_requests()
    plain = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_MODEL_LEN)
    want = [state.tokens for state in plain.run(requests, 5)]
    untruncated = [replace(r, top_k=0, top_p=1.0, min_p=0.0) for r in requests]
    assert [state.tokens for state in plain.run(untruncated, 5)] != want
    num_programs = plain.num_programs
    assert plain.run([replace(requests[0], top_k=1)] + requests[1:], 5)[0].tokens != want[0]
    assert plain.num_programs == num_programs

    for num_speculative_tokens, num_slots in ((3, 5), (1, 2)):
        engine = make_engine(model, num_speculative_tokens=num_speculative_tokens, max_model_len=MAX_MODEL_LEN)
        states = engine.run(requests, num_slots)
        assert [s.tokens for s in states] == want
        assert 0 < sum(s.num_accepted_tokens_per_pos[0] for s in states) < sum(s.num_steps for s in states)

    texts = [r.prompt_token_ids + tuple(tokens) for r, tokens in zip(requests, want, strict=True)]
    chunks = plain.runner.prefill(texts, OutputRows.all(), return_logits=True)[2]
    logits = np.concatenate(chunks, axis=1)  # padded in front
    for request, text, rows in zip(requests, texts, logits, strict=True):
        for position in range(len(request.prompt_token_ids), len(text)):
            row = rows[position - len(text) - 1]
            kept = kept_by_sorting(row, request.temperature, request.top_k, request.top_p, request.min_p)
            assert kept[text[position]]


def test_a_single_kept_token_is_the_greedy_choice(model: LoadedModel) -> None:
    llm = LLM(model, num_speculative_tokens=2, max_model_len=64, prefill_buckets=(16,))
    sampled: dict[str, Any] = {"max_tokens": 12, "temperature": 2.0, "seed": 4, "ignore_eos": True}
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)
    single = [SamplingParams(**sampled, **how) for how in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})]
    params = [greedy, *single, SamplingParams(**sampled, top_k=-1)]
    want, *others, from_all = (out.token_ids for out in llm.generate([[3, 1, 4]] * 5, params))
    assert others == [want] * 3 and from_all != want
