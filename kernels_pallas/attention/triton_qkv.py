"""Rows on their way into attention as one Pallas kernel, through the Triton lowering: keys and values go to the cache, queries
to the kernel that attends.

Norms, rotation, scale and the writing are six kernels a layer otherwise, each of which takes longer to start than to run. A
program takes one head of one row and depends on nothing else. The cache is changed in place.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Bool, Float, Int

from kernels_pallas.partial_sums import load_partial_sum


class Entering(NamedTuple):
    """What the projections give for the rows of a step, as parts to be added in their order: float32, or a single one in the
    compute dtype. Queries are those of the last rows only; of each head the query is followed by its gate."""

    k: Float[Array, "Sk B*T N*H"]
    v: Float[Array, "Sv B*T N*H"]
    q: Float[Array, "Sq B*K Q*2*H"] | None


def _enter_kernel(
    layer_ref: Any, position_ref: Any, live_ref: Any, cos_ref: Any, sin_ref: Any, k_norm_ref: Any, q_norm_ref: Any,
    k_ref: Any, v_ref: Any, *refs: Any, eps: float, dtype: Any,
) -> None:  # fmt: skip
    """One head of one row: of the keys, then of the values, then of the queries."""
    rows, half = position_ref.shape[1], cos_ref.shape[2]
    keys_ref, values_ref = refs[-2:]
    _, _, heads, _, size = keys_ref.shape
    b, t, head = pl.program_id(0) // rows, pl.program_id(0) % rows, pl.program_id(1)
    channel = jnp.arange(size)
    first, turned = channel < half, channel < 2 * half
    partner = jnp.where(first, channel + half, jnp.where(turned, channel - half, channel))
    angle = jnp.where(turned, channel - jnp.where(first, 0, half), 0)

    def entered(ref: Any, norm_ref: Any, n: Array, at: Array) -> Array:
        """Normalised and turned, in the compute dtype."""
        x = load_partial_sum(ref, n, at + channel).astype(dtype).astype(jnp.float32)
        root = lax.rsqrt(jnp.sum(x * x) / size + eps)

        def normed(x: Array, channel: Array) -> Array:
            y = x * root * (1.0 + plt.load(norm_ref.at[channel]).astype(jnp.float32))
            return y.astype(dtype).astype(jnp.float32)

        y = normed(x, channel)
        other = normed(load_partial_sum(ref, n, at + partner).astype(dtype).astype(jnp.float32), partner)
        cos, sin = plt.load(cos_ref.at[b, t, angle]), plt.load(sin_ref.at[b, t, angle])
        return jnp.where(turned, y * cos + other * jnp.where(first, -sin, sin), y).astype(dtype)

    live, n = plt.load(live_ref.at[b, t]) > 0, pl.program_id(0)
    at = (layer_ref[0], b, lax.rem(head, heads), plt.load(position_ref.at[b, t]), channel)

    @pl.when(live & (head < heads))
    def key() -> None:
        plt.store(keys_ref.at[at], entered(k_ref, k_norm_ref, n, head * size).astype(keys_ref.dtype))

    @pl.when(live & (head >= heads) & (head < 2 * heads))
    def value() -> None:
        row = load_partial_sum(v_ref, n, (head - heads) * size + channel).astype(dtype)
        plt.store(values_ref.at[at], row.astype(values_ref.dtype))

    if len(refs) == 4:  # no queries
        return
    q_ref, out_ref = refs[0], refs[-3]
    kept = out_ref.shape[1]

    @pl.when((head >= 2 * heads) & (t >= rows - kept))
    def query() -> None:
        own, row = head - 2 * heads, t - (rows - kept)
        q = entered(q_ref, q_norm_ref, b * kept + row, own * 2 * size).astype(jnp.float32) * size**-0.5
        plt.store(out_ref.at[b, row, own, channel], q.astype(dtype))


def enter_cache(
    rows: Entering,
    k_norm: Float[Array, " H"],
    q_norm: Float[Array, " H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    cache: tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]],
    layer: Array | int,
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    *,
    eps: float,
    dtype: Any,
    interpret: bool = False,
) -> tuple[Float[Array, "B K Q H"] | None, tuple[Array, Array]]:
    """Normalised, turned and scaled queries in `dtype`, None without queries, and the cache with the live rows at their
    positions in layer `layer`.

    Norms are zero-centred (`1 + w`); the first `2 half` channels of queries and keys turn, channel i with channel
    `i + half`; the scale is `H ** -0.5`. Results are rounded to `dtype` where the model rounds them.

    Args:
        cos, sin: of the angle at each row, float32.
        cache: keys and values, which the caller gives up.
        interpret: run as plain `jnp`, on any device.
    """
    keys, values = cache
    (batch, count), size, heads = positions.shape, keys.shape[4], keys.shape[2]
    queries = 0 if rows.q is None else rows.q.shape[2] // (2 * size)
    shapes: list[Any] = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in cache]
    inputs: list[Array] = [rows.k, rows.v, *cache]
    if rows.q is not None:
        inputs.insert(2, rows.q)
        shapes.insert(0, jax.ShapeDtypeStruct((batch, rows.q.shape[1] // batch, queries, size), dtype))
    about = (jnp.asarray(layer, jnp.int32).reshape(1), positions.astype(jnp.int32), live.astype(jnp.int32))
    first = 7 + len(inputs) - 2  # of the cache among the operands
    *q, keys, values = pl.pallas_call(
        partial(_enter_kernel, eps=eps, dtype=dtype),
        grid=(batch * count, 2 * heads + queries),
        out_shape=shapes,
        input_output_aliases={first: len(shapes) - 2, first + 1: len(shapes) - 1},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="attention_enter",
    )(*about, cos, sin, k_norm, q_norm, *inputs)
    return (q[0] if q else None), (keys, values)
