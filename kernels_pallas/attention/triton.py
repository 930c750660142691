"""Attention over a cache as one or two Pallas kernels, through the Triton lowering, whatever the context length.

As a loop of XLA operations, attention over 32k cache positions is a hundred iterations of a dozen kernels, and the host
waits for every iteration. With few rows (verify windows, draft steps) the cache is split into pieces of a fixed length,
each piece is a program of its own, and a second kernel combines them in order and applies the gates (flash-decoding).
Splits and tiles have a fixed size, so a row's result does not depend on the other rows, bit for bit. With many rows
(prompt chunks) one program reads the whole cache.
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

from kernels_pallas.attention.reference import MASK_VALUE
from kernels_pallas.packed.layout import max_row_tile
from kernels_pallas.partial_sums import PartialSums, load_partial_sum
from kernels_pallas.tiles import dot, index_grid

MIN_HEAD_DIM = 16
KV_TILE = 32  # cache positions that one loop iteration reads
KV_SPLIT = 512  # cache positions of one program where the cache is split
DECODE_ROWS = 16  # rows of a sequence up to which the cache is split
DECODE_TILE = 16  # (row, query head) pairs of one program where the cache is split

Sums = tuple[Array, Array, Array]  # running maximum [R], sum of weights [R], weighted values [H, R]


def supports(head_dim: int, kv_len: int) -> bool:
    """Return whether the kernels support heads of this size and a cache of this length."""
    return head_dim >= MIN_HEAD_DIM and head_dim & (head_dim - 1) == 0 and kv_len % KV_TILE == 0


def _attention_kernel(
    layer_ref: Any,
    end_ref: Any,
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gate_ref: Any,
    *out_refs: Any,
    tile: int,
    kv_heads: int,
    split: int | None,
) -> None:
    """Compute one tile of (row, query head) pairs against one split of the cache of a key/value head, or all of it.

    All query heads of a tile read the same key/value head. With splits the kernel stores its sums for
    `_reduce_splits_kernel`; without, it stores the result.
    """
    _, rows, heads, size = q_ref.shape
    group = heads // kv_heads
    b, n = pl.program_id(1) // kv_heads, pl.program_id(1) % kv_heads
    pair = pl.program_id(0) * tile + jnp.arange(tile)
    row, pair_exists, channel = pair // group, pair < rows * group, jnp.arange(size)
    head = n * group + pair % group
    row_grid, channel_grid = index_grid(row, channel)
    head_grid, _ = index_grid(head, channel)
    q = plt.load(q_ref.at[b, row_grid, head_grid, channel_grid], mask=(row_grid < rows), other=0)
    position = plt.load(position_ref.at[b, row], mask=pair_exists, other=-1)
    begin = 0 if split is None else pl.program_id(2) * split
    end = end_ref[b] if split is None else jnp.minimum(end_ref[b], begin + split)

    def add_tile(i: Array, sums: Sums) -> Sums:
        running_max, total, out = sums
        kv_position = begin + i * KV_TILE + jnp.arange(KV_TILE)
        kv_grid, channel_grid = index_grid(kv_position, channel)
        k = plt.load(k_ref.at[layer_ref[0], b, n, kv_grid, channel_grid]).astype(q.dtype)
        v = plt.load(v_ref.at[layer_ref[0], b, n, kv_grid, channel_grid]).astype(q.dtype)
        mask = kv_position[:, None] <= position[None, :]
        score = jnp.where(mask, dot(k, q), MASK_VALUE)  # [KV_TILE, R]
        new_max = jnp.maximum(running_max, jnp.max(score, axis=0))
        rescale = jnp.exp(running_max - new_max)
        p = jnp.where(mask, jnp.exp(score - new_max[None, :]), 0.0)
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        weighted = lax.dot_general(
            v, p.astype(q.dtype), (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        return new_max, total * rescale + jnp.sum(p, axis=0), out * rescale[None, :] + weighted

    iterations = jnp.maximum(end - begin + KV_TILE - 1, 0) // KV_TILE
    running_max, total, out = lax.fori_loop(0, iterations, add_tile, _empty_sums(size, tile))
    if split is None:
        out = out / jnp.where(total > 0, total, 1.0)[None, :]
        at = (b, row_grid, head_grid, channel_grid)
        plt.store(out_refs[0].at[at], _apply_gate(out.T, gate_ref, at, out_refs[0]), mask=row_grid < rows)
        return
    program = (pl.program_id(2), pl.program_id(1))
    pair_grid, _ = index_grid(pair, channel)

    @pl.when(begin < end)  # no kernel reads the sums of an empty split
    def store() -> None:
        plt.store(out_refs[0].at[(*program, pair_grid, channel_grid)], out.T)
        plt.store(out_refs[1].at[(*program, pair)], running_max)
        plt.store(out_refs[2].at[(*program, pair)], total)


def _empty_sums(size: int, tile: int) -> Sums:
    return jnp.full(tile, MASK_VALUE, jnp.float32), jnp.zeros(tile, jnp.float32), jnp.zeros((size, tile), jnp.float32)


def _apply_gate(out: Float[Array, "R H"], gate_ref: Any, at: tuple[Array, ...], y_ref: Any) -> Float[Array, "R H"]:
    """Multiply values with the sigmoid of their gates. In the projection a head's gate follows its query."""
    _, rows, _, size = y_ref.shape
    b, row, head, channel = at
    column = (2 * head + 1) * size + channel
    gate = load_partial_sum(gate_ref, b * rows + row, column, mask=row < rows).astype(y_ref.dtype)
    return (out.astype(y_ref.dtype).astype(jnp.float32) * lax.logistic(gate.astype(jnp.float32))).astype(y_ref.dtype)


