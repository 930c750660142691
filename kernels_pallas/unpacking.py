"""32-bit words of a stored weight -> the numbers in them, inside a kernel, in registers, in as few instructions as may be.

A GPU that reads four bits a weight at full speed has time for four to ten instructions a weight, so each of them counts.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.instructions import Instructions
from kernels_pallas.quantized import INDICES

BYTE = 1 << 15  # `_bytes` gives this and the byte
E4M3_SCALE = 256.0


def unpack(form: Any, word: Array, ops: Instructions, high: Array | None = None) -> tuple[list[Array], int]:
    """float32 values m and a bias: the slots of words of indices and of `codes8` hold `m - bias`, before scale and offset;
    those of `fp8` m times `E4M3_SCALE`.

    `codes4` looks 4 nibbles up at a time: two selections of a byte by the low three bits, in each half of the table,
    and one between their results by bit 3.

    Args:
        form: a `kernels_pallas.packed_words.Form`.
        high: the high bits of `codes5` and `codes6`, for each word.
    """
    if form.slots == 1:
        return [word], 0
    if form.layout == "codes8":  # two's complement with the top bit flipped is the value + 128
        return _bytes(word ^ jnp.uint32(0x80808080), ops), BYTE + 128
    if form.layout == "fp8":
        return _e4m3(word, ops), 0
    assert form.table is not None
    first, steps = form.table[0], {b - a for a, b in zip(form.table, form.table[1:], strict=False)}
    if high is not None:
        bits = INDICES[form.layout] - 4
        top = [_moved(high, bits * n, 12) & jnp.uint32((1 << bits) - 1 << 12) for n in range(8)]
        return [_float(a | b) for a, b in zip(_nibble_bits(word, ops), top, strict=True)], BYTE - first
    if len(steps) == 1:  # evenly spaced: no table
        even, step = [_float(n) for n in _nibble_bits(word, ops)], steps.pop()
        return (even, BYTE - first) if step == 1 else ([(m - BYTE) * step + first for m in even], 0)
    quarters = [sum((t + 128) << 8 * i for i, t in enumerate(form.table[4 * q : 4 * q + 4])) for q in range(4)]
    table = [ops.constant(q, word.shape) for q in quarters]
    order = ops.constant(0x3210, word.shape)
    found = []
    for nibbles in (word, word >> jnp.uint32(16)):
        low_bits = nibbles & jnp.uint32(0x7777)
        halves = (ops.select(table[0], table[1], low_bits), ops.select(table[2], table[3], low_bits))
        found.append(ops.select(*halves, nibbles >> jnp.uint32(1) & jnp.uint32(0x4444) | order))
    return [m for four in found for m in _bytes(four, ops)], BYTE + 128


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _byte_bits(word: Array, ops: Instructions) -> list[Array]:
    """Bits of `BYTE + n`, float32, for each byte n: as the third byte of the mantissa."""
    top = ops.constant(0x47000000, word.shape)
    return [ops.select(word, top, 0x7404 | n << 4) for n in range(4)]


def _bytes(word: Array, ops: Instructions) -> list[Array]:
    return [_float(bits) for bits in _byte_bits(word, ops)]


def _nibble_bits(word: Array, ops: Instructions) -> list[Array]:
    """`_byte_bits` of the eight nibbles, the lowest first."""
    pairs = (_byte_bits(half & jnp.uint32(0x0F0F0F0F), ops) for half in (word, word >> jnp.uint32(4)))
    return [nibble for pair in zip(*pairs, strict=True) for nibble in pair]


def _moved(word: Array, start: int, end: int) -> Array:
    """Bit `start` at the place of bit `end`."""
    return word >> jnp.uint32(start - end) if start > end else word << jnp.uint32(end - start)


def _e4m3(word: Array, ops: Instructions) -> list[Array]:
    """The bytes as float8_e4m3fn (no NaN) by `E4M3_SCALE`: their bits are those of a float16, whose exponent counts from
    elsewhere. No GPU before compute capability 8.9 converts them itself."""
    zero, found = ops.constant(0, word.shape), []
    for selector in (0x1404, 0x3424):  # a byte to the upper half of either half
        pair = ops.select(word, zero, selector)
        pair = pair & jnp.uint32(0x80008000) | pair >> jnp.uint32(1) & jnp.uint32(0x3F803F80)
        found += [pair & jnp.uint32(0xFFFF), pair >> jnp.uint32(16)]
    return [lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16).astype(jnp.float32) for half in found]
