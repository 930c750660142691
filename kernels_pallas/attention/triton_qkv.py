"""QK norm, rotation, query scale and the cache update as one Pallas kernel, through the Triton lowering.

As XLA operations these are six kernels a layer, and each takes longer to start than to run. A program computes one head
of one row and depends on nothing else. The cache is changed in place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.projections import QkvProjections
from kernels_pallas.attention.rope import CosSin
from kernels_pallas.partial_sums import load_partial_sum


def _norm_rope_update_cache_kernel(
    layer_ref: Any,
    position_ref: Any,
    valid_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    k_norm_ref: Any,
    q_norm_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    eps: float,
    dtype: DTypeLike,
) -> None:
    """Compute one head of one row. The second grid axis counts the heads of keys, then of values, then of queries.

    `refs` are the projected queries if there are any, the cache before, the queries as output, and the cache after.
    """
    rows, half = position_ref.shape[1], cos_ref.shape[2]
    keys_ref, values_ref = refs[-2:]
    _, _, heads, _, size = keys_ref.shape
    b, t, head = pl.program_id(0) // rows, pl.program_id(0) % rows, pl.program_id(1)
    channel = jnp.arange(size)
    in_first_half, is_rotated = channel < half, channel < 2 * half
    partner = jnp.where(in_first_half, channel + half, jnp.where(is_rotated, channel - half, channel))
    angle = jnp.where(is_rotated, channel - jnp.where(in_first_half, 0, half), 0)

    def norm_rope(ref: Any, norm_ref: Any, n: Array, column: Array) -> Float[Array, " H"]:
        """Load a head, normalise and rotate it; the result has the compute dtype."""
        x = load_partial_sum(ref, n, column + channel).astype(dtype).astype(jnp.float32)
        inverse_rms = lax.rsqrt(jnp.sum(x * x) / size + eps)

        def normalise(x: Array, channel: Array) -> Array:
            y = x * inverse_rms * (1.0 + plt.load(norm_ref.at[channel]).astype(jnp.float32))
            return y.astype(dtype).astype(jnp.float32)

        y = normalise(x, channel)
        other = normalise(load_partial_sum(ref, n, column + partner).astype(dtype).astype(jnp.float32), partner)
        cos, sin = plt.load(cos_ref.at[b, t, angle]), plt.load(sin_ref.at[b, t, angle])
        return jnp.where(is_rotated, y * cos + other * jnp.where(in_first_half, -sin, sin), y).astype(dtype)

    valid, n = plt.load(valid_ref.at[b, t]) > 0, pl.program_id(0)
    at = (layer_ref[0], b, lax.rem(head, heads), plt.load(position_ref.at[b, t]), channel)

    @pl.when(valid & (head < heads))
    def store_key() -> None:
        plt.store(keys_ref.at[at], norm_rope(k_ref, k_norm_ref, n, head * size).astype(keys_ref.dtype))

    @pl.when(valid & (head >= heads) & (head < 2 * heads))
    def store_value() -> None:
        value = load_partial_sum(v_ref, n, (head - heads) * size + channel).astype(dtype)
        plt.store(values_ref.at[at], value.astype(values_ref.dtype))

    if len(refs) == 4:  # no queries
        return
    q_gate_ref, q_ref = refs[0], refs[-3]
    last = q_ref.shape[1]  # queries belong to the last rows

    @pl.when((head >= 2 * heads) & (t >= rows - last))
    def store_query() -> None:
        q_head, row = head - 2 * heads, t - (rows - last)
        q = norm_rope(q_gate_ref, q_norm_ref, b * last + row, q_head * 2 * size).astype(jnp.float32) * size**-0.5
        plt.store(q_ref.at[b, row, q_head, channel], q.astype(dtype))


def norm_rope_update_cache(
    projections: QkvProjections,
    k_norm: Float[Array, " H"],
    q_norm: Float[Array, " H"],
    rope: CosSin,
    cache: tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    eps: float,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "B R Q H"] | None, tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]]]:
    """See `kernels_pallas.attention.norm_rope_update_cache`.

    Args:
        cache: keys and values, which the caller gives up (donates).
        interpret: run the kernel in interpret mode, on any device.
    """
    batch, rows = positions.shape
    heads, size = cache[0].shape[2], cache[0].shape[4]
    out_shape: list[Any] = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in cache]
    inputs: list[Array] = [projections.k.parts, projections.v.parts, *cache]
    q_heads = 0
    if projections.q_gate is not None:
        _, q_rows, columns = projections.q_gate.parts.shape
        q_heads = columns // (2 * size)
        inputs.insert(2, projections.q_gate.parts)
        out_shape.insert(0, jax.ShapeDtypeStruct((batch, q_rows // batch, q_heads, size), dtype))
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    small = (index, positions.astype(jnp.int32), valid.astype(jnp.int32), *rope, k_norm, q_norm)
    cache_operand = len(small) + len(inputs) - 2
    *q, keys, values = pl.pallas_call(
        partial(_norm_rope_update_cache_kernel, eps=eps, dtype=dtype),
        grid=(batch * rows, 2 * heads + q_heads),
        out_shape=out_shape,
        input_output_aliases={cache_operand: len(out_shape) - 2, cache_operand + 1: len(out_shape) - 1},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="attention_update_cache",
    )(*small, *inputs)
    return (q[0] if q else None), (keys, values)
