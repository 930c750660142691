"""What tests of sampling share: batches of parameters, which tokens truncation keeps, and a chi-square test."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.scipy.stats import chi2

from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams, TruncationParams

TEMPERATURE = 0.8
LOGITS = np.array([1.5, 0.3, -0.7, 2.0, 0.0, -2.5, 1.1, 0.9, -0.2, 1.9, 0.5, -1.0], np.float32)

# p-values of a claim about a distribution: above the first it stands, below the second it is refuted.
PLAUSIBLE, REFUTED = 1e-3, 1e-9
PROBABILITY_ERROR = 1e-5  # float32's error in a sum of probabilities, generously

# Logits full of ties, and logits that have different probabilities in float64, too.
logit_values = st.integers(-12, 12).map(lambda i: i / 4) | st.floats(-20, 20, width=16)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def chi_square_p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Return the probability of counts at least as far from `p` (Pearson's test).

    Rare cells, with fewer than 5 counts expected, are merged into one. Counts in a cell of probability 0 fail the test.
    """
    counts, expected = counts.ravel().astype(float), p.ravel() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    possible = expected > 0
    assert not counts[~possible].any()
    counts, expected = counts[possible], expected[possible]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(chi2.sf(statistic, len(counts) - 1))


def batch_sampling_params(
    batch: int, temperature: float, *, seed: int = 0, truncation: TruncationParams | None = None
) -> BatchSamplingParams:
    """Make parameters of `batch` requests with seeds `seed`, `seed + 1`, ... and no stop tokens."""
    return BatchSamplingParams(
        max_tokens=jnp.full(batch, 99),
        temperature=jnp.full(batch, temperature, jnp.float32),
        seed=jnp.arange(batch, dtype=jnp.uint32) + jnp.uint32(seed),
        stop_token_ids=jnp.full((batch, MAX_STOP_TOKENS), -1),
        truncation=truncation,
    )


def truncation_params(batch: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> TruncationParams:
    """Make parameters that `batch` requests share."""
    return TruncationParams(
        jnp.full(batch, top_k), jnp.full(batch, top_p, jnp.float32), jnp.full(batch, min_p, jnp.float32)
    )


def kept_by_sorting(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Return which tokens of a row top-k, top-p and min-p keep, by sorting probabilities in float64."""
    p = softmax(logits.astype(np.float64) / (temperature or 1))
    kept = p >= np.sort(p)[::-1][min(top_k or len(p), len(p)) - 1]
    p = np.where(kept, p, 0) / p[kept].sum()
    if top_p < 1:
        descending = np.argsort(-p, kind="stable")
        last = int(np.argmax(np.cumsum(p[descending]) >= top_p - PROBABILITY_ERROR))
        kept &= p >= p[descending[last]]
    return kept & (p >= min_p * p.max() * (1 - PROBABILITY_ERROR))


def kept_at_least_and_at_most(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens float32 must keep, and which it may keep, in view of its errors in probabilities."""
    error = 3 * PROBABILITY_ERROR
    smaller_p, larger_p = (top_p - error, top_p + error) if top_p < 1 else (1.0, 1.0)
    at_least = kept_by_sorting(logits, temperature, top_k, smaller_p, min(min_p * (1 + error), 1))
    return at_least, kept_by_sorting(logits, temperature, top_k, larger_p, min_p * (1 - error))
