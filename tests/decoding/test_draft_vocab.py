"""Drafts from a part of the vocabulary: the text is the same, drafts lie in the part, and share the trunk's noise."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from kernels_pallas.platform import override_platform
from mtpjax.decoding import steps
from mtpjax.decoding.logits_processors import TextState
from mtpjax.decoding.penalties import Penalties, TokenCounts
from mtpjax.decoding.sampling import BatchSamplingParams, TruncationParams
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request, RequestState
from mtpjax.loading.draft_head import with_draft_head
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.open_model import compute_dtype_of
from mtpjax.loading.random_init import random_model
from mtpjax.model import Model
from mtpjax.model.cache import new_cache
from scripts.benchmarks.flops import count_flops
from tests.helpers.models import make_engine, tiny_config
from tests.helpers.speculation import BATCH, MAX_MODEL_LEN, VOCAB, small_model, unequal_requests

NUM_DRAFTS = 8
HOW: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"top_k": 5, "top_p": 0.9},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.1, "temperature": 0.0},
    {"presence_penalty": 0.7, "min_p": 0.02},
)


def some_ids(count: int) -> np.ndarray:
    """Return ids of the vocabulary, ascending; a few of them far from their place in the list."""
    return np.sort(np.random.default_rng(5).permutation(VOCAB)[:count]).astype(np.int32)


def model_of(count: int | None) -> LoadedModel:
    return with_draft_head(small_model("moe"), None if count is None else some_ids(count))


def run(count: int | None, requests: Sequence[Request], num_speculative_tokens: int = 3) -> list[RequestState]:
    engine: Engine = make_engine(
        model_of(count), num_speculative_tokens=num_speculative_tokens, max_model_len=MAX_MODEL_LEN
    )
    return engine.run(requests, BATCH)


def first_drafts(states: Sequence[RequestState]) -> float:
    """Return the share of steps that accept the first draft."""
    return sum(s.num_accepted_tokens_per_pos[0] for s in states) / sum(s.num_steps for s in states)


@pytest.mark.slow
def test_the_text_is_the_same_whatever_part_drafts_come_from() -> None:
    """Greedy and sampled, with penalties and truncation, from one id to all but one."""
    requests = [replace(r, **how) for r, how in zip(unequal_requests(0.8, max_tokens=60), HOW, strict=True)]
    want = [s.tokens for s in run(None, requests, 0)]
    shares = []
    for count in (1, 40, VOCAB - 1):
        states = run(count, requests)
        assert [s.tokens for s in states] == want, count
        shares.append(first_drafts(states))
    assert shares == sorted(shares) and shares[0] < 0.1 < shares[-1]


def trace_draft(model: LoadedModel, temperature: float) -> tuple[Any, tuple[Any, ...]]:
    """Trace eight drafts for five requests, with penalties and truncation in two of them. Returns it and arguments."""
    rng = np.random.default_rng(3)
    dtype = compute_dtype_of(model)
    cache = new_cache(model.cfg, BATCH, 256, dtype=dtype).replace(length=jnp.full(BATCH, 20, jnp.int32))
    hidden = jnp.asarray(rng.normal(size=(BATCH, model.cfg.hidden_size)), dtype)
    token = jnp.asarray(rng.integers(0, VOCAB, BATCH), jnp.int32)
    some = np.arange(BATCH) >= 3

    def only_some(value: float, neutral: float) -> Array:
        return jnp.asarray(np.where(some, value, neutral), jnp.float32)

    params = BatchSamplingParams(
        max_tokens=jnp.full(BATCH, 99),
        temperature=jnp.full(BATCH, temperature, jnp.float32),
        seed=jnp.arange(BATCH, dtype=jnp.uint32),
        stop_token_ids=jnp.full((BATCH, 1), -1),
        truncation=TruncationParams(
            jnp.asarray(np.where(some, 30, 0), jnp.int32), only_some(0.95, 1), only_some(0.01, 0)
        ),
        penalties=Penalties(only_some(0.5, 0), only_some(0.25, 0), only_some(1.2, 1)),
    )
    counts = TokenCounts(
        jnp.asarray(rng.random((BATCH, VOCAB)) < 0.2), jnp.asarray(rng.integers(0, 3, (BATCH, VOCAB)), jnp.int32)
    )
    traced = jax.jit(
        lambda weights, cache: steps.draft(
            nnx.merge(model.graph, weights), hidden, token, jnp.zeros(BATCH, bool), cache, params, NUM_DRAFTS, VOCAB,
            TextState(counts),
        )[0]
    ).trace(model.params, cache)  # fmt: skip
    return traced, (model.params, cache)


def draft(model: LoadedModel, temperature: float) -> np.ndarray:
    """Return the drafts `[5, 8]`."""
    traced, arguments = trace_draft(model, temperature)
    return np.asarray(traced.lower().compile()(*arguments))


def masked_drafts(
    monkeypatch: pytest.MonkeyPatch, ids: np.ndarray, temperature: float, model: LoadedModel | None = None
) -> np.ndarray:
    """Return the drafts of the whole LM head whose other logits are -inf."""
    head = Model.head
    chosen = jnp.asarray(np.isin(np.arange(VOCAB), ids))
    with monkeypatch.context() as patch:
        patch.setattr(Model, "head", lambda self, hidden: jnp.where(chosen, head(self, hidden), -jnp.inf))
        return draft(model or small_model("moe"), temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 9, 60])
def test_drafts_are_those_of_the_whole_head_without_the_other_ids(
    monkeypatch: pytest.MonkeyPatch, count: int, temperature: float
) -> None:
    ids = some_ids(count)
    drafts = draft(model_of(count), temperature)
    assert np.isin(drafts, ids).all()
    assert (drafts == masked_drafts(monkeypatch, ids, temperature)).all()
    assert len(np.unique(drafts)) >= min(count, 5)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_gpu_drafts_with_packed_rows(monkeypatch: pytest.MonkeyPatch, quantization: str) -> None:
    """With every kernel interpreted. Rows of FP8 become bfloat16, so a draft may differ where two tokens are close."""
    ids = some_ids(40)
    cfg = tiny_config(moe=False, num_superblocks=1, hidden_size=64, vocab_size=VOCAB)
    with override_platform("cuda", (9, 0), interpret=True):
        model = random_model(cfg, quantization=quantization, scale=0.3, dtype=jnp.bfloat16)
        drafts = draft(with_draft_head(model, ids), 1.0)
        want = masked_drafts(monkeypatch, ids, 1.0, model)
    assert np.isin(drafts, ids).all()
    assert (drafts[:, 0] == want[:, 0]).all() and (drafts == want).mean() > 0.8


def forget_to_map_back(patch: pytest.MonkeyPatch) -> None:
    """Plant a bug: a draft is the number of a row of the draft head."""
    patch.setattr(Model, "draft_token_ids", property(lambda self: jnp.arange(self.draft_head.token_ids.shape[0])))


def draw_noise_by_row(patch: pytest.MonkeyPatch) -> None:
    """Plant a bug: the noise of an id is that of its row in the draft head."""
    subset: Callable[..., Any] = steps.VocabSubset
    patch.setattr(steps, "VocabSubset", lambda ids, num_logits: subset(jnp.arange(len(ids)), num_logits))


@pytest.mark.parametrize(("plant_bug", "temperature"), [(forget_to_map_back, 0.0), (draw_noise_by_row, 1.0)])
def test_drafts_show_a_planted_bug(
    monkeypatch: pytest.MonkeyPatch, plant_bug: Callable[[pytest.MonkeyPatch], None], temperature: float
) -> None:
    ids = some_ids(9)
    want = masked_drafts(monkeypatch, ids, temperature)
    plant_bug(monkeypatch)
    assert (draft(model_of(9), temperature) != want).mean() > 0.5


@pytest.mark.slow
def test_acceptance_at_temperature_1_is_that_of_shared_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the ids about half of the drafts are left; with noise of its own the drafter agrees by chance."""
    requests = unequal_requests(1.0, max_tokens=100)
    whole, half = first_drafts(run(None, requests)), first_drafts(run(VOCAB // 2, requests))
    draw_noise_by_row(monkeypatch)
    planted = first_drafts(run(VOCAB // 2, requests))
    assert 0.3 * whole < half < 0.8 * whole
    assert planted < 0.5 * half


def test_a_draft_step_has_fewer_operations() -> None:
    """For each id less, at least the products of its row, for each sequence and draft."""
    whole, part = (count_flops(trace_draft(model_of(count), 0.0)[0].jaxpr, lambda _: 1).total for count in (None, 40))
    saved = 2 * (VOCAB - 40) * small_model("moe").cfg.hidden_size * BATCH * NUM_DRAFTS
    assert saved <= whole - part < whole / 2


def test_the_number_of_programs_does_not_grow() -> None:
    engines = []
    for count in (None, 9):
        engine = make_engine(model_of(count), num_speculative_tokens=2, max_model_len=MAX_MODEL_LEN)
        for temperature in (0.0, 1.0):
            engine.run(unequal_requests(temperature, max_tokens=3), BATCH)
        engines.append(engine)
    assert engines[0].num_programs == engines[1].num_programs
