"""Residual sums and norms: every implementation against float64, and bit for bit in any batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.norm import (
    MoeOutput,
    add_rms_norm,
    concatenated_rms_norm,
    gated_rms_norm,
    l2_norm,
    rms_norm,
    sum_rms_norm,
)
from kernels_pallas.norm.shapes import ROWS, SHAPES, add_rms_norm_inputs, gated_rms_norm_inputs
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import override_platform
from mtpjax.presets import PRESETS
from tests.helpers.numerics import as_float64, assert_close

pytestmark = pytest.mark.fast

EPS = 1e-6
DTYPES = ["float32", "bfloat16"]
add = jax.jit(add_rms_norm, static_argnames=("eps", "implementation"))
gated = jax.jit(gated_rms_norm, static_argnames=("eps", "gate", "implementation"))


@pytest.fixture(params=["xla", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Kernels run compiled on a CUDA device and in interpret mode everywhere else."""
    return request.param


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def random_rows(dtype: str, rows: int = 6, size: int = 80) -> tuple[jax.Array, jax.Array, PartialSums, MoeOutput]:
    """Rows, a norm weight, partial sums, and experts' outputs with two invalid rows that hold NaN."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(rows, size)), dtype), jnp.asarray(rng.normal(size=size), jnp.float32)
    parts = jnp.asarray(rng.normal(size=(4, rows, size)), jnp.float32)
    experts, valid = rng.normal(size=(rows, 3, size)).astype(np.float32), np.arange(rows) > 1
    experts[~valid] = np.nan
    gate = PartialSums(jnp.asarray(rng.normal(size=(3, rows, 1)), jnp.float32))
    moe_output = MoeOutput(jnp.asarray(experts), jnp.asarray(valid), PartialSums(parts[:2]), gate)
    return x, w, PartialSums(parts), moe_output


def exact_moe_output(output: MoeOutput) -> np.ndarray:
    gate = 1 / (1 + np.exp(-as_float64(output.shared_gate.parts).sum(0)))
    routed = np.nan_to_num(as_float64(output.expert_outputs)).sum(1)
    return np.where(output.valid[:, None], routed, 0) + gate * as_float64(output.shared.parts).sum(0)


class TestAddRmsNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["partial sums", "experts"])
    def test_rows_are_added_and_normalised(self, kind: str, dtype: str, implementation: str) -> None:
        x, w, sums, moe_output = random_rows(dtype)
        delta: Any = {"partial sums": sums, "experts": moe_output}[kind]
        h, y = add(x, delta, w, eps=EPS, implementation=implementation)
        want = as_float64(x)
        if kind == "partial sums":
            want = want + as_float64(sums.parts).sum(0)
        if kind == "experts":
            want = want + exact_moe_output(moe_output)
        assert h.dtype == y.dtype == x.dtype
        assert_close(h, want, dtype)
        assert_close(y, normalised(want) * (1 + as_float64(w)), dtype)

    def test_leading_axes_are_kept(self, implementation: str) -> None:
        x, w, sums, _ = random_rows("float32")
        flat = add(x, sums, w, eps=EPS, implementation=implementation)
        shaped = add(x.reshape(2, 3, -1), sums, w, eps=EPS, implementation=implementation)
        for got, want in zip(shaped, flat, strict=True):
            assert got.shape == (2, 3, 80) and np.array_equal(got.reshape(want.shape), want)

    def test_a_row_is_invariant_to_the_batch_bit_for_bit(self) -> None:
        """A property of the kernel; XLA chooses the order of its sums anew for every number of rows."""
        x, w, _, output = random_rows("bfloat16")
        rows = slice(2, 5)
        cut = MoeOutput(
            output.expert_outputs[rows],
            output.valid[rows],
            PartialSums(output.shared.parts[:, rows]),
            PartialSums(output.shared_gate.parts[:, rows]),
        )
        whole = add(x, output, w, eps=EPS, implementation="triton")
        for alone, of_batch in zip(add(x[rows], cut, w, eps=EPS, implementation="triton"), whole, strict=True):
            assert (np.asarray(alone) == np.asarray(of_batch[rows])).all()

    def test_both_implementations_add_in_the_same_order(self) -> None:
        x, w, sums, _ = random_rows("float32")
        h, _ = add(x, sums, w, eps=EPS, implementation="xla")
        kernel_h, _ = add(x, sums, w, eps=EPS, implementation="triton")
        assert (np.asarray(h) == np.asarray(kernel_h)).all()


class TestGatedRmsNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("gate", ["sigmoid", "silu"])
    def test_heads_are_normalised_and_gated(self, gate: str, dtype: str, implementation: str) -> None:
        rng = np.random.default_rng(1)
        x, w = jnp.asarray(rng.normal(size=(5, 3, 24)), dtype), jnp.asarray(rng.normal(size=24), jnp.float32)
        z = PartialSums(jnp.asarray(rng.normal(size=(2, 5, 72)), jnp.float32))
        exact_z = as_float64(z.sum(dtype)).reshape(x.shape)
        act = 1 / (1 + np.exp(-exact_z)) * (exact_z if gate == "silu" else 1)
        got = gated(x, z, w, eps=EPS, gate=gate, implementation=implementation)
        assert got.dtype == x.dtype
        assert_close(got.reshape(x.shape), normalised(as_float64(x)) * as_float64(w) * act, dtype)

    def test_a_head_is_invariant_to_the_batch_bit_for_bit(self) -> None:
        rng = np.random.default_rng(2)
        x, w = jnp.asarray(rng.normal(size=(5, 3, 24)), jnp.float32), jnp.asarray(rng.normal(size=24), jnp.float32)
        z = PartialSums(jnp.asarray(rng.normal(size=(2, 5, 72)), jnp.float32))
        whole = gated(x, z, w, eps=EPS, gate="silu", implementation="triton")
        alone = gated(x[2:3], PartialSums(z.parts[:, 2:3]), w, eps=EPS, gate="silu", implementation="triton")
        assert (np.asarray(alone) == np.asarray(whole[2:3])).all()


def test_norms_of_single_vectors() -> None:
    x, w, *_ = random_rows("float32")
    assert_close(rms_norm(x, w, EPS), normalised(as_float64(x)) * (1 + as_float64(w)), "float32")
    want = as_float64(x) / np.sqrt((as_float64(x) ** 2).sum(-1, keepdims=True) + 1e-6)
    assert_close(l2_norm(x), want, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_with_their_neighbours_have_the_bits_of_the_norm_alone(dtype: str, implementation: str) -> None:
    """A sum of partial sums before it, and two norms side by side; 1 to 20 rows."""
    how: Any = {"implementation": implementation}
    x, w, sums, _ = random_rows(dtype, rows=20)
    other, other_w = x[::-1] * 2, w[::-1]
    norm = jax.jit(lambda x, w: rms_norm(x, w, EPS, **how))
    pair = jax.jit(lambda a, b: concatenated_rms_norm((a, b), (w, other_w), EPS, **how))
    of_sum = jax.jit(lambda parts: sum_rms_norm(PartialSums(parts), w, EPS, dtype, **how))
    assert_close(of_sum(sums.parts)[0], as_float64(sums.parts).sum(0), dtype)
    want_h, want_pair = sums.sum(dtype), jnp.concatenate([norm(x, w), norm(other, other_w)], axis=-1)
    want_y = norm(want_h, w)
    for rows in (1, 2, 5, 9, 16, 20):
        h, y = of_sum(sums.parts[:, :rows])
        both = pair(x[:rows].reshape(1, rows, -1), other[:rows].reshape(1, rows, -1))[0]
        for got, want in ((h, want_h), (y, want_y), (both, want_pair)):
            assert got.dtype == dtype
            np.testing.assert_array_equal(np.float32(got), np.float32(want[:rows]))


def test_the_platform_decides_which_implementation_is_traced() -> None:
    x, w, sums, _ = random_rows("float32")
    z = PartialSums(jnp.zeros((1, 6, 80)))

    def program(**how: Any) -> str:
        def both_ops(x: jax.Array) -> Any:
            return add_rms_norm(x, sums, w, EPS, **how), gated_rms_norm(x[:, None], z, w, EPS, "silu", **how)

        return str(jax.make_jaxpr(both_ops)(x))

    for platform, kernels in (("cpu", 0), ("cuda", 2)):
        with override_platform(platform, interpret=True):
            assert program().count("pallas_call") == kernels
            assert program(implementation="xla").count("pallas_call") == 0
            assert program(implementation="triton").count("pallas_call") == 2


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_has_the_shapes_of_the_published_models(name: str, implementation: str) -> None:
    shape, cfg = SHAPES[name], PRESETS[name]
    assert shape[:3] == (cfg.hidden_size, cfg.linear_v_heads, cfg.experts_per_token)
    assert shape.value_dim == cfg.linear_v_dim
    for rows in ROWS.values():
        x, delta, w = add_rms_norm_inputs(shape, rows, jnp.bfloat16)
        h, y = jax.eval_shape(
            lambda x, delta, w: add_rms_norm(x, delta, w, EPS, implementation=implementation), x, delta, w
        )
        assert h.shape == y.shape == (rows, cfg.hidden_size) and h.dtype == y.dtype == jnp.bfloat16
        args = gated_rms_norm_inputs(shape, rows, jnp.bfloat16)
        y = jax.eval_shape(lambda x, z, w: gated_rms_norm(x, z, w, EPS, "silu", implementation=implementation), *args)
        assert y.shape == (rows, cfg.value_size)