def _reduce_splits_kernel(
    end_ref: Any,
    out_ref: Any,
    max_ref: Any,
    total_ref: Any,
    gate_ref: Any,
    y_ref: Any,
    *,
    tile: int,
    kv_heads: int,
    split: int,
) -> None:
    """Combine the splits of one tile, in order."""
    _, rows, heads, size = y_ref.shape
    group = heads // kv_heads
    sequence_head = pl.program_id(1)
    b, n = sequence_head // kv_heads, sequence_head % kv_heads
    pair, channel = pl.program_id(0) * tile + jnp.arange(tile), jnp.arange(size)
    pair_grid, channel_grid = index_grid(pair, channel)

    def add_split(i: Array, sums: Sums) -> Sums:
        running_max, total, out = sums
        split_max = plt.load(max_ref.at[i, sequence_head, pair])
        new_max = jnp.maximum(running_max, split_max)
        rescale, split_rescale = jnp.exp(running_max - new_max), jnp.exp(split_max - new_max)
        split_out = plt.load(out_ref.at[i, sequence_head, pair_grid, channel_grid])
        split_total = plt.load(total_ref.at[i, sequence_head, pair])
        out = out * rescale[:, None] + split_out * split_rescale[:, None]
        return new_max, total * rescale + split_total * split_rescale, out

    running_max, total, _ = _empty_sums(size, tile)
    splits = (end_ref[b] + split - 1) // split
    _, total, out = lax.fori_loop(0, splits, add_split, (running_max, total, jnp.zeros((tile, size), jnp.float32)))
    out = out / jnp.where(total > 0, total, 1.0)[:, None]
    at = (b, pair_grid // group, n * group + pair_grid % group, channel_grid)
    plt.store(y_ref.at[at], _apply_gate(out, gate_ref, at, y_ref), mask=pair_grid < rows * group)


def attention(
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
    """See `kernels_pallas.attention.attention`. Nothing beyond the last valid row of a sequence is read.

    Args:
        interpret: run the kernels in interpret mode, on any device.
    """
    batch, rows, heads, size = q.shape
    kv_heads, kv_len = keys.shape[2:4]
    position = jnp.where(valid, positions, -1).astype(jnp.int32)
    end = jnp.max(position, axis=1) + 1
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    sequence_heads, is_split = batch * kv_heads, rows <= DECODE_ROWS
    tile = DECODE_TILE if is_split else max_row_tile(q.dtype)
    tiles = -(-rows * (heads // kv_heads) // tile)
    splits = -(-kv_len // KV_SPLIT) if is_split else 1
    out_shape: Any = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if is_split:
        sums = (splits, sequence_heads, tiles * tile)
        out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*sums, size), sums, sums)]
    out = pl.pallas_call(
        partial(_attention_kernel, tile=tile, kv_heads=kv_heads, split=KV_SPLIT if is_split else None),
        grid=(tiles, sequence_heads, splits),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=4 if tile == DECODE_TILE else 8, num_stages=2),
        interpret=interpret,
        name="attention_decode" if is_split else "attention_prefill",
    )(index, end, position, q, keys, values, gates.parts)
    if not is_split:
        return out
    return pl.pallas_call(
        partial(_reduce_splits_kernel, tile=tile, kv_heads=kv_heads, split=KV_SPLIT),
        grid=(tiles, sequence_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_reduce_splits",
    )(end, *out, gates.parts)
