"""The kernel for the rows of a verify window in interpret mode, against the recurrence in float64; its place in the model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.gated_delta_rule import DeltaProjections, Fixed, pick
from kernels_pallas.gated_delta_rule.triton import delta_window
from kernels_pallas.platform import platform
from mtpjax.config import FULL, LINEAR
from mtpjax.model import gated_deltanet as deltanet
from mtpjax.model import make_positions
from mtpjax.model.cache import new_cache, new_pending
from tests.helpers.models import numpy_model, tiny_config
from tests.kernels.test_packed_matmul import assert_close

window = jax.jit(partial(delta_window, interpret=True), static_argnames="dtype")
PAST = 3


def rows_of(
    rows: int, keys: int = 2, heads: int = 4, size: int = 32, width: int = 64, dtype: str = "float32"
) -> tuple[Any, ...]:
    """Three sequences; of the second the first rows are padding and the last is beyond the cache, and the third is idle."""
    rng = np.random.default_rng(rows)
    channels = 2 * keys * size + heads * width
    qkv = rng.normal(size=(1 if dtype != "float32" else 2, 3 * rows, channels)).astype(dtype)
    gates = (2 * rng.normal(size=(parts, 3 * rows, heads)).astype("float32") for parts in (4, 2))
    fixed = (rng.normal(size=shape).astype("float32") for shape in ((channels, PAST + 1), (heads,), (heads,)))
    before, state = rng.normal(size=(2, 3, PAST, channels)).astype(dtype), rng.normal(size=(2, 3, heads, size, width))
    pad, end = np.array([0, rows // 2, rows], np.int32), np.array([rows, max(rows - 1, rows // 2), rows], np.int32)
    return DeltaProjections(qkv, *gates), Fixed(*fixed), before, state.astype("float32"), np.int32(1), pad, end


def stepped_through(projected, fixed, before, states, layer, pad, end) -> tuple[np.ndarray, ...]:
    """In float64, a row after the other: outputs, updates, keys, summed log decay."""
    qkv_dtype = projected.qkv.dtype  # to which the convolution is rounded
    taps, a_log, dt_bias = (np.float64(x) for x in fixed)
    qkv, b, a = (np.float64(part).sum(0) for part in projected)
    batch, heads, size, width = states.shape[1:]
    rows = len(qkv) // batch
    keys = (qkv.shape[1] - heads * width) // (2 * size)
    out, updates = np.zeros((2, batch, rows, heads, width))
    single, decay = np.zeros((batch, rows, keys, size)), np.zeros((batch, rows, heads))
    for s in range(batch):
        state, total = np.float64(states[layer, s]), np.zeros(heads)
        inputs = np.zeros((PAST + rows, qkv.shape[1]))
        inputs[pad[s] : pad[s] + PAST] = before[layer, s]
        inputs[pad[s] + PAST : end[s] + PAST] = qkv[s * rows + pad[s] : s * rows + end[s]]
        for t in range(rows):
            u = (inputs[t : t + PAST + 1] * taps.T).sum(0)
            u = np.float64((u / (1 + np.exp(-u))).astype(qkv_dtype))
            q, k = (u[i * keys * size : (i + 1) * keys * size].reshape(keys, size) for i in range(2))
            q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
            single[s, t] = k
            q, k = (np.repeat(x, heads // keys, axis=0) for x in (q / np.sqrt(size), k))
            v, live, n = u[2 * keys * size :].reshape(heads, width), pad[s] <= t < end[s], s * rows + t
            g = -np.exp(a_log) * np.log1p(np.exp(a[n] + dt_bias)) * live
            state, total = state * np.exp(g)[:, None, None], total + g
            updates[s, t] = live / (1 + np.exp(-b[n]))[:, None] * (v - np.einsum("mkv,mk->mv", state, k))
            state = state + k[..., None] * updates[s, t][:, None]
            out[s, t], decay[s, t] = np.einsum("mkv,mk->mv", state, q), total
    return out, updates, single, decay


@pytest.mark.parametrize(
    ("rows", "sizes"), [(1, (2, 4, 32, 64)), (5, (2, 4, 32, 64)), (9, (2, 2, 16, 16)), (16, (1, 3, 64, 32))]
)
def test_a_window_steps_through_the_recurrence(rows: int, sizes: tuple[int, ...]) -> None:
    args = rows_of(rows, *sizes)
    for got, want in zip(window(*args, dtype="float32"), stepped_through(*args), strict=True):
        assert_close(got, want, "float32")


def test_bfloat16_rows_are_rounded_where_the_formula_says() -> None:
    args = rows_of(5, dtype="bfloat16")
    out, *others = window(*args, dtype="bfloat16")
    assert out.dtype == jnp.bfloat16 and all(other.dtype == jnp.float32 for other in others)
    for got, want in zip((out, *others), stepped_through(*args), strict=True):
        assert_close(got, want, "bfloat16")
        off = np.abs(np.float64(got) - want) > (2**-8 if got.dtype == out.dtype else 1e-4) * np.abs(want).max()
        assert off.mean() < 0.02  # where the last bit of a convolution falls the other way


def first_rows(projected: DeltaProjections, sequences: slice, rows: int) -> DeltaProjections:
    def cut(part: np.ndarray) -> np.ndarray:
        each = part.reshape(len(part), 3, -1, part.shape[2])[:, sequences, :rows]
        return each.reshape(len(part), -1, part.shape[2])

    return DeltaProjections(*map(cut, projected))


def test_a_window_is_invariant_to_later_rows_and_to_the_batch_bit_for_bit() -> None:
    """Of a single row, an axis of one, XLA's CPU backend makes other loops; the kernel is one program for any number."""
    projected, fixed, before, state, layer, pad, end = rows_of(5)
    every = slice(None)
    whole = window(projected, fixed, before, state, layer, pad, end, dtype="float32")
    for n in (2, 3):
        some = window(
            first_rows(projected, every, n), fixed, before, state, layer, pad, np.minimum(end, n), dtype="float32"
        )
        for got, want in zip(some, whole, strict=True):
            assert (np.asarray(got) == np.asarray(want[:, :n])).all()
    two = slice(1, 2)
    some = window(
        first_rows(projected, two, 5), fixed, before[:, two], state[:, two], layer, pad[two], end[two], dtype="float32"
    )
    for got, want in zip(some, whole, strict=True):
        assert (np.asarray(got) == np.asarray(want[two])).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_sends_verify_windows_through_the_kernel(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gets what the chunked form makes of them, for idle sequences and behind the end of the cache, too."""
    cfg = tiny_config(moe=False, linear_k_dim=16, linear_v_dim=32, layer_pattern=(LINEAR, FULL), num_layers=2)
    model = numpy_model(cfg, seed=3, scale=0.2)
    graph, weights = nnx.split(nnx.merge(model.graph, model.params).decoder.blocks[0].layers[0].mixer)
    layer = nnx.merge(graph, jax.tree.map(lambda w: w[0], weights))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, 5, cfg.hidden_size)), dtype)
    cache = new_cache(cfg, 3, 256, dtype=x.dtype).replace(length=jnp.array([7, 253, 0]))
    state, conv = (rng.normal(size=part.shape) for part in (cache.state, cache.conv))
    cache = cache.replace(state=jnp.asarray(state, jnp.float32), conv=jnp.asarray(conv, dtype))
    where = make_positions(cfg, cache.length, 5, jnp.array([0, 0, 5]), kv_len=256)

    def run() -> Any:
        y, _, pending = layer(x, cache, new_pending(cfg, 3, 5, dtype=x.dtype), 0, where)
        return y, pending

    plain, asked = run(), []
    monkeypatch.setattr(deltanet, "pick", lambda *about: asked.append(about) or window)
    for got, want in zip(jax.tree.leaves(run()), jax.tree.leaves(plain), strict=True):
        assert_close(got, np.asarray(want, np.float64), dtype)
    assert asked == [(platform(), 5, 16, 32)]
    assert pick("cuda", 5, 128, 128) is not None
    for about in (("cpu", 5, 128, 128), ("cuda", 17, 128, 128), ("cuda", 5, 24, 128), ("cuda", 5, 128, 8)):
        assert pick(*about) is None


def test_a_window_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="17 rows of heads of 32 x 64; expected at most 16 rows"):
        delta_window(*rows_of(17), dtype="float32")
