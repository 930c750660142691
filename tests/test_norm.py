"""Residual sums and norms as kernels, in interpret mode; and a packed model in bfloat16 all of whose rows are invariant."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from flax import nnx
from test_kernels import assert_close

from kernels_pallas import attention, deltanet, grouped_matmul, matmul, norm, routing
from kernels_pallas.norm import Mixture, NormKernels
from kernels_pallas.norm.triton import add_norm, gated_norm
from kernels_pallas.target import compiling_for
from mtpjax import steps
from mtpjax.cache import new_cache
from mtpjax.config import FULL, LINEAR
from mtpjax.loading import storage
from mtpjax.model.norm import gated_rms_norm, rms_norm
from mtpjax.weights import random_model

EPS = 1e-6
add = jax.jit(partial(add_norm, interpret=True), static_argnames="eps")
gated = jax.jit(partial(gated_norm, interpret=True), static_argnames=("eps", "gate"))


def rows_of(dtype: str, rows: int = 6, size: int = 80) -> tuple[jax.Array, jax.Array, jax.Array, Mixture]:
    """Rows, a norm, parts, and a mixture with two dead rows whose places hold anything at all."""
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(rng.normal(size=(rows, size)), dtype), jnp.asarray(rng.normal(size=size), jnp.float32)
    parts = jnp.asarray(rng.normal(size=(4, rows, size)), jnp.float32)
    each, live = rng.normal(size=(rows, 3, size)).astype(np.float32), np.arange(rows) > 1
    each[~live] = np.nan
    gate = jnp.asarray(rng.normal(size=(3, rows, 1)), jnp.float32)
    return x, w, parts, Mixture(jnp.asarray(each), jnp.asarray(live), parts[:2], gate)


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
    cut = Mixture(mixture.each[some], mixture.live[some], mixture.shared[:, some], mixture.gate[:, some])
    for alone, whole in zip(add(x[some], cut, w, eps=EPS), add(x, mixture, w, eps=EPS), strict=True):
        assert (np.asarray(alone) == np.asarray(whole[some])).all()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of a GPU, interpreted."""
    inter = partial(partial, interpret=True)
    monkeypatch.setitem(matmul.api.KERNELS, "cuda", inter(matmul.triton.matmul_parts))
    monkeypatch.setitem(grouped_matmul.api.KERNELS, "cuda", inter(grouped_matmul.triton.grouped_mlp))
    monkeypatch.setitem(grouped_matmul.EACH_KERNELS, "cuda", inter(grouped_matmul.triton.each_expert))
    monkeypatch.setitem(routing.KERNELS, "cuda", inter(routing.triton.choose_experts))
    monkeypatch.setitem(deltanet.api.KERNELS, "cuda", inter(deltanet.triton.delta_window))
    monkeypatch.setitem(deltanet.api.CHUNK_KERNELS, "cuda", inter(deltanet.chunks.delta_chunks))
    monkeypatch.setitem(norm.api.KERNELS, "cuda", NormKernels(inter(add_norm), inter(gated_norm)))
    kernels = attention.AttentionKernels(inter(attention.entering.enter_cache), inter(attention.triton.attend_cache))
    monkeypatch.setitem(attention.api.KERNELS, "cuda", kernels)


def packed_model() -> Any:
    """A small MoE with eight-bit weights, computing in bfloat16."""
    sizes: Any = {"hidden_size": 64, "head_dim": 16, "rotary_dim": 4, "linear_k_dim": 16, "linear_v_dim": 16}
    sizes |= {"pattern": (LINEAR, FULL), "layers": 2, "experts": 4, "expert_size": 32, "shared_expert_size": 32}
    cfg = tiny_config(moe=True, **sizes).without_mtp()
    model = random_model(cfg, weights="int8", **storage(jnp.dtype("bfloat16")))
    return nnx.merge(model.graph, model.params)


def test_a_packed_models_rows_do_not_depend_on_the_window_bit_for_bit(interpreted: None) -> None:
    """In bfloat16, through every kernel: logits of the first rows of a window of five, of two and beside other sequences."""
    model = packed_model()
    rng = np.random.default_rng(2)
    with compiling_for("cuda"):
        tokens = jnp.asarray(rng.integers(0, model.cfg.vocab_size, (2, 16)), jnp.int32)
        none = jnp.zeros(2, jnp.int32)
        cache = new_cache(model.cfg, 2, 256, dtype=jnp.bfloat16)
        _, _, cache = jax.jit(lambda t, c: steps.prefill_chunk(model, t, t, none, c, steps.NO_ROWS))(tokens, cache)
        verify = jax.jit(lambda window, cache: steps.verify(model, window, jnp.zeros(len(window), bool), cache)[:2])
        window = tokens[:, :5]
        whole = verify(window, cache)
        for rows in (2, 4):
            for got, want in zip(verify(window[:, :rows], cache), whole, strict=True):
                assert (np.asarray(got) == np.asarray(want[:, :rows])).all()
        assert np.isfinite(np.asarray(whole[0])).all() and len(np.unique(np.asarray(whole[0]))) > 100
