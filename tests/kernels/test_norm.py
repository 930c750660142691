"""Residual sums and norms as kernels, in interpret mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.norm import MoeOutput
from kernels_pallas.norm.triton import add_norm, gated_norm
from mtpjax.model.norm import gated_rms_norm, rms_norm
from tests.kernels.test_packed_matmul import assert_close

EPS = 1e-6
add = jax.jit(partial(add_norm, interpret=True), static_argnames="eps")
gated = jax.jit(partial(gated_norm, interpret=True), static_argnames=("eps", "gate"))


def rows_of(dtype: str, rows: int = 6, size: int = 80) -> tuple[jax.Array, jax.Array, jax.Array, MoeOutput]:
    """Rows, a norm, parts, and a mixture with two dead rows whose places hold anything at all."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(rows, size)), dtype), jnp.asarray(rng.normal(size=size), jnp.float32)
    parts = jnp.asarray(rng.normal(size=(4, rows, size)), jnp.float32)
    each, live = rng.normal(size=(rows, 3, size)).astype(np.float32), np.arange(rows) > 1
    each[~live] = np.nan
    gate = jnp.asarray(rng.normal(size=(3, rows, 1)), jnp.float32)
    return x, w, parts, MoeOutput(jnp.asarray(each), jnp.asarray(live), parts[:2], gate)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nothing", "parts", "mixture"])
def test_rows_are_added_up_and_normalised(kind: str, dtype: str) -> None:
    x, w, parts, mixture = rows_of(dtype)
    more = {"nothing": None, "parts": parts, "mixture": mixture}[kind]
    h, y = add(x, more, w, eps=EPS)
    want = np.float64(x)
    if kind == "parts":
        want = want + np.float64(parts).sum(0)
    if kind == "mixture":
        open_ = 1 / (1 + np.exp(-np.float64(mixture.gate).sum(0)))
        want = want + np.where(mixture.live[:, None], np.nan_to_num(np.float64(mixture.each)).sum(1), 0)
        want = want + open_ * np.float64(mixture.shared).sum(0)
        assert_close(mixture.whole(x.dtype), want - np.float64(x), dtype)
    assert h.dtype == y.dtype == x.dtype
    assert_close(h, want, dtype)
    assert_close(y, want / np.sqrt((want**2).mean(-1, keepdims=True) + EPS) * (1 + np.float64(w)), dtype)
    assert_close(y, np.float64(rms_norm(h, w, EPS)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
def test_heads_are_normalised_and_gated(gate: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.normal(size=(5, 3, 24)), dtype), jnp.asarray(rng.normal(size=24), jnp.float32)
    z = jnp.asarray(rng.normal(size=(2, 5, 72)), jnp.float32)
    want = gated_rms_norm(x, (z[0] + z[1]).astype(dtype).reshape(x.shape), w, EPS, gate)
    got = gated(x, z, w, eps=EPS, gate=gate)
    assert got.dtype == x.dtype
    assert_close(got.reshape(x.shape), np.float64(want), dtype)


def test_a_row_is_invariant_to_the_batch_bit_for_bit() -> None:
    x, w, _, mixture = rows_of("bfloat16")
    some = slice(2, 5)
    cut = MoeOutput(mixture.each[some], mixture.live[some], mixture.shared[:, some], mixture.gate[:, some])
    for alone, whole in zip(add(x[some], cut, w, eps=EPS), add(x, mixture, w, eps=EPS), strict=True):
        assert (np.asarray(alone) == np.asarray(whole[some])).all()
