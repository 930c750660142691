"""Attention of few rows (verify windows, draft steps) over a key/value cache, as two Pallas kernels through the Triton
lowering (flash-decoding).

The first kernel cuts the cache into pieces that depend on nothing but the position in the cache. It computes, for every
piece and every (row, query head) pair that sees a key of it, the largest score, the sum of the weights and the weighted
sum of the values. The second kernel joins the pieces of each pair, a tile of pieces after the other, in the order of
their positions. So a row's bits depend on its own position alone: not on other rows, on other sequences, or on the
length of the cache. How pieces are dealt out to programs changes no sum, and may follow the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.gate import apply_gate
from kernels_pallas.attention.reference import MASK_VALUE
from kernels_pallas.attention.tile_sizes import (
    DECODE_PROGRAMS,
    DECODE_TILES,
    JOIN_CHANNELS,
    JOIN_PIECES,
    JOIN_WARPS,
    MAX_TEMP_BYTES,
    PIECES,
    AttentionTile,
    card_class,
)
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.tiles import dot, index_grid


def count_pieces(end: Any, xp: Any = jnp) -> Any:
    """Return the number of pieces that hold the first `end` positions. xp: numpy for a number, jax.numpy in kernels."""
    count, begin = 0, 0
    for pieces in PIECES:
        here = xp.clip(end - begin, 0, pieces.end - begin)
        count = count + ((here + pieces.size - 1) >> (pieces.size.bit_length() - 1))
        begin = pieces.end
    return count


def piece_bounds(piece: Array) -> tuple[Array, Array]:
    """Return the first position of a piece, and the first one after it."""
    begin, first = jnp.int32(0), 0
    size, start = jnp.int32(0), 0
    for pieces in PIECES:
        is_here = piece >= first
        begin = jnp.where(is_here, start + (piece - first) * pieces.size, begin)
        size = jnp.where(is_here, pieces.size, size)
        first += (pieces.end - start) // pieces.size
        start = pieces.end
    return begin, begin + size


def _pieces_kernel(
    layer_ref: Any,
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    max_ref: Any,
    total_ref: Any,
    *,
    sizes: AttentionTile,
    programs: int,
    first: int,
) -> None:
    """Compute the sums of every `programs`-th piece for a tile of pairs, all with the same key/value head."""
    _, rows, heads, size = q_ref.shape
    kv_heads = k_ref.shape[2]
    group = heads // kv_heads
    sequence_head = pl.program_id(1)
    layer, b, n = layer_ref[0], first + sequence_head // kv_heads, sequence_head % kv_heads
    pair = pl.program_id(0) * sizes.pairs + jnp.arange(sizes.pairs)
    row, head, channel = lax.div(pair, group), n * group + lax.rem(pair, group), jnp.arange(size)
    row_grid, channel_grid = index_grid(row, channel)
    head_grid, _ = index_grid(head, channel)
    q = plt.load(q_ref.at[b, row_grid, head_grid, channel_grid], mask=row_grid < rows, other=0)
    position = plt.load(position_ref.at[b, row], mask=row < rows, other=-1)
    end = jnp.max(position) + 1
    last, program = count_pieces(end) - 1, pl.program_id(2)

    def add_tile(i: Array, carry: tuple[Array, ...], begin: Array) -> tuple[Array, ...]:
        running_max, total, out = carry
        kv_position = begin + i * sizes.kv + jnp.arange(sizes.kv)
        kv_grid, channel_grid = index_grid(kv_position, channel)
        k = plt.load(k_ref.at[layer, b, n, kv_grid, channel_grid]).astype(q.dtype)
        v = plt.load(v_ref.at[layer, b, n, kv_grid, channel_grid]).astype(q.dtype)
        score = jnp.where(kv_position[:, None] <= position[None, :], dot(k, q), MASK_VALUE)  # [sizes.kv, R]
        new_max = jnp.maximum(running_max, jnp.max(score, axis=0))
        rescale = jnp.exp(running_max - new_max)
        # A pair that sees a key of the piece sees its first one, so its maximum is a real score from the first turn on,
        # and `exp` gives 0 where a key is masked. The sums of other pairs are not stored.
        p = jnp.exp(score - new_max[None, :])
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        weighted = lax.dot_general(
            v, p.astype(q.dtype), (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        # The sum over positions waits until after the loop, because it passes between warps.
        return new_max, total * rescale[None, :] + p, out * rescale[None, :] + weighted

    def add_piece(i: Array, carry: Array) -> Array:
        piece = last - program - i * programs  # the longest pieces first
        begin, piece_end = piece_bounds(piece)
        turns = (jnp.minimum(end, piece_end) - begin + sizes.kv - 1) // sizes.kv
        empty = (
            jnp.full(sizes.pairs, MASK_VALUE, jnp.float32),
            jnp.zeros((sizes.kv, sizes.pairs), jnp.float32),
            jnp.zeros((size, sizes.pairs), jnp.float32),
        )
        running_max, total, out = lax.fori_loop(0, turns, partial(add_tile, begin=begin), empty)
        sees = position >= begin
        pair_grid, channel_grid = index_grid(pair, channel)
        sees_grid = jnp.broadcast_to(sees[:, None], pair_grid.shape)
        plt.store(out_ref.at[sequence_head, pair_grid, piece, channel_grid], out.T, mask=sees_grid)
        plt.store(max_ref.at[sequence_head, pair, piece], running_max, mask=sees)
        plt.store(total_ref.at[sequence_head, pair, piece], jnp.sum(total, axis=0), mask=sees)
        return carry

    mine = (last - program + programs) // programs
    lax.fori_loop(0, mine, add_piece, jnp.int32(0))


def _join_kernel(
    position_ref: Any,
    out_ref: Any,
    max_ref: Any,
    total_ref: Any,
    gate_ref: Any,
    y_ref: Any,
    *,
    kv_heads: int,
    channels: int,
    first: int,
) -> None:
    """Join the pieces that a pair sees, for some channels, and apply the gate."""
    _, rows, heads, size = y_ref.shape
    group, blocks = heads // kv_heads, size // channels
    pair, block, sequence_head = pl.program_id(0) // blocks, pl.program_id(0) % blocks, pl.program_id(1)
    sequence, n = sequence_head // kv_heads, sequence_head % kv_heads
    b, row, head = first + sequence, pair // group, n * group + pair % group
    channel = block * channels + jnp.arange(channels)
    num_pieces = count_pieces(position_ref[b, row] + 1)

    def add_pieces(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        running_max, total, out = sums
        piece = i * JOIN_PIECES + jnp.arange(JOIN_PIECES)
        exists = piece < num_pieces
        piece_grid, channel_grid = index_grid(piece, channel)
        exists_grid = jnp.broadcast_to(exists[:, None], piece_grid.shape)
        piece_max = plt.load(max_ref.at[sequence_head, pair, piece], mask=exists, other=MASK_VALUE)
        piece_total = plt.load(total_ref.at[sequence_head, pair, piece], mask=exists, other=0)
        piece_out = plt.load(out_ref.at[sequence_head, pair, piece_grid, channel_grid], mask=exists_grid, other=0)
        new_max = jnp.maximum(running_max, jnp.max(piece_max))
        rescale, weight = jnp.exp(running_max - new_max), jnp.exp(piece_max - new_max)
        out = out * rescale + jnp.sum(piece_out * weight[:, None], axis=0)
        return new_max, total * rescale + jnp.sum(piece_total * weight), out

    empty = (jnp.float32(MASK_VALUE), jnp.float32(0), jnp.zeros(channels, jnp.float32))
    tiles = (num_pieces + JOIN_PIECES - 1) // JOIN_PIECES
    _, total, out = lax.fori_loop(0, tiles, add_pieces, empty)
    out = out / jnp.where(total > 0, total, 1.0)
    plt.store(y_ref.at[sequence, row, head, channel], apply_gate(out, gate_ref, (b, row, head, channel), y_ref))


def decode_attention(
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
    """See `kernels_pallas.attention.attention`.

    The sums of pieces take `Q / N * T * H * 4` bytes a piece and key/value head, as many pieces as the whole cache has.
    """
    batch, rows, heads, size = q.shape
    kv_heads, kv_len = keys.shape[2:4]
    position = jnp.where(valid, positions, -1).astype(jnp.int32)
    pairs, pieces = rows * (heads // kv_heads), int(count_pieces(kv_len, np))
    turns = -(-batch // max(1, MAX_TEMP_BYTES // (kv_heads * pairs * pieces * size * 4)))
    sequences = -(-batch // turns)
    index, results = jnp.asarray(layer, jnp.int32).reshape(1), list[Array]()
    for first in range(0, batch, sequences):
        if results:  # the sums of these sequences take the memory of the former ones
            index, results[-1] = lax.optimization_barrier((index, results[-1]))
        num = min(sequences, batch - first)
        results.append(_attend(index, position, q, keys, values, gates.parts, first, num, pieces, interpret))
    return results[0] if len(results) == 1 else jnp.concatenate(results)


def _attend(
    layer: Int[Array, " 1"],
    position: Int[Array, "B T"],
    q: Float[Array, "B T Q H"],
    keys: Float[Array, "A B N S H"],
    values: Float[Array, "A B N S H"],
    gates: Float[Array, "P BT QH2"],
    first: int,
    sequences: int,
    pieces: int,
    interpret: bool,
) -> Float[Array, "sequences T Q H"]:
    """Compute some sequences, from number `first` on."""
    _, rows, heads, size = q.shape
    kv_heads = keys.shape[2]
    pairs, sequence_heads, sizes = rows * (heads // kv_heads), sequences * kv_heads, DECODE_TILES[card_class(q.dtype)]
    tiles = -(-pairs // sizes.pairs)
    programs = min(pieces, -(-DECODE_PROGRAMS // (sequence_heads * tiles)))
    # Whole tiles of maxima and totals: their alignment, and with it the order of sums, is that of any other cache.
    padded = -(-pieces // JOIN_PIECES) * JOIN_PIECES
    shapes = ((sequence_heads, pairs, pieces, size), *[(sequence_heads, pairs, padded)] * 2)
    sums = pl.pallas_call(
        partial(_pieces_kernel, sizes=sizes, programs=programs, first=first),
        grid=(tiles, sequence_heads, programs),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=plt.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
        name="attention_decode",
    )(layer, position, q, keys, values)
    channels = min(JOIN_CHANNELS, size)
    return pl.pallas_call(
        partial(_join_kernel, kv_heads=kv_heads, channels=channels, first=first),
        grid=(pairs * (size // channels), sequence_heads),
        out_shape=jax.ShapeDtypeStruct((sequences, rows, heads, size), q.dtype),
        compiler_params=plt.CompilerParams(num_warps=JOIN_WARPS, num_stages=1),
        interpret=interpret,
        name="attention_join",
    )(position, *sums, gates)
