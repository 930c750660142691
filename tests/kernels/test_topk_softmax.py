"""`topk_softmax`: both implementations against the definition in float64, and its place in the model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.quantize import quantize
from kernels_pallas.matmul import linears_split_k
from kernels_pallas.matmul.triton import DECODE_ROWS
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import override_platform
from kernels_pallas.topk_softmax import topk_softmax
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax.model import moe
from mtpjax.model.params import ParamFactory
from tests.helpers.models import tiny_config

Op = Callable[..., Any]


@pytest.fixture(params=["xla", "triton"])
def op(request: pytest.FixtureRequest) -> Op:
    """The op in one implementation, jitted."""
    return jax.jit(partial(topk_softmax, implementation=request.param), static_argnames=("k", "dtype"))


def random_rows(rows: int, experts: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.normal(size=(rows, 512)), dtype), jnp.asarray(rng.normal(size=(experts, 512)) / 12, dtype)


def choose(op: Op, logits: PartialSums, k: int, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and ids of the chosen experts."""
    rows = logits.parts.shape[1]
    hidden = PartialSums(jnp.zeros((1, rows, 8)))
    choice = op(
        logits, hidden, hidden, jnp.asarray(np.ones(rows, bool) if valid is None else valid), k=k, dtype="float32"
    )
    return np.asarray(choice[0]), np.asarray(choice[1])


class TestTopkSoftmax:
    @pytest.mark.parametrize(("rows", "experts", "k"), [(1, 256, 8), (5, 256, 8), (64, 60, 10), (3, 8, 1)])
    def test_the_largest_probabilities_come_in_order(self, op: Op, rows: int, experts: int, k: int) -> None:
        x, router = random_rows(rows, experts, "float32")
        logits = np.asarray(x, np.float64) @ np.asarray(router, np.float64).T
        halves = jnp.asarray(np.stack([logits / 2, logits - logits / 2]), jnp.float32)
        weights, ids = choose(op, PartialSums(halves), k)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        expected = np.argsort(-p, axis=1, kind="stable")[:, :k]
        assert (ids == expected).all() and ids.dtype == np.int32
        best = np.take_along_axis(p, expected, axis=1)
        np.testing.assert_allclose(weights, best / best.sum(axis=1, keepdims=True), rtol=1e-5)

    def test_of_equal_experts_the_first_is_chosen(self, op: Op) -> None:
        """Experts 3, 5 and 6 are equal, and all others are. An invalid row gets the id that no expert has."""
        logits = np.zeros((1, 3, 8), np.float32)
        logits[..., [3, 5, 6]] = 2
        weights, ids = choose(op, PartialSums(jnp.asarray(logits)), 5, np.array([True, False, True]))
        assert ids.tolist() == [[3, 5, 6, 0, 1], [8] * 5, [3, 5, 6, 0, 1]]
        assert (weights[0, 0] == weights[0, 2]) and (weights[0, 3] == weights[0, 4])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_shared_expert_is_activated(self, op: Op, dtype: str) -> None:
        """Its size is no power of two, and it has another number of partial sums than the logits."""
        rng = np.random.default_rng(0)
        gate, up = (jnp.asarray(rng.normal(size=(parts, 5, 96)), jnp.float32) for parts in (1, 4))
        logits = PartialSums(jnp.zeros((2, 5, 16)))
        hidden = op(logits, PartialSums(gate), PartialSums(up), jnp.ones(5, bool), k=2, dtype=dtype)[2]
        wide_gate, wide_up = (np.float64(parts).sum(0) for parts in (gate, up))
        assert hidden.dtype == dtype
        rtol = 1e-5 if dtype == "float32" else 1e-2
        expected = wide_gate / (1 + np.exp(-wide_gate)) * wide_up
        np.testing.assert_allclose(np.float64(hidden), expected, rtol=rtol, atol=1e-6)


def test_a_row_is_invariant_to_the_batch_bit_for_bit() -> None:
    """The kernel, behind the kernel of the logits; also if a call has so many rows that one program adds all splits."""
    op = jax.jit(partial(topk_softmax, implementation="triton"), static_argnames=("k", "dtype"))
    x, router = random_rows(2 * DECODE_ROWS, 256, "bfloat16")

    def route(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        [logits] = linears_split_k(x, router, out_dtypes=[jnp.float32], implementation="triton")
        return choose(op, logits, 8)

    whole = route(x)
    for rows in (slice(0, 1), slice(7, 12), slice(20, 21 + DECODE_ROWS)):
        for actual, expected in zip(route(x[rows]), whole, strict=True):
            assert (actual == expected[rows]).all()


def test_a_packed_layer_computes_the_same_with_its_kernels() -> None:
    cfg, rng = tiny_config(moe=True, hidden_size=64), np.random.default_rng(0)
    layer = moe.Moe(cfg, ParamFactory(jnp.dtype("float32"), layer_axis=False))
    nnx.update(layer, jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), nnx.state(layer)))
    x, valid = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.float32), jnp.asarray(rng.random((2, 5)) < 0.8)
    for matrix in ("gate", "up"):
        packed = quantize(np.asarray(getattr(layer.shared, matrix)[...]), "int8")
        weight = QuantizedTensor(jnp.asarray(packed.codes), jnp.asarray(packed.scale), None, "codes8", packed.group)
        setattr(layer.shared, matrix, getattr(layer.shared, matrix).replace(weight))
    expected = layer(x, 0, valid, "xla").sum(x.dtype)
    with override_platform("cuda", interpret=True):
        traced = str(jax.make_jaxpr(lambda x: layer(x, 0, valid).sum(x.dtype))(x))
        actual = layer(x, 0, valid).sum(x.dtype)
    assert "choose_experts" in traced and "matmul_plain_codes8" in traced  # names of kernels
    np.testing.assert_allclose(actual.reshape(expected.shape), expected, atol=1e-5)
