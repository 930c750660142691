"""32-bit words of a stored weight -> the numbers in them, inside a kernel, in registers.

A GPU that reads four bits a weight at full speed has time for four to ten instructions a weight, so each one counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, UInt32

from kernels_pallas.packed.layout import PackedLayout
from kernels_pallas.packed.ptx_ops import WordOps

PAIR_SCALE = 128.0  # `unpack_bf16x2` gives the numbers divided by this


class UnpackedBytes(NamedTuple):
    """Bytes that stand for the numbers of a word: byte n stands for the number `n + first`.

    Attributes:
        words: words of four bytes each.
        byte_pairs: for every two neighbouring elements: the index of their word, and their bytes in it.
        first: the number that byte 0 stands for.
        limit: all bytes are below this.
    """

    words: list[UInt32[Array, "*tile"]]
    byte_pairs: list[tuple[int, int, int]]
    first: int
    limit: int


def unpack_bf16x2(
    layout: PackedLayout, word: UInt32[Array, "*tile"], ops: WordOps, high: UInt32[Array, "*tile"] | None = None
) -> list[UInt32[Array, "*tile"]]:
    """Return the numbers of a word, before scale and offset, divided by `PAIR_SCALE`, as pairs of bfloat16.

    A whole number up to 255 has the bits of a bfloat16 in units of 2^-133, so no instruction converts it. The bits of a
    float8_e4m3fn, moved, are those of a bfloat16 whose exponent counts from another number.

    Args:
        layout, high: as for `unpack_bytes`.
    """
    zero = jnp.zeros_like(word)
    if layout.layout == "fp8":
        # Each byte to the upper half of a half word.
        upper = [ops.byte_perm(word, zero, selector) for selector in (0x1404, 0x3424)]
        moved = [p & jnp.uint32(0x80008000) | p >> jnp.uint32(4) & jnp.uint32(0x07F007F0) for p in upper]
        return [ops.affine_bf16x2(p, 2.0**120 / PAIR_SCALE, 0.0) for p in moved]
    unpacked = unpack_bytes(layout, word, ops, high)
    tiny = [ops.byte_perm(unpacked.words[n], zero, 0x4040 | a | b << 8) for n, a, b in unpacked.byte_pairs]
    return [ops.affine_bf16x2(p, 2.0**133 / PAIR_SCALE, unpacked.first / PAIR_SCALE) for p in tiny]


def unpack_f32(
    layout: PackedLayout, word: UInt32[Array, "*tile"], ops: WordOps, high: UInt32[Array, "*tile"] | None = None
) -> tuple[list[Float[Array, "*tile"]], int]:
    """Return float32 values m and a bias: the numbers of a word, before scale and offset, are `m - bias`.

    Args:
        layout, high: as for `unpack_bytes`.
    """
    if layout.layout == "fp8":
        pairs = unpack_bf16x2(layout, word, ops)
        return [half.astype(jnp.float32) * PAIR_SCALE for pair in pairs for half in ops.split_bf16x2(pair)], 0
    unpacked = unpack_bytes(layout, word, ops, high)
    # The byte becomes bits 16 to 22 of a float32 that counts from 128, or a larger byte bits 8 to 15 of one from 2^15.
    if unpacked.limit <= 128:
        base, exponent, selector, shift = 128, 0x43000000, 0x7044, 8
    else:
        base, exponent, selector, shift = 1 << 15, 0x47000000, 0x7404, 4
    top = ops.opaque_constant(exponent, word.shape)
    bits = [
        ops.byte_perm(unpacked.words[n], top, selector | byte << shift)
        for n, *pair in unpacked.byte_pairs
        for byte in pair
    ]
    return [lax.bitcast_convert_type(m, jnp.float32) for m in bits], base - unpacked.first


def unpack_bytes(
    layout: PackedLayout, word: UInt32[Array, "*tile"], ops: WordOps, high: UInt32[Array, "*tile"] | None = None
) -> UnpackedBytes:
    """Return the bytes of a word of indices or of "codes8", in the order of elements: low nibbles come first.

    Args:
        layout: the layout of the weight, which is not "plain" nor "fp8".
        word: words of codes.
        high: the high bits of the indices of each word, for "codes5" and "codes6".
    """
    if layout.layout == "codes8":  # two's complement with the top bit flipped is the value + 128
        return UnpackedBytes([word ^ jnp.uint32(0x80808080)], [(0, 0, 1), (0, 2, 3)], -128, 256)
    assert layout.table is not None
    first, size = layout.table[0], len(layout.table)
    if layout.table != tuple(range(first, first + size)):
        pairs = [(0, 0, 2), (1, 0, 2), (0, 1, 3), (1, 1, 3)]
        return UnpackedBytes(_look_up(layout.table, word, ops), pairs, -128, 256)
    nibbles = [half & jnp.uint32(0x0F0F0F0F) for half in (word, word >> jnp.uint32(4))]
    if high is not None:
        spread = _spread_single_bits if layout.layout == "codes5" else _spread_bit_pairs
        nibbles = [low | spread(high, half) for half, low in enumerate(nibbles)]
    return UnpackedBytes(nibbles, [(0, 0, 1), (0, 2, 3), (1, 0, 1), (1, 2, 3)], first, size)


def _look_up(table: tuple[int, ...], word: UInt32[Array, "*tile"], ops: WordOps) -> list[UInt32[Array, "*tile"]]:
    """Return the table's entry + 128 for each nibble of a word, the lowest nibble first, as two words of four bytes."""
    half_words = (word, word >> jnp.uint32(16))

    def table_words(entries: Iterable[int]) -> list[Array]:
        """Return the 16 entries as four words that the compiler does not know."""
        values = list(entries)
        words = [sum(v << 8 * i for i, v in enumerate(values[n : n + 4])) for n in (0, 4, 8, 12)]
        return [ops.opaque_constant(bits, word.shape) for bits in words]

    signs = [1 if min(half) >= 0 else -1 if max(half) <= 0 else 0 for half in (table[:8], table[8:])]
    result = []
    if all(signs) and max(map(abs, table)) < 128:
        # Each half of the table has one sign, so look up magnitudes: where bit 3 of a nibble names the other half,
        # `byte_perm` gives eight times the sign of a byte, which is 0.
        magnitudes = table_words(abs(entry) for entry in table)
        for nibbles in half_words:
            total = jnp.full_like(word, jnp.uint32(0x80808080))
            for half, sign in enumerate(signs):
                selector = nibbles ^ jnp.uint32(0x88888888 * half)
                magnitude = ops.byte_perm(magnitudes[2 * half], magnitudes[2 * half + 1], selector)
                total = total + magnitude if sign > 0 else total - magnitude
            result.append(total)
        return result
    raised = table_words(entry + 128 for entry in table)
    for nibbles in half_words:  # a byte of each half by the low three bits of the nibble, then one of the two by bit 3
        low_bits = nibbles & jnp.uint32(0x7777)
        candidates = (ops.byte_perm(raised[0], raised[1], low_bits), ops.byte_perm(raised[2], raised[3], low_bits))
        selector = nibbles >> jnp.uint32(1) & jnp.uint32(0x4444) | jnp.uint32(0x3210)
        result.append(ops.byte_perm(*candidates, selector))
    return result


def _spread_single_bits(high: UInt32[Array, "*tile"], half: int) -> UInt32[Array, "*tile"]:
    """Move bits 0, 2, 4, 6 (half 0) or bits 1, 3, 5, 7 (half 1) to bit 4 of the four bytes.

    The factor has one bit for each target position. Partial products that meet elsewhere never carry into one.
    """
    return (high & jnp.uint32(0x55 << half)) * jnp.uint32(0x00410410 >> half) & jnp.uint32(0x10101010)


def _spread_bit_pairs(high: UInt32[Array, "*tile"], half: int) -> UInt32[Array, "*tile"]:
    """Move bits 0-1, 4-5, 8-9, 12-13 (half 0) or the two bits above each (half 1) to bits 4-5 of the four bytes.

    Two products do so as in `_spread_single_bits`: the first spreads the bits to 16-bit halves, the second to bytes.
    """
    pairs = high >> jnp.uint32(2 * half) & jnp.uint32(0x3333)
    in_halves = pairs * jnp.uint32(0x101) & jnp.uint32(0x00330033)
    return in_halves * jnp.uint32(0x110) & jnp.uint32(0x30303030)
