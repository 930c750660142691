"""The threshold of top-k and top-p, for each implementation: the tokens at or above it are those of a sort.

The Triton kernels are interpreted where there is no NVIDIA GPU, and compiled where there is one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.platform import interpret_kernels, override_platform
from kernels_pallas.top_k_top_p import reference, top_k_top_p_threshold, triton
from kernels_pallas.top_k_top_p.shapes import SHAPES
from mtpjax.decoding.sampling import sample
from tests.helpers.distributions import (
    batch_sampling_params,
    kept_at_least_and_at_most,
    logit_values,
    truncation_params,
)

TEMPERATURE = 0.7
SMALL_VOCAB, LARGE_VOCAB = 6_000, 2 * triton.TILE_SIZE + 2_000  # whole tiles and an incomplete one
SETTINGS = [(20, 0.95), (0, 0.9), (1, 1.0), (300, 1.0), (2_000, 0.5), (0, 1.0), (10**6, 1.0)]

_threshold = jax.jit(top_k_top_p_threshold, static_argnames="implementation")


def threshold(
    implementation: str, logits: np.ndarray, top_k: int, top_p: float, temperature: float = TEMPERATURE
) -> np.ndarray:
    """Return the threshold of each row under settings that all rows share."""
    rows = len(logits)
    per_row = (
        np.full(rows, temperature, np.float32), np.full(rows, top_k, np.int32), np.full(rows, top_p, np.float32)
    )  # fmt: skip
    return np.asarray(_threshold(logits, logits.max(-1), *per_row, implementation=implementation))


def few_likely(vocab: int) -> np.ndarray:
    """Rows like those of a language model: a few likely tokens, many of them neighbours."""
    logits = np.random.default_rng(0).normal(size=(3, vocab)).astype(np.float32) * 2
    logits[:, 300:340] += 9
    return logits


def nearly_uniform(vocab: int) -> np.ndarray:
    """Rows with so many tokens of nearly one probability that no list of a tile holds all kept ones."""
    return np.random.default_rng(1).normal(size=(2, vocab)).astype(np.float32) / 50


def few_values(vocab: int) -> np.ndarray:
    """Rows whose tokens have one of nine logits."""
    return np.random.default_rng(2).integers(0, 9, (2, vocab)).astype(np.float32) / 4


@pytest.fixture(params=["xla", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


class TestThreshold:
    @pytest.mark.fast
    def test_tokens_at_or_above_it_are_those_of_a_sort(self, implementation: str) -> None:
        @settings(max_examples=60, deadline=None)
        @given(
            st.lists(logit_values, min_size=40, max_size=40),
            st.sampled_from([0.3, 0.7, 1.0, 2.0]),
            st.integers(0, 50),
            st.sampled_from([0.01, 0.1, 0.5, 0.8, 0.95, 1.0]),
        )
        def check(values: list[float], temperature: float, top_k: int, top_p: float) -> None:
            logits = np.array([*values, -np.inf], np.float32)  # the last id does not exist
            found = threshold(implementation, logits[None], top_k, top_p, temperature)[0]
            kept = (logits >= found) & (logits > -np.inf)
            at_least, at_most = kept_at_least_and_at_most(logits, temperature, top_k, top_p)
            assert (kept >= at_least)[:-1].all() and (kept <= at_most)[:-1].all(), (at_least, kept, at_most)

        check()

    @pytest.mark.parametrize(("top_k", "top_p"), SETTINGS)
    @pytest.mark.parametrize("make", [few_likely, nearly_uniform, few_values])
    def test_a_large_vocabulary_has_the_threshold_of_a_sort(self, implementation: str, make, top_k, top_p) -> None:
        """For "triton": lists of the tiles that are long enough, and rows that have to be read again."""
        logits = make(LARGE_VOCAB)
        for row, found in zip(logits, threshold(implementation, logits, top_k, top_p), strict=True):
            kept = row >= found
            at_least, at_most = kept_at_least_and_at_most(row, TEMPERATURE, top_k, top_p)
            # In float32 the many small probabilities of a nearly uniform row add up to a little more or less.
            slack = 1e-3 * at_least.sum() if top_p < 1 else 0
            assert (at_least & ~kept).sum() <= slack and (kept & ~at_most).sum() <= slack

    def test_a_row_does_not_depend_on_the_others(self, implementation: str) -> None:
        logits = np.concatenate([few_likely(SMALL_VOCAB), nearly_uniform(SMALL_VOCAB)])
        together = threshold(implementation, logits, 0, 0.9)
        for i in range(len(logits)):
            assert threshold(implementation, logits[i : i + 1], 0, 0.9)[0] == together[i]

    @pytest.mark.fast
    def test_each_row_has_its_own_settings(self, implementation: str) -> None:
        logits = np.repeat(few_likely(SMALL_VOCAB)[:1], 4, axis=0)
        each = [(0, 1.0), (3, 1.0), (0, 0.9), (20, 0.6)]
        top_k, top_p = np.array([k for k, _ in each], np.int32), np.array([p for _, p in each], np.float32)
        temperature = np.full(4, TEMPERATURE, np.float32)
        found = np.asarray(_threshold(logits, logits.max(-1), temperature, top_k, top_p, implementation=implementation))
        assert found.tolist() == [threshold(implementation, logits[:1], k, p)[0] for k, p in each]
        assert found[0] <= logits.min() and len(set(found.tolist())) == 4

    def test_the_published_vocabulary(self, implementation: str) -> None:
        rows, vocab = SHAPES["draft"]
        logits = np.random.default_rng(4).normal(size=(rows, vocab)).astype(np.float32) * 3
        assert (logits >= threshold(implementation, logits, 20, 1.0)[:, None]).sum() == 20


@pytest.mark.parametrize("make", [few_likely, nearly_uniform, few_values])
def test_implementations_find_the_same_threshold(make) -> None:
    """Where all tokens are kept, the kernel may say -inf instead of the smallest logit."""
    logits = make(LARGE_VOCAB)
    for top_k, top_p in SETTINGS:
        a, b = (np.maximum(threshold(name, logits, top_k, top_p), logits.min(-1)) for name in ("xla", "triton"))
        differing = [int(((row >= x) != (row >= y)).sum()) for row, x, y in zip(logits, a, b, strict=True)]
        kept = [int((row >= x).sum()) for row, x in zip(logits, a, strict=True)]
        assert all(d <= (1e-3 * k if top_p < 1 else 0) for d, k in zip(differing, kept, strict=True)), differing


@pytest.mark.fast
def test_sortable_numbers_have_the_order_of_the_floats_and_can_be_inverted() -> None:
    values = np.array([-np.inf, -3e38, -1.5, -1e-37, 0.0, 1e-37, 0.5, 0.5000001, 3e38, np.inf], np.float32)
    numbers = np.asarray(reference.to_sortable_uint(jnp.asarray(values)))
    assert (np.diff(numbers.astype(np.int64)) > 0).all() and numbers[0] == reference.SORTABLE_MINUS_INF
    assert np.array_equal(reference.from_sortable_uint(jnp.asarray(numbers)), values)
    assert reference.to_sortable_uint(jnp.float32(-0.0)) == reference.to_sortable_uint(jnp.float32(0.0))
    assert reference.from_sortable_uint(jnp.uint32(0)) == -jnp.inf


@pytest.mark.fast
def test_the_kernels_refuse_other_dtypes() -> None:
    row = jnp.ones(2)
    args = (jnp.zeros((2, 8), jnp.bfloat16), row, row, jnp.ones(2, jnp.int32), row)
    with pytest.raises(ValueError, match="need float32 logits, not bfloat16"):
        top_k_top_p_threshold(*args, implementation="triton")


def test_a_gpu_samples_the_tokens_that_a_cpu_samples() -> None:
    """All rows of all requests in one call of the kernels, and a row at a time in plain JAX."""
    logits = np.random.default_rng(5).normal(size=(3, 4, 700)).astype(np.float32) * 3
    positions = jnp.arange(12).reshape(3, 4)
    params = batch_sampling_params(3, 0.8, truncation=truncation_params(3, 30, 0.9, 0.01))
    tokens, interpret = {}, interpret_kernels()
    for name in ("cpu", "cuda"):
        with override_platform(name, interpret=interpret):
            traced = jax.jit(lambda logits: sample(logits, positions, params, 690)).trace(logits)
            assert ("sampling_list" in str(traced.jaxpr)) == (name == "cuda")
            tokens[name] = np.asarray(traced.lower().compile()(logits))
    assert np.array_equal(tokens["cpu"], tokens["cuda"])
    assert tokens["cpu"].max() < 690 and len(set(tokens["cpu"].flatten().tolist())) > 6
