"""Attention over a cache as one or two Pallas kernels, through the Triton lowering, whatever the context length.

As a loop of XLA operations, attention over 32k slots is a hundred turns of a dozen kernels, each turn awaited by the host.
With few rows the cache is cut into pieces of a fixed length that are programs of their own, and a second kernel joins
them in order and multiplies with the gates; tiles of a fixed size make a row's result independent of the other rows, bit
for bit. With many rows (prompt chunks) one program reads all slots.
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

from kernels_pallas.packed.layout import max_row_tile
from kernels_pallas.partial_sums import load_partial_sum
from kernels_pallas.tiles import dot, index_grid

NEGATIVE = -1e30  # finite, so that a row without any key stays free of NaN
SLOTS = 32  # slots that one turn reads
PIECE = 512  # slots of a program with few rows
FEW = 16  # rows of a sequence up to which the cache is cut into pieces: verify windows and draft steps

Sums = tuple[Array, Array, Array]  # top score [R], sum of weights [R], weighted values [H, R]


def _empty(size: int, rows: int) -> Sums:
    return jnp.full(rows, NEGATIVE, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((size, rows), jnp.float32)


def _attend_kernel(
    layer_ref: Any,
    end_ref: Any,
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gate_ref: Any,
    *outs: Any,
    tile: int,
    kv_heads: int,
    piece: int | None,
) -> None:
    """One tile of (row, query head of the group) against one piece of the slots of a key/value head, or all of them."""
    _, rows, heads, size = q_ref.shape
    group = heads // kv_heads
    b, n = pl.program_id(1) // kv_heads, pl.program_id(1) % kv_heads
    r = pl.program_id(0) * tile + jnp.arange(tile)
    t, inside, channel = r // group, r < rows * group, jnp.arange(size)
    head = n * group + r % group
    tt, cc = index_grid(t, channel)
    hh, _ = index_grid(head, channel)
    q = plt.load(q_ref.at[b, tt, hh, cc], mask=(tt < rows), other=0)
    position = plt.load(position_ref.at[b, t], mask=inside, other=-1)
    begin = 0 if piece is None else pl.program_id(2) * piece
    end = end_ref[b] if piece is None else jnp.minimum(end_ref[b], begin + piece)

    def turn(i: Array, sums: Sums) -> Sums:
        top, total, out = sums
        slot = begin + i * SLOTS + jnp.arange(SLOTS)
        ss, cc = index_grid(slot, channel)
        k = plt.load(k_ref.at[layer_ref[0], b, n, ss, cc]).astype(q.dtype)
        v = plt.load(v_ref.at[layer_ref[0], b, n, ss, cc]).astype(q.dtype)
        seen = slot[:, None] <= position[None, :]
        score = jnp.where(seen, dot(k, q), NEGATIVE)  # [slots, R]
        new_top = jnp.maximum(top, jnp.max(score, axis=0))
        keep = jnp.exp(top - new_top)
        p = jnp.where(seen, jnp.exp(score - new_top[None, :]), 0.0)
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        add = lax.dot_general(
            v, p.astype(q.dtype), (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
        return new_top, total * keep + jnp.sum(p, axis=0), out * keep[None, :] + add

    turns = jnp.maximum(end - begin + SLOTS - 1, 0) // SLOTS
    top, total, out = lax.fori_loop(0, turns, turn, _empty(size, tile))
    if piece is None:
        out = out / jnp.where(total > 0, total, 1.0)[None, :]
        plt.store(outs[0].at[b, tt, hh, cc], _gated(out.T, gate_ref, (b, tt, hh, cc), outs[0]), mask=tt < rows)
        return
    at = (pl.program_id(2), pl.program_id(1))
    rr, _ = index_grid(r, channel)

    @pl.when(begin < end)  # nobody reads the others
    def store() -> None:
        plt.store(outs[0].at[(*at, rr, cc)], out.T)
        plt.store(outs[1].at[(*at, r)], top)
        plt.store(outs[2].at[(*at, r)], total)


def _gated(out: Float[Array, "R H"], gate_ref: Any, at: tuple[Array, ...], y_ref: Any) -> Float[Array, "R H"]:
    """The values times the sigmoid of the gates, which stand behind the query of each head."""
    _, rows, _, size = y_ref.shape
    b, t, head, channel = at
    gate = load_partial_sum(gate_ref, b * rows + t, (2 * head + 1) * size + channel, mask=t < rows).astype(y_ref.dtype)
    return (out.astype(y_ref.dtype).astype(jnp.float32) * lax.logistic(gate.astype(jnp.float32))).astype(y_ref.dtype)


def _join_kernel(
    end_ref: Any,
    out_ref: Any,
    top_ref: Any,
    total_ref: Any,
    gate_ref: Any,
    y_ref: Any,
    *,
    tile: int,
    kv_heads: int,
    piece: int,
) -> None:
    """The pieces of one tile, in order."""
    _, rows, heads, size = y_ref.shape
    group = heads // kv_heads
    pair = pl.program_id(1)
    b, n = pair // kv_heads, pair % kv_heads
    r, channel = pl.program_id(0) * tile + jnp.arange(tile), jnp.arange(size)
    rr, cc = index_grid(r, channel)

    def join(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = sums
        its_top = plt.load(top_ref.at[i, pair, r])
        new_top = jnp.maximum(top, its_top)
        keep, take = jnp.exp(top - new_top), jnp.exp(its_top - new_top)
        out = out * keep[:, None] + plt.load(out_ref.at[i, pair, rr, cc]) * take[:, None]
        return new_top, total * keep + plt.load(total_ref.at[i, pair, r]) * take, out

    top, total, out = _empty(size, tile)
    pieces = (end_ref[b] + piece - 1) // piece
    _, total, out = lax.fori_loop(0, pieces, join, (top, total, jnp.zeros((tile, size), jnp.float32)))
    out = out / jnp.where(total > 0, total, 1.0)[:, None]
    at = (b, rr // group, n * group + rr % group, cc)
    plt.store(y_ref.at[at], _gated(out, gate_ref, at, y_ref), mask=rr < rows * group)


def takes(size: int, slots: int) -> bool:
    """Whether the kernels take heads of this size and a cache of so many slots."""
    return size >= 16 and size & (size - 1) == 0 and slots % SLOTS == 0


def attend_cache(
    q: Float[Array, "B T Q H"],
    keys: Float[Array, "A B N S H"],
    values: Float[Array, "A B N S H"],
    layer: Array | int,
    positions: Int[Array, "B T"],
    live: Bool[Array, "B T"],
    gates: Float[Array, "S B*T Q*2*H"],
    *,
    interpret: bool = False,
) -> Float[Array, "B T Q H"]:
    """Causal attention: a live row at position p sees slots 0...p of its sequence in layer `layer`; others give zero. Then
    every head is multiplied with the sigmoid of its gate.

    Args:
        q: rows, already scaled; head h reads key/value head `h // (Q / N)`. H is a power of two, at least 16.
        gates: the projection that q comes from, as parts to be added in their order: of each head the query, then the gate.
        keys, values: the whole cache; S is a multiple of 32. Nothing beyond the last live row is read.
        interpret: run as plain `jnp`, on any device.

    Raises:
        ValueError: H or S is not of that kind.
    """
    batch, rows, heads, size = q.shape
    kv_heads, slots = keys.shape[2:4]
    if not takes(size, slots):
        raise ValueError(f"head size {size} must be a power of two from 16 on, {slots} slots a multiple of {SLOTS}")
    position = jnp.where(live, positions, -1).astype(jnp.int32)
    end = jnp.max(position, axis=1) + 1
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    pairs, few = batch * kv_heads, rows <= FEW
    tile = 16 if few else max_row_tile(q.dtype)
    tiles = -(-rows * (heads // kv_heads) // tile)
    piece = PIECE if few else None
    pieces = -(-slots // PIECE) if few else 1
    shapes: Any = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if few:
        part = (pieces, pairs, tiles * tile)
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*part, size), part, part)]
    out = pl.pallas_call(
        partial(_attend_kernel, tile=tile, kv_heads=kv_heads, piece=piece),
        grid=(tiles, pairs, pieces),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(num_warps=4 if tile == 16 else 8, num_stages=2),
        interpret=interpret,
        name="attention_few" if few else "attention_many",
    )(index, end, position, q, keys, values, gates)
    if not few:
        return out
    return pl.pallas_call(
        partial(_join_kernel, tile=tile, kv_heads=kv_heads, piece=PIECE),
        grid=(tiles, pairs),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_join",
    )(end, *out, gates)
