"""The rows of a verify window through Gated DeltaNet, from its projections to its output, as one Pallas kernel, through the
Triton lowering.

In the chunked form a window of five rows is twenty small products a layer, each a kernel that takes longer to start than to
run, and so do the convolution and the gates before it. Here a program holds some columns of a head's state and steps
through the rows, whose q, k and v it makes itself: the state is read once and written by nobody, since it is not known yet
how many rows count. A row's result does not depend on the rows behind it or on the other sequences, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Int

from kernels_pallas.partial_sums import load_partial_sum
from kernels_pallas.tiles import index_grid

FEW = 16  # rows of a window; with more the chunked form is faster
COLUMNS = 32  # of the state that a program holds


class DeltaProjections(NamedTuple):
    """What a layer's projections give for the rows of a window, each as parts to be added in their order."""

    qkv: Float[Array, "S B*W C"]  # in the compute dtype, or float32 parts of it
    beta: Float[Array, "Sb B*W M"]  # float32, before the sigmoid
    decay: Float[Array, "Sa B*W M"]  # float32, before the softplus


class Fixed(NamedTuple):
    """The small weights of a layer."""

    taps: Float[Array, "C P+1"]  # of the convolution; the last one is that of the row itself
    a_log: Float[Array, " M"]
    dt_bias: Float[Array, " M"]


def _window_kernel(
    layer_ref: Any, pad_ref: Any, end_ref: Any, qkv_ref: Any, b_ref: Any, a_ref: Any, taps_ref: Any, log_ref: Any,
    bias_ref: Any, before_ref: Any, state_ref: Any, o_ref: Any, d_ref: Any, k_ref: Any, decay_ref: Any, *, columns: int,
    dtype: Any,
) -> None:  # fmt: skip
    """All rows of one sequence, for some columns of the state of one value head."""
    _, rows, heads, width = o_ref.shape
    keys, size = k_ref.shape[2:]
    past = before_ref.shape[2]
    b, m = pl.program_id(0) // heads, pl.program_id(0) % heads
    j = m // (heads // keys)
    channel, column = jnp.arange(size), pl.program_id(1) * columns + jnp.arange(columns)
    cc, vv = index_grid(channel, column)
    pad, end, layer = pad_ref[b], end_ref[b], layer_ref[0]

    def convolved(t: Array, at: Array) -> Array:
        """SiLU of the convolution at row t, channels `at`. The last inputs of the step before stand behind the padding."""
        total = jnp.zeros(at.shape, jnp.float32)
        for tap in range(past + 1):
            place = t + tap  # among `past` inputs and the rows
            old, row = place - pad, place - past
            was, now = (old >= 0) & (old < past), (old >= past) & (row < end)
            here = jnp.ones(at.shape, bool)
            given = load_partial_sum(qkv_ref, b * rows + jnp.maximum(row, 0), at, mask=here & now).astype(dtype)
            given = given.astype(before_ref.dtype).astype(jnp.float32)
            kept = plt.load(before_ref.at[layer, b, jnp.clip(old, 0, past - 1), at], mask=here & was, other=0)
            total = total + (given + kept.astype(jnp.float32)) * plt.load(taps_ref.at[at, tap]).astype(jnp.float32)
        return (total * lax.logistic(total)).astype(dtype).astype(jnp.float32)

    def unit(t: Array, at: Array) -> Array:
        y = convolved(t, at + channel)
        return y * lax.rsqrt(jnp.sum(y * y) + 1e-6)

    rate = -jnp.exp(plt.load(log_ref.at[m]).astype(jnp.float32))

    def row(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, decay = carry
        live, n = (t >= pad) & (t < end), b * rows + t
        q, k = unit(t, j * size) * size**-0.5, unit(t, (keys + j) * size)
        v = convolved(t, 2 * keys * size + m * width + column)
        step = load_partial_sum(a_ref, n, m) + plt.load(bias_ref.at[m]).astype(jnp.float32)
        step = jnp.maximum(step, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(step)))  # softplus
        g = jnp.where(live, rate * step, 0.0)
        beta = jnp.where(live, lax.logistic(load_partial_sum(b_ref, n, m)), 0.0)
        state, decay = state * jnp.exp(g), decay + g
        d = beta * (v - jnp.sum(state * k[:, None], axis=0))
        state = state + k[:, None] * d[None, :]
        plt.store(d_ref.at[b, t, m, column], d)
        plt.store(o_ref.at[b, t, m, column], jnp.sum(state * q[:, None], axis=0).astype(o_ref.dtype))
        plt.store(k_ref.at[b, t, j, channel], k)  # by all programs of the head: the same bits
        plt.store(decay_ref.at[b, t, m], decay)
        return state, decay

    # Which no compiler knows: of one row it would make another program than of five.
    turns = jnp.where(end >= 0, jnp.int32(rows), jnp.int32(0))
    lax.fori_loop(0, turns, row, (plt.load(state_ref.at[layer, b, m, cc, vv]), jnp.float32(0)))


