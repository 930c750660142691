"""Operations on 32-bit words that `jnp` does not have: one PTX instruction each on an NVIDIA GPU, `jnp` elsewhere.

A "pair" is a 32-bit word of two bfloat16, the first in its low half; PTX calls it bf16x2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike


class WordOps(NamedTuple):
    """The operations by which `kernels_pallas.packed.unpack` takes words apart.

    Attributes:
        byte_perm: picks bytes of two words by the nibbles of a selector; see `byte_perm`.
        fma: `m * scale + rest` in float32, rounded once.
        affine_bf16x2: the pair of `p * factor + shift` for a pair p. The numbers of p may be below the least normal
            bfloat16. The results must be bfloat16 without rounding.
        mul_split_scale: the pair of `t * (high + low)` for pairs t, high and low, to a rounding of `t * high`.
        pack_bf16x2: the pair of two float32 numbers, each rounded to bfloat16.
        split_bf16x2: the two bfloat16 numbers of a pair.
        opaque_constant: an array of a shape that holds a word which the compiler does not know. A word that the
            compiler knows is moved to a register wherever an instruction needs it there, again and again.
    """

    byte_perm: Callable[[Array, Array, Array | int], Array]
    fma: Callable[[Array, Array, Array], Array]
    affine_bf16x2: Callable[[Array, float, float], Array]
    mul_split_scale: Callable[[Array, Array, Array], Array]
    pack_bf16x2: Callable[[Array, Array], Array]
    split_bf16x2: Callable[[Array], list[Array]]
    opaque_constant: Callable[[int, Sequence[int]], Array]


# PTX


def _asm(text: str, args: Sequence[Array], dtype: DTypeLike, registers: str) -> Array:
    """Run an instruction on every element. `registers`: the kinds of registers, that of the result first."""
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    constraints = ",".join(f"={kind}" if i == 0 else kind for i, kind in enumerate(registers))
    [result] = plt.elementwise_inline_asm(text, args=args, constraints=constraints, pack=1, result_shape_dtypes=[shape])
    return result


def _signed(word: Array) -> Array:
    """Return a word as a signed integer: the lowering of `_asm` takes no others."""
    return lax.bitcast_convert_type(word, jnp.int32)


def _word_asm(text: str, *args: Array) -> Array:
    """Run an instruction whose arguments and result are words."""
    result = _asm(text, [_signed(word) for word in args], jnp.int32, "r" * (len(args) + 1))
    return lax.bitcast_convert_type(result, jnp.uint32)


def byte_perm(a: Array, b: Array, selector: Array | int) -> Array:
    """Pick four bytes of two words (PTX `prmt`, CUDA `__byte_perm`).

    Byte i of the result is the byte of (a, b) that the low three bits of nibble i of the selector name, or eight times
    the sign of that byte if bit 3 is set. Bits of the selector above the low 16 do not count.
    """
    if isinstance(selector, int):
        return _word_asm(f"prmt.b32 $0, $1, $2, {selector};", a, b)
    return _word_asm("prmt.b32 $0, $1, $2, $3;", a, b, selector)


def opaque_constant(word: int, shape: Sequence[int]) -> Array:
    """Return an array of `word` whose value no compiler knows.

    The word passes through the highest bit of the mask of the lanes below a thread's own lane, and that bit is never
    set.
    """
    text = "{ .reg .b32 zero; mov.u32 zero, %lanemask_lt; shr.u32 zero, zero, 31; xor.b32 $0, zero, $1; }"
    return _word_asm(text, jnp.full(shape, jnp.uint32(word)))


def _bf16x2_bits(x: float) -> int:
    """Return the pair of twice the same number."""
    return int(np.asarray(x, jnp.bfloat16).view(np.uint16)) * 0x00010001


def _fma(m: Array, scale: Array, rest: Array) -> Array:
    return _asm("fma.rn.f32 $0, $1, $2, $3;", [m, scale, rest], jnp.float32, "ffff")


def fma_bf16x2(a: Array, b: Array, c: Array) -> Array:
    """Return `a * b + c` of pairs, rounded once. Numbers below the least normal one count in full."""
    return _word_asm("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c)


def _affine_bf16x2(p: Array, factor: float, shift: float) -> Array:
    factors, shifts = (opaque_constant(_bf16x2_bits(number), p.shape) for number in (factor, shift))
    return fma_bf16x2(p, factors, shifts)


def _mul_split_scale(t: Array, high: Array, low: Array) -> Array:
    return fma_bf16x2(t, high, fma_bf16x2(t, low, jnp.zeros_like(t)))


def _pack_bf16x2(low: Array, high: Array) -> Array:
    return lax.bitcast_convert_type(_asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [low, high], jnp.int32, "rff"), jnp.uint32)


def _split_bf16x2(pair: Array) -> list[Array]:
    texts = [f"{{ .reg .b16 other; mov.b32 {{{halves}}}, $1; }}" for halves in ("$0, other", "other, $0")]
    halves = [_asm(text, [_signed(pair)], jnp.int16, "hr") for text in texts]
    return [lax.bitcast_convert_type(half, jnp.bfloat16) for half in halves]


PTX_OPS = WordOps(
    byte_perm=byte_perm,
    fma=_fma,
    affine_bf16x2=_affine_bf16x2,
    mul_split_scale=_mul_split_scale,
    pack_bf16x2=_pack_bf16x2,
    split_bf16x2=_split_bf16x2,
    opaque_constant=opaque_constant,
)


# The same in plain jnp: the reference of the instructions, and what kernels use in interpret mode


def byte_perm_reference(a: Array, b: Array, selector: Array | int) -> Array:
    """Return what `byte_perm` does."""
    out, selector = jnp.zeros_like(a), jnp.asarray(selector, jnp.uint32)
    for i in range(4):
        nibble = selector >> jnp.uint32(4 * i)
        shift = (nibble & jnp.uint32(3)) * jnp.uint32(8)
        byte = jnp.where(nibble & jnp.uint32(4) == 0, a >> shift, b >> shift) & jnp.uint32(255)
        byte = jnp.where(nibble & jnp.uint32(8) == 0, byte, (byte >> jnp.uint32(7)) * jnp.uint32(255))
        out = out | byte << jnp.uint32(8 * i)
    return out


def _to_f32_reference(pair: Array) -> list[Array]:
    """Return the two numbers of a pair in float32."""
    halves = (pair << jnp.uint32(16), pair & jnp.uint32(0xFFFF0000))
    return [lax.bitcast_convert_type(bits, jnp.float32) for bits in halves]


def _pack_bf16x2_reference(low: Array, high: Array) -> Array:
    bits = [lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) for x in (low, high)]
    return bits[0] | bits[1] << jnp.uint32(16)


def _affine_bf16x2_reference(p: Array, factor: float, shift: float) -> Array:
    """Take p apart by its bits, in units of the least normal number: XLA's CPU backend takes what is below it for 0."""

    def scaled_number(bits: Array) -> Array:
        exponent = bits >> jnp.uint32(7) & jnp.uint32(255)
        unit = lax.bitcast_convert_type(jnp.maximum(exponent, 1) + jnp.uint32(126) << jnp.uint32(23), jnp.float32)
        mantissa = bits & jnp.uint32(127) | jnp.where(exponent > 0, jnp.uint32(128), jnp.uint32(0))
        magnitude = mantissa.astype(jnp.float32) / 128 * unit
        return jnp.where(bits & jnp.uint32(0x8000) == 0, magnitude, -magnitude)

    halves = (p & jnp.uint32(0xFFFF), p >> jnp.uint32(16))
    return _pack_bf16x2_reference(*[scaled_number(half) * (factor * 2.0**-126) + shift for half in halves])


def _mul_split_scale_reference(t: Array, high: Array, low: Array) -> Array:
    numbers = zip(_to_f32_reference(t), _to_f32_reference(high), _to_f32_reference(low), strict=True)
    return _pack_bf16x2_reference(*[a * b + (a * c).astype(jnp.bfloat16).astype(jnp.float32) for a, b, c in numbers])


JNP_OPS = WordOps(
    byte_perm=byte_perm_reference,
    fma=lambda m, scale, rest: m * scale + rest,
    affine_bf16x2=_affine_bf16x2_reference,
    mul_split_scale=_mul_split_scale_reference,
    pack_bf16x2=_pack_bf16x2_reference,
    split_bf16x2=lambda pair: [half.astype(jnp.bfloat16) for half in _to_f32_reference(pair)],
    opaque_constant=lambda word, shape: jnp.full(shape, jnp.uint32(word)),
)


def word_ops(*, interpret: bool) -> WordOps:
    """Return the operations for a kernel that is interpreted, or compiled for a GPU."""
    return JNP_OPS if interpret else PTX_OPS
