"""Attention of many rows (prompt chunks) over a key/value cache, as one Pallas kernel through the Triton lowering.

A program reads the cache for a tile of (row, query head) pairs, all with the same key/value head, up to the last
position that its rows see. The queries are the first operand of both products, as in FlashAttention-2
(arXiv:2307.08691): then the maximum and the sum of a pair stay inside one warp, and the weights go from the registers
of the first product to the second.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.gate import apply_gate
from kernels_pallas.attention.reference import MASK_VALUE
from kernels_pallas.attention.tile_sizes import PREFILL_TILES, AttentionTile, card_class
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.tiles import dot, index_grid


def _prefill_kernel(
    layer_ref: Any,
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gate_ref: Any,
    y_ref: Any,
    *,
    sizes: AttentionTile,
    kv_heads: int,
) -> None:
    """Compute a tile of pairs: `sum_s p_s v_s / sum_s p_s` with a running maximum, see `reference.attention`."""
    _, rows, heads, size = q_ref.shape
    group = heads // kv_heads
    b, n = pl.program_id(1) // kv_heads, pl.program_id(1) % kv_heads
    tile = pl.num_programs(0) - 1 - pl.program_id(0)  # the last rows see the most keys, so they begin first
    pair = tile * sizes.pairs + jnp.arange(sizes.pairs)
    row, head, channel = lax.div(pair, group), n * group + lax.rem(pair, group), jnp.arange(size)
    row_grid, channel_grid = index_grid(row, channel)
    head_grid, _ = index_grid(head, channel)
    at = (b, row_grid, head_grid, channel_grid)
    q = plt.load(q_ref.at[at], mask=row_grid < rows, other=0)
    position = plt.load(position_ref.at[b, row], mask=row < rows, other=-1)

    def add_tile(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        running_max, total, out = sums
        kv_position = i * sizes.kv + jnp.arange(sizes.kv)
        kv_grid, channel_grid = index_grid(kv_position, channel)
        k = plt.load(k_ref.at[layer_ref[0], b, n, kv_grid, channel_grid]).astype(q.dtype)
        v = plt.load(v_ref.at[layer_ref[0], b, n, kv_grid, channel_grid]).astype(q.dtype)
        score = jnp.where(kv_position[None, :] <= position[:, None], dot(q, k), MASK_VALUE)  # [pairs, kv]
        new_max = jnp.maximum(running_max, jnp.max(score, axis=1))
        rescale = jnp.exp(running_max - new_max)
        # A valid row sees position 0, so its maximum is a real score from the first tile on, and `exp` gives 0 where
        # a key is masked.
        p = jnp.exp(score - new_max[:, None])
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        weighted = lax.dot_general(
            p.astype(q.dtype), v, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        return new_max, total * rescale + jnp.sum(p, axis=1), out * rescale[:, None] + weighted

    empty = (
        jnp.full(sizes.pairs, MASK_VALUE, jnp.float32),
        jnp.zeros(sizes.pairs, jnp.float32),
        jnp.zeros((sizes.pairs, size), jnp.float32),
    )
    # Keys after the last row of the tile add exact zeros, so leaving them out changes no bit.
    iterations = (jnp.max(position) + sizes.kv) // sizes.kv
    _, total, out = lax.fori_loop(0, iterations, add_tile, empty)
    is_valid = position >= 0  # what other rows have added up has no meaning
    out = jnp.where(is_valid[:, None], out / jnp.where(is_valid, total, 1.0)[:, None], 0.0)
    plt.store(y_ref.at[at], apply_gate(out, gate_ref, at, y_ref, mask=row_grid < rows), mask=row_grid < rows)


def prefill_attention(
    q: Float[Array, "B T Q H"],
    keys: Float[Array, "A B N S H"],
    values: Float[Array, "A B N S H"],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    gates: PartialSums,
    *,
    interpret: bool = False,
) -> Float[Array, "B T Q H"]:
    """See `kernels_pallas.attention.attention`."""
    batch, rows, heads, _ = q.shape
    kv_heads = keys.shape[2]
    sizes = PREFILL_TILES[card_class(q.dtype)]
    position = jnp.where(valid, positions, -1).astype(jnp.int32)
    return pl.pallas_call(
        partial(_prefill_kernel, sizes=sizes, kv_heads=kv_heads),
        grid=(-(-rows * (heads // kv_heads) // sizes.pairs), batch * kv_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
        name="attention_prefill",
    )(jnp.asarray(layer, jnp.int32).reshape(1), position, q, keys, values, gates.parts)
