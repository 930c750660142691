"""Log-probabilities of rows: against float64, and the same bits among any number of other rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.platform import override_platform
from mtpjax.decoding import logprobs
from mtpjax.decoding.logprobs import PROCESSED, RAW, LogprobsSpec, TokenLogprobs, token_logprobs, window_logprobs
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams, TruncationParams

PADDED, VOCAB, NUM_TOP = 1100, 1000, 5
ROWS = (1, 2, 3, 5, 8, 17, 24, 36)


def rows_of_logits(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    sharpness = np.linspace(1, 6, num_rows)[:, None]
    logits = (sharpness * rng.normal(size=(num_rows, PADDED))).astype(np.float32)
    logits[:, VOCAB:] = 50  # ids that do not exist
    tokens = np.where(np.arange(num_rows) % 2, logits[:, :VOCAB].argmax(1), rng.integers(0, VOCAB, num_rows))
    return logits, tokens.astype(np.int32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-softmax of the ids that exist, float64."""
    x = logits.astype(np.float64)[..., :VOCAB]
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compute(logits: np.ndarray, tokens: np.ndarray) -> TokenLogprobs:
    found = jax.jit(lambda x, t: token_logprobs(x, t, NUM_TOP, VOCAB))(logits, tokens)
    return TokenLogprobs(*map(np.asarray, found))


def rows_that_differ() -> list[int]:
    """Return the numbers of rows among which the first rows have other bits than among all."""
    logits, tokens = rows_of_logits(max(ROWS))
    whole = compute(logits, tokens)
    parts = {n: compute(logits[:n], tokens[:n]) for n in ROWS}
    return [
        n for n, part in parts.items() if not all(np.array_equal(a, b[:n]) for a, b in zip(part, whole, strict=True))
    ]


def test_they_are_those_of_float64() -> None:
    logits, tokens = rows_of_logits(12)
    found, expected = compute(logits, tokens), log_softmax(logits)
    chosen = np.take_along_axis(expected, tokens[:, None], 1)
    np.testing.assert_allclose(found.chosen, chosen[:, 0], atol=1e-5)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :NUM_TOP]
    assert np.array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(expected, order, 1), atol=1e-5)
    assert np.array_equal(found.rank, 1 + (expected > chosen).sum(1))


def test_of_equally_probable_tokens_the_lower_id_comes_first() -> None:
    logits = np.zeros((3, PADDED), np.float32)
    logits[:, 700:] = 1
    found = compute(logits, np.array([700, 704, 2], np.int32))
    assert found.rank.tolist() == [1, 5, 303] and found.top_ids[0].tolist() == [700, 701, 702, 703, 704]


def test_a_row_has_the_same_bits_among_any_number_of_rows() -> None:
    assert rows_that_differ() == []


def test_a_sum_whose_order_follows_the_number_of_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA may begin anywhere; here at a place that the number of rows says."""

    def sum_features(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.roll(x, 31 * len(x), axis=1), axis=1, keepdims=True)

    monkeypatch.setattr(logprobs, "sum_features", sum_features)
    assert rows_that_differ() != []


def sampling(temperature: list[float], top_k: list[int], top_p: list[float], min_p: list[float]) -> BatchSamplingParams:
    batch = len(temperature)
    return BatchSamplingParams(
        max_tokens=jnp.full(batch, 9),
        temperature=jnp.array(temperature, jnp.float32),
        seed=jnp.arange(batch, dtype=jnp.uint32),
        stop_token_ids=jnp.full((batch, MAX_STOP_TOKENS), -1),
        truncation=TruncationParams(jnp.array(top_k), jnp.array(top_p, jnp.float32), jnp.array(min_p, jnp.float32)),
    )


SETTINGS = ([0.0, 0.7, 1.3, 1.0], [5, 7, 0, 0], [0.5, 1.0, 0.8, 1.0], [0.2, 0.0, 0.0, 0.05])


def window(mode: str) -> tuple[np.ndarray, np.ndarray, TokenLogprobs]:
    """Return raw logits `[4, 3, V]`, processed logits, and the log-probabilities of their likeliest tokens."""
    raw = rows_of_logits(12)[0].reshape(4, 3, PADDED)
    processed = raw + np.float32(0.5) * (np.arange(PADDED) % 3 == 0)
    tokens = processed[..., :VOCAB].argmax(-1).astype(np.int32)
    spec, params = LogprobsSpec(NUM_TOP, mode), sampling(*SETTINGS)
    step = jax.jit(lambda raw, processed, tokens: window_logprobs(spec, raw, processed, tokens, params, VOCAB))
    return raw, processed, TokenLogprobs(*map(np.asarray, step(raw, processed, tokens)))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_raw_ones_are_before_processors_and_temperature(platform: str) -> None:
    with override_platform(platform):
        raw, _, found = window(RAW)
    expected = log_softmax(raw)
    np.testing.assert_allclose(found.top, -np.sort(-expected, axis=-1)[..., :NUM_TOP], atol=1e-5)


def test_processed_ones_are_those_of_the_processors_of_transformers() -> None:
    """A greedy request has temperature 1 and all tokens, as in vLLM."""
    process = pytest.importorskip("transformers.generation.logits_process", reason="compares with transformers")
    torch = pytest.importorskip("torch", reason="compares with transformers")
    _, processed, found = window(PROCESSED)
    for b, (temperature, top_k, top_p, min_p) in enumerate(zip(*SETTINGS, strict=True)):
        processors: list[Callable[..., object]] = []
        if temperature:
            processors.append(process.TemperatureLogitsWarper(temperature))
            if top_k > 0:
                processors.append(process.TopKLogitsWarper(top_k))
            if top_p < 1:
                processors.append(process.TopPLogitsWarper(top_p))
            if min_p > 0:
                processors.append(process.MinPLogitsWarper(min_p))
        scores = torch.tensor(processed[b, :, :VOCAB].astype(np.float64))
        for processor in processors:
            scores = processor(None, scores)
        expected = torch.log_softmax(scores, -1).numpy()
        np.testing.assert_allclose(found.top[b], -np.sort(-expected, axis=-1)[:, :NUM_TOP], atol=1e-5)
        kept = found.top_ids[b][np.isfinite(found.top[b])]
        assert len(kept) and np.isfinite(np.take_along_axis(expected, found.top_ids[b], 1)).sum() == len(kept)
