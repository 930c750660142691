"""The rows of a verify window through the recurrence of Gated DeltaNet as one Pallas kernel, through the Triton lowering.

In the chunked form a window of five rows is twenty small products a layer, each a kernel that takes longer to start than to
run. Here a program holds some columns of a head's state and steps through the rows, whose q and k it normalises itself:
the state is read once and written by nobody, since it is not known yet how many rows count. A row's result does not
depend on the rows behind it or on the other sequences, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from kernels_pallas.packed_words import grid

FEW = 16  # rows of a window; with more the chunked form is faster
COLUMNS = 32  # of the state that a program holds


def _window_kernel(
    layer_ref: Any, u_ref: Any, beta_ref: Any, g_ref: Any, state_ref: Any, o_ref: Any, d_ref: Any, k_ref: Any,
    *, columns: int,
) -> None:  # fmt: skip
    """All rows of one sequence, for some columns of the state of one value head."""
    rows = u_ref.shape[1]
    _, _, heads, size, width = state_ref.shape
    keys = k_ref.shape[2]
    b, m = pl.program_id(0) // heads, pl.program_id(0) % heads
    j = m // (heads // keys)
    channel, column = jnp.arange(size), pl.program_id(1) * columns + jnp.arange(columns)
    cc, vv = grid(channel, column)

    def unit(at: Array, t: Array) -> Array:
        y = plt.load(u_ref.at[b, t, at + channel])
        return y * lax.rsqrt(jnp.sum(y * y) + 1e-6)

    def row(t: Array, state: Array) -> Array:
        q, k = unit(j * size, t) * size**-0.5, unit((keys + j) * size, t)
        v = plt.load(u_ref.at[b, t, 2 * keys * size + m * width + column])
        beta, g = plt.load(beta_ref.at[b, t, m]), plt.load(g_ref.at[b, t, m])
        state = state * jnp.exp(g)
        d = beta * (v - jnp.sum(state * k[:, None], axis=0))
        state = state + k[:, None] * d[None, :]
        plt.store(d_ref.at[b, t, m, column], d)
        plt.store(o_ref.at[b, t, m, column], jnp.sum(state * q[:, None], axis=0))
        plt.store(k_ref.at[b, t, j, channel], k)  # by all programs of the head: the same bits
        return state

    lax.fori_loop(0, rows, row, plt.load(state_ref.at[layer_ref[0], b, m, cc, vv]))


def takes(rows: int, key_size: int, value_size: int) -> bool:
    """Whether the kernel takes windows of so many rows and heads of these sizes."""

    def power(size: int) -> bool:
        return size >= 16 and size & (size - 1) == 0

    return rows <= FEW and power(key_size) and power(value_size)


def delta_window(
    u: Float[Array, "B W C"],
    beta: Float[Array, "B W M"],
    g: Float[Array, "B W M"],
    state: Float[Array, "L B M K V"],
    layer: Array | int,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B W M V"], Float[Array, "B W M V"], Float[Array, "B W J K"]]:
    """Outputs o, updates d and normalised keys k of W rows behind the state of layer `layer`, which stays as it is; all
    float32.

    Row by row, with `S` the state of value head m, `q = unit(q_j) / sqrt(K)` and `k = unit(k_j)` of its key head j:
    `S <- exp(g) S;  d = beta (v - S^T k);  S <- S + k d^T;  o = S^T q`, and `unit(y) = y / sqrt(sum(y^2) + 1e-6)`.

    Args:
        u: what the convolution gives: the q of J heads, their k, the v of M heads (`C = 2 J K + M V`). K and V are powers
            of two, at least 16; W is at most 16. Rows with beta = 0 and g = 0 change nothing.
        interpret: run as plain `jnp`, on any device.

    Raises:
        ValueError: W, K or V is not of that kind.
    """
    batch, rows, channels = u.shape
    heads, size, width = state.shape[2:]
    if not takes(rows, size, width):
        expected = f"expected at most {FEW} rows, and sizes that are powers of two from 16 on"
        raise ValueError(f"{rows} rows of heads of {size} x {width}; {expected}")
    keys, columns = (channels - heads * width) // (2 * size), min(COLUMNS, width)
    out = jax.ShapeDtypeStruct((batch, rows, heads, width), jnp.float32)
    return pl.pallas_call(
        partial(_window_kernel, columns=columns),
        grid=(batch * heads, width // columns),
        out_shape=(out, out, jax.ShapeDtypeStruct((batch, rows, keys, size), jnp.float32)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="delta_window",
    )(jnp.asarray(layer, jnp.int32).reshape(1), u, beta, g, state)
