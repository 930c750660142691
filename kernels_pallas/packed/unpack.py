"""32-bit words of a stored weight -> the numbers in them, inside a kernel, in registers, in as few instructions as may be.

A GPU that reads four bits a weight at full speed has time for four to ten instructions a weight, so each of them counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.packed.ptx_ops import Instructions

PAIR_SCALE = 128.0  # `pairs` gives numbers divided by this


class Codes(NamedTuple):
    """Bytes that stand for the numbers of a word: n for `n + first`.

    Attributes:
        words: uint32, four bytes each.
        places: for two neighbours each: their word, and their bytes in it.
        first: a whole number.
        limit: the bytes are below this.
    """

    words: list[Array]
    places: list[tuple[int, int, int]]
    first: int
    limit: int


def pairs(form: Any, word: Array, ops: Instructions, high: Array | None = None) -> list[Array]:
    """Pairs of bfloat16 of the numbers of a word, divided by `PAIR_SCALE`, before scale and offset; see `codes`.

    A whole number up to 255 is a bfloat16 of the same bits in units of 2^-133, so that no instruction converts it; the
    bits of a float8_e4m3fn, moved, are one whose exponent counts from elsewhere.
    """
    zero = jnp.zeros_like(word)
    if form.layout == "fp8":
        upper = [
            ops.select(word, zero, selector) for selector in (0x1404, 0x3424)
        ]  # a byte to the upper half of each half
        moved = [p & jnp.uint32(0x80008000) | p >> jnp.uint32(4) & jnp.uint32(0x07F007F0) for p in upper]
        return [ops.numbers(p, 2.0**120 / PAIR_SCALE, 0.0) for p in moved]
    found = codes(form, word, ops, high)
    whole = [ops.select(found.words[n], zero, 0x4040 | a | b << 8) for n, a, b in found.places]
    return [ops.numbers(p, 2.0**133 / PAIR_SCALE, found.first / PAIR_SCALE) for p in whole]


def floats(form: Any, word: Array, ops: Instructions, high: Array | None = None) -> tuple[list[Array], int]:
    """float32 values m and a bias: the numbers of a word are `m - bias`, before scale and offset; see `codes`."""
    if form.layout == "fp8":
        return [v.astype(jnp.float32) * PAIR_SCALE for pair in pairs(form, word, ops) for v in ops.split(pair)], 0
    found = codes(form, word, ops, high)
    # The byte as bits 16 to 22 of a float32 that begins at 128, or a larger one as bits 8 to 15 of one that begins at 2^15.
    base, exponent, selector, place = (
        (128, 0x43000000, 0x7044, 8) if found.limit <= 128 else (1 << 15, 0x47000000, 0x7404, 4)
    )
    top = ops.constant(exponent, word.shape)
    bits = [ops.select(found.words[n], top, selector | byte << place) for n, *two in found.places for byte in two]
    return [lax.bitcast_convert_type(m, jnp.float32) for m in bits], base - found.first


def codes(form: Any, word: Array, ops: Instructions, high: Array | None = None) -> Codes:
    """The bytes of a word of indices or of `codes8`, in the order of elements; of indices, those of low nibbles first.

    Args:
        form: a `kernels_pallas.packed.dequantize.Form`.
        high: the high bits of `codes5` and `codes6`, for each word.
    """
    if form.layout == "codes8":  # two's complement with the top bit flipped is the value + 128
        return Codes([word ^ jnp.uint32(0x80808080)], [(0, 0, 1), (0, 2, 3)], -128, 256)
    assert form.table is not None
    first, size = form.table[0], len(form.table)
    if form.table != tuple(range(first, first + size)):
        return Codes(_looked_up(form.table, word, ops), [(0, 0, 2), (1, 0, 2), (0, 1, 3), (1, 1, 3)], -128, 256)
    halves = [half & jnp.uint32(0x0F0F0F0F) for half in (word, word >> jnp.uint32(4))]
    if high is not None:
        moved = _raised_bit if form.layout == "codes5" else _raised_two
        halves = [low | moved(high, half) for half, low in enumerate(halves)]
    return Codes(halves, [(0, 0, 1), (0, 2, 3), (1, 0, 1), (1, 2, 3)], first, size)


def _looked_up(table: tuple[int, ...], word: Array, ops: Instructions) -> list[Array]:
    """The entry + 128 for each nibble of a word, the lowest first, four bytes each."""
    halves = (word, word >> jnp.uint32(16))

    def entries(values: Iterable[int]) -> list[Array]:
        sizes = list(values)
        return [
            ops.constant(sum(v << 8 * i for i, v in enumerate(sizes[n : n + 4])), word.shape) for n in (0, 4, 8, 12)
        ]

    signs = [1 if min(half) >= 0 else -1 if max(half) <= 0 else 0 for half in (table[:8], table[8:])]
    found = []
    if all(signs) and max(map(abs, table)) < 128:
        # Each half of the table by its magnitudes: where bit 3 names the other half, `select` gives eight times the
        # sign of a byte, which is 0.
        sizes = entries(abs(t) for t in table)
        for nibbles in halves:
            total = jnp.full_like(word, jnp.uint32(0x80808080))
            for half, sign in enumerate(signs):
                size = ops.select(sizes[2 * half], sizes[2 * half + 1], nibbles ^ jnp.uint32(0x88888888 * half))
                total = total + size if sign > 0 else total - size
            found.append(total)
        return found
    raised = entries(t + 128 for t in table)
    for nibbles in halves:  # a byte by the low three bits from each half, and one of the two by bit 3
        low = nibbles & jnp.uint32(0x7777)
        both = (ops.select(raised[0], raised[1], low), ops.select(raised[2], raised[3], low))
        found.append(ops.select(*both, nibbles >> jnp.uint32(1) & jnp.uint32(0x4444) | jnp.uint32(0x3210)))
    return found


def _raised_bit(high: Array, half: int) -> Array:
    """Bits 0, 2, 4, 6 (half 0) or 1, 3, 5, 7 at bit 4 of the four bytes. By a product, which moves each to each place; those
    that meet between the places carry no farther than the next bit, which no other one comes to."""
    return (high & jnp.uint32(0x55 << half)) * jnp.uint32(0x00410410 >> half) & jnp.uint32(0x10101010)


def _raised_two(high: Array, half: int) -> Array:
    """Bits 0-1, 4-5, 8-9, 12-13 (half 0) or the two above each at bits 4-5 of the four bytes: by products, as `_raised_bit`,
    which spread them to 16 bits and to 8."""
    wide = (high >> jnp.uint32(2 * half) & jnp.uint32(0x3333)) * jnp.uint32(0x101) & jnp.uint32(0x00330033)
    return wide * jnp.uint32(0x110) & jnp.uint32(0x30303030)
