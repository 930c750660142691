"""What kernels do with words that `jnp` has no word for: one instruction each on an NVIDIA GPU, arithmetic elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt


class Instructions(NamedTuple):
    """The operations; see those of the machine below.

    Attributes:
        select: bytes of two words, picked by the nibbles of a selector.
        scaled: `(m - bias) * scale`, rounded once, given `rest`, which is `-bias * scale` without an error.
        constant: a word of a shape that the compiler does not know. One that it knows is moved to a register again and
            again, wherever an instruction wants it there.
    """

    select: Callable[[Array, Array, Array | int], Array]
    scaled: Callable[[Array, int, Array, Array], Array]
    constant: Callable[[int, Sequence[int]], Array]


def _asm(text: str, args: Sequence[Array], dtype: Any, kinds: str) -> Array:
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [found] = plt.elementwise_inline_asm(
        text, args=args, constraints=",".join(f"={k}" if i == 0 else k for i, k in enumerate(kinds)), pack=1,
        result_shape_dtypes=[shape],
    )  # fmt: skip
    return found


def _words(text: str, *args: Array) -> Array:
    signed = [lax.bitcast_convert_type(word, jnp.int32) for word in args]  # the lowering takes signed integers only
    return lax.bitcast_convert_type(_asm(text, signed, jnp.int32, "r" * (len(args) + 1)), jnp.uint32)


def prmt(a: Array, b: Array, selector: Array | int) -> Array:
    """Byte i of the result is the byte of (a, b) that the low 3 bits of nibble i of the selector name; bit 3 of these must
    be 0, and bits above the low 16 do not count."""
    if isinstance(selector, int):
        return _words(f"prmt.b32 $0, $1, $2, {selector};", a, b)
    return _words("prmt.b32 $0, $1, $2, $3;", a, b, selector)


def hidden_constant(word: int, shape: Sequence[int]) -> Array:
    """`word`, by way of the number of blocks along the third axis of the grid: it is far below 2^31, but nobody knows."""
    text = "{ .reg .b32 zero; mov.u32 zero, %nctaid.z; shr.u32 zero, zero, 31; or.b32 $0, zero, $1; }"
    return _words(text, jnp.full(shape, jnp.uint32(word)))


def select_bytes(a: Array, b: Array, selector: Array | int) -> Array:
    """`prmt` in arithmetic."""
    out, selector = jnp.zeros_like(a), jnp.asarray(selector, jnp.uint32)
    for i in range(4):
        n = selector >> jnp.uint32(4 * i) & jnp.uint32(7)
        shift = (n & jnp.uint32(3)) * jnp.uint32(8)
        byte = jnp.where(n < jnp.uint32(4), a >> shift, b >> shift) & jnp.uint32(255)
        out = out | byte << jnp.uint32(8 * i)
    return out


def _fused(m: Array, bias: int, scale: Array, rest: Array) -> Array:
    return _asm("fma.rn.f32 $0, $1, $2, $3;", [m, scale, rest], jnp.float32, "ffff")


MACHINE = Instructions(prmt, _fused, hidden_constant)
ARITHMETIC = Instructions(
    select_bytes,
    lambda m, bias, scale, rest: (m - jnp.float32(bias)) * scale,
    lambda word, shape: jnp.full(shape, jnp.uint32(word)),
)
