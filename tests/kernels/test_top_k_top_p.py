"""The kernels of top-k and top-p, interpreted, against sorting and the plain `lax` of the CPU path."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.top_k_top_p import KERNELS, top_k_top_p_threshold, triton
from mtpjax.decoding import sampling
from tests.decoding.test_sampling import asked
from tests.decoding.test_truncation import SHARE, kept, numbers, sorted_out

HEAT = 0.7
kernel = jax.jit(partial(triton.top_k_top_p_threshold, interpret=True))


def least(find, logits: np.ndarray, heat, top_k, top_p) -> np.ndarray:
    rows = len(logits)
    full = (np.full(rows, heat, np.float32), np.full(rows, top_k, np.int32), np.full(rows, top_p, np.float32))
    return np.asarray(find(jnp.asarray(logits), jnp.max(logits, axis=-1), *full))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(numbers, min_size=40, max_size=40),
    st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    st.integers(0, 50),
    st.sampled_from([0.01, 0.1, 0.5, 0.8, 0.95, 1.0]),
)
def test_what_stays_is_what_sorting_says(values, heat, top_k, top_p):
    logits = np.array([*values, -np.inf], np.float32)  # the last one: an id that does not exist
    stays = (logits >= least(kernel, logits[None], heat, top_k, top_p)) & (logits > -np.inf)
    less, more = (sorted_out(logits, heat, top_k, top_p + by if top_p < 1 else 1, 0) for by in (-3 * SHARE, 3 * SHARE))
    assert (stays >= less)[:-1].all() and (stays <= more)[:-1].all(), (less, stays, more)


def peaked(vocab: int) -> np.ndarray:
    """Rows as a language model has them: a few likely tokens, several of them neighbours."""
    logits = np.random.default_rng(0).normal(size=(3, vocab)).astype(np.float32) * 2
    logits[:, 300:340] += 9
    return logits


def flat(vocab: int) -> np.ndarray:
    """So many tokens of nearly one probability that no list holds those that stay."""
    return np.random.default_rng(1).normal(size=(2, vocab)).astype(np.float32) / 50


def level(vocab: int) -> np.ndarray:
    """All of few values."""
    return np.random.default_rng(2).integers(0, 9, (2, vocab)).astype(np.float32) / 4


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(20, 0.95), (0, 0.9), (1, 1.0), (300, 1.0), (2_000, 0.5), (0, 1.0), (10**6, 1.0)]
)
@pytest.mark.parametrize("make", [peaked, flat, level])
def test_large_vocabularies(make, top_k, top_p):
    """Whole tiles and a broken one; lists that are long enough, and rows that have to be read again."""
    logits = make(2 * triton.TILE + 2_000)
    got = least(kernel, logits, HEAT, top_k, top_p)
    want = least(jax.jit(top_k_top_p_threshold), logits, HEAT, top_k, top_p)
    for row, a, b in zip(logits, got, want, strict=True):
        inside, differ = int((row >= b).sum()), int(((row >= a) != (row >= b)).sum())
        assert differ <= (1e-3 * inside if top_p < 1 else 0), (inside, differ)


def test_a_row_does_not_depend_on_the_others():
    logits = np.concatenate([peaked(6_000), flat(6_000)])
    together = least(kernel, logits, HEAT, 0, 0.9)
    for i, row in enumerate(logits):
        assert least(kernel, row[None], HEAT, 0, 0.9)[0] == together[i]


def test_each_row_has_its_own_settings():
    logits = np.repeat(peaked(6_000)[:1], 4, axis=0)
    ways = [(0, 1.0), (3, 1.0), (0, 0.9), (20, 0.6)]
    top_k, top_p = np.array([k for k, _ in ways], np.int32), np.array([p for _, p in ways], np.float32)
    got = np.asarray(kernel(logits, logits.max(-1), np.full(4, HEAT, np.float32), top_k, top_p))
    assert [float(g) for g in got] == [float(least(kernel, logits[:1], HEAT, k, p)[0]) for k, p in ways]
    assert got[0] == -np.inf and len(set(got.tolist())) == 4


def test_the_model_chooses_the_same_tokens_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of all requests at once, as on a GPU, and a row at a time, as on a CPU."""
    logits = np.random.default_rng(5).normal(size=(3, 4, 700)).astype(np.float32) * 3
    at = jnp.arange(12).reshape(3, 4)
    requests = asked(3, 0.8).replace(kept=kept(3, 30, 0.9, 0.01))
    want = np.asarray(sampling.choose(logits, at, requests, 690))
    found = []
    monkeypatch.setattr(sampling, "platform", lambda: "cuda")
    monkeypatch.setitem(KERNELS, "cuda", lambda *args: found.append(args[0].shape) or kernel(*args))
    assert (np.asarray(sampling.choose(logits, at, requests, 690)) == want).all()
    assert found == [(12, 700)]
    assert (want < 690).all() and len(set(want.flatten().tolist())) > 6
