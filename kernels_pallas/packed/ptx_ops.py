"""What kernels do with words that `jnp` has no word for: one instruction each on an NVIDIA GPU, arithmetic elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import triton as plt


class Instructions(NamedTuple):
    """The operations; see those of the machine below. A pair is a word of two bfloat16, the first in its low half.

    Attributes:
        select: bytes of two words, picked by the nibbles of a selector.
        fused: `m * scale + rest`, float32, rounded once.
        numbers: the pair of `p * factor + shift` for a pair p, whose numbers may be below the least normal one, where the
            results are bfloat16 without rounding.
        scaled: the pair of `t * (high + low)` for pairs t, high and low, to a rounding of `t * high`.
        pair: of two float32, rounded.
        split: the two numbers of a pair.
        constant: a word of a shape that the compiler does not know. One that it knows is moved to a register again and
            again, wherever an instruction wants it there.
    """

    select: Callable[[Array, Array, Array | int], Array]
    fused: Callable[[Array, Array, Array], Array]
    numbers: Callable[[Array, float, float], Array]
    scaled: Callable[[Array, Array, Array], Array]
    pair: Callable[[Array, Array], Array]
    split: Callable[[Array], list[Array]]
    constant: Callable[[int, Sequence[int]], Array]


def _asm(text: str, args: Sequence[Array], dtype: Any, kinds: str) -> Array:
    """kinds: of registers, that of the result first."""
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [found] = plt.elementwise_inline_asm(
        text, args=args, constraints=",".join(f"={k}" if i == 0 else k for i, k in enumerate(kinds)), pack=1,
        result_shape_dtypes=[shape],
    )  # fmt: skip
    return found


def _signed(word: Array) -> Array:
    """The lowering of `_asm` takes signed integers only."""
    return lax.bitcast_convert_type(word, jnp.int32)


def _words(text: str, *args: Array) -> Array:
    found = _asm(text, [_signed(word) for word in args], jnp.int32, "r" * (len(args) + 1))
    return lax.bitcast_convert_type(found, jnp.uint32)


def prmt(a: Array, b: Array, selector: Array | int) -> Array:
    """Byte i of the result is the byte of (a, b) that the low 3 bits of nibble i of the selector name, or eight times the
    sign of that byte if bit 3 is set; bits of the selector above the low 16 do not count."""
    if isinstance(selector, int):
        return _words(f"prmt.b32 $0, $1, $2, {selector};", a, b)
    return _words("prmt.b32 $0, $1, $2, $3;", a, b, selector)


def hidden_constant(word: int, shape: Sequence[int]) -> Array:
    """`word`, by way of the highest bit of the mask of the lanes below a thread's own, which is never set: no compiler knows."""
    text = "{ .reg .b32 zero; mov.u32 zero, %lanemask_lt; shr.u32 zero, zero, 31; xor.b32 $0, zero, $1; }"
    return _words(text, jnp.full(shape, jnp.uint32(word)))


def select_bytes(a: Array, b: Array, selector: Array | int) -> Array:
    """`prmt` in arithmetic."""
    out, selector = jnp.zeros_like(a), jnp.asarray(selector, jnp.uint32)
    for i in range(4):
        n = selector >> jnp.uint32(4 * i)
        shift = (n & jnp.uint32(3)) * jnp.uint32(8)
        byte = jnp.where(n & jnp.uint32(4) == 0, a >> shift, b >> shift) & jnp.uint32(255)
        byte = jnp.where(n & jnp.uint32(8) == 0, byte, (byte >> jnp.uint32(7)) * jnp.uint32(255))
        out = out | byte << jnp.uint32(8 * i)
    return out


def _pair_bits(x: float) -> int:
    return int(np.asarray(x, jnp.bfloat16).view(np.uint16)) * 0x00010001


def _fused(m: Array, scale: Array, rest: Array) -> Array:
    return _asm("fma.rn.f32 $0, $1, $2, $3;", [m, scale, rest], jnp.float32, "ffff")


def fma2(a: Array, b: Array, c: Array) -> Array:
    """`a * b + c` of pairs, rounded once; numbers below the least normal one count in full."""
    return _words("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c)


def _numbers(p: Array, factor: float, shift: float) -> Array:
    return fma2(p, hidden_constant(_pair_bits(factor), p.shape), hidden_constant(_pair_bits(shift), p.shape))


def _scaled(t: Array, high: Array, low: Array) -> Array:
    return fma2(t, high, fma2(t, low, jnp.zeros_like(t)))


def _pair(low: Array, high: Array) -> Array:
    return lax.bitcast_convert_type(_asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], jnp.int32, "rff"), jnp.uint32)


def _split(pair: Array) -> list[Array]:
    texts = [f"{{ .reg .b16 other; mov.b32 {{{halves}}}, $1; }}" for halves in ("$0, other", "other, $0")]
    halves = [_asm(text, [_signed(pair)], jnp.int16, "hr") for text in texts]
    return [lax.bitcast_convert_type(half, jnp.bfloat16) for half in halves]


def _wide(pair: Array) -> list[Array]:
    """The two numbers of a pair in float32."""
    return [
        lax.bitcast_convert_type(bits, jnp.float32) for bits in (pair << jnp.uint32(16), pair & jnp.uint32(0xFFFF0000))
    ]


def _joined(*values: Array) -> Array:
    low, high = (lax.bitcast_convert_type(v.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) for v in values)
    return low | high << jnp.uint32(16)


def _numbers_plainly(p: Array, factor: float, shift: float) -> Array:
    """From the bits of p, in units of the least normal number: what is below it XLA's CPU backend takes for 0."""

    def number(bits: Array) -> Array:
        exponent = bits >> jnp.uint32(7) & jnp.uint32(255)
        unit = lax.bitcast_convert_type(jnp.maximum(exponent, 1) + jnp.uint32(126) << jnp.uint32(23), jnp.float32)
        size = (
            (bits & jnp.uint32(127) | jnp.where(exponent > 0, jnp.uint32(128), jnp.uint32(0))).astype(jnp.float32)
            / 128
            * unit
        )
        return jnp.where(bits & jnp.uint32(0x8000) == 0, size, -size)

    return _joined(
        *[number(half) * (factor * 2.0**-126) + shift for half in (p & jnp.uint32(0xFFFF), p >> jnp.uint32(16))]
    )


def _scaled_plainly(t: Array, high: Array, low: Array) -> Array:
    parts = zip(_wide(t), _wide(high), _wide(low), strict=True)
    return _joined(*[a * b + (a * c).astype(jnp.bfloat16).astype(jnp.float32) for a, b, c in parts])


MACHINE = Instructions(prmt, _fused, _numbers, _scaled, _pair, _split, hidden_constant)
ARITHMETIC = Instructions(
    select=select_bytes,
    fused=lambda m, scale, rest: m * scale + rest,
    numbers=_numbers_plainly,
    scaled=_scaled_plainly,
    pair=_joined,
    split=lambda pair: [half.astype(jnp.bfloat16) for half in _wide(pair)],
    constant=lambda word, shape: jnp.full(shape, jnp.uint32(word)),
)