def takes(rows: int, key_size: int, value_size: int) -> bool:
    """Whether the kernel takes windows of so many rows and heads of these sizes."""

    def is_power_of_2(size: int) -> bool:
        return size >= 16 and size & (size - 1) == 0

    return rows <= FEW and is_power_of_2(key_size) and is_power_of_2(value_size)


def delta_window(
    projected: DeltaProjections,
    fixed: Fixed,
    before: Float[Array, "L B P C"],
    state: Float[Array, "L B M K V"],
    layer: Array | int,
    pad: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    dtype: Any,
    interpret: bool = False,
) -> tuple[Float[Array, "B W M V"], Float[Array, "B W M V"], Float[Array, "B W J K"], Float[Array, "B W M"]]:
    """Outputs o (of `dtype`), updates d, normalised keys k and summed log decay (float32) of W rows behind the state of layer
    `layer`, which stays as it is.

    Row by row, with `u = silu(conv(qkv))`, which holds q of J heads, their k and v of M heads (`C = 2 J K + M V`),
    `beta = sigmoid(b)`, `g = -exp(a_log) softplus(a + dt_bias)`, and for value head m with state S and its key head j
    `q = unit(q_j) / sqrt(K)`, `k = unit(k_j)`:
    `S <- exp(g) S;  d = beta (v - S^T k);  S <- S + k d^T;  o = S^T q`, and `unit(y) = y / sqrt(sum(y^2) + 1e-6)`.

    Args:
        before: the last P inputs of the convolution.
        state: K and V are powers of two, at least 16.
        pad, end: rows from `pad` on and before `end` are live; the others change nothing. W is at most 16.
        dtype: compute dtype, to which qkv and u are rounded.
        interpret: run as plain `jnp`, on any device.

    Raises:
        ValueError: W, K or V is not of that kind.
    """
    batch, heads, size, width = state.shape[1:]
    rows = projected.qkv.shape[1] // batch
    if not takes(rows, size, width):
        expected = f"expected at most {FEW} rows, and sizes that are powers of two from 16 on"
        raise ValueError(f"{rows} rows of heads of {size} x {width}; {expected}")
    keys, columns = (projected.qkv.shape[2] - heads * width) // (2 * size), min(COLUMNS, width)
    of_values = (batch, rows, heads, width)
    return pl.pallas_call(
        partial(_window_kernel, columns=columns, dtype=dtype),
        grid=(batch * heads, width // columns),
        out_shape=(
            jax.ShapeDtypeStruct(of_values, dtype),
            jax.ShapeDtypeStruct(of_values, jnp.float32),
            jax.ShapeDtypeStruct((batch, rows, keys, size), jnp.float32),
            jax.ShapeDtypeStruct((batch, rows, heads), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="delta_window",
    )(jnp.asarray(layer, jnp.int32).reshape(1), pad, end, *projected, *fixed, before, state)
