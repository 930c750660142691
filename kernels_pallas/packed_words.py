"""How a GPU kernel reads a stored weight: 32-bit words, each holding a few elements of one row, unpacked in registers.

The elements of a word of indices come out in an order of their own, and the rows that are multiplied with it are read
in that order (`load_rows`); the weight is read as it is stored. Words also keep the offsets of
the Triton lowering in range: up to 4 GiB it counts elements in 32 signed bits, which single bytes would overflow at 2 GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Shaped

from kernels_pallas.quantized import INDICES, QuantizedTensor

Select = Callable[[Array, Array, Array], Array]
PARTS = ("high", "scale", "offset", "super_scale", "super_offset")


@dataclass(frozen=True)
class Form:
    """The static half of a stored weight: its layout ("plain": an array, whose elements are read as they are), `group` and
    `table` as in `QuantizedTensor`, and the names of its operands after the words."""

    layout: str
    group: int = 0
    table: tuple[int, ...] | None = None
    parts: tuple[str, ...] = ()
    super_group: int = 0  # elements of a `super_scale`

    @property
    def slots(self) -> int:
        """Elements of a word."""
        return 8 if self.layout in INDICES else 1 if self.layout == "plain" else 4

    @property
    def step(self) -> int:
        """Words along D that one turn of a kernel's loop takes. Fixed by the form, so that a row's sum is always taken
        in the same order."""
        return {1: 64, 4: 32, 8: 16}[self.slots]


def words(w: Array | QuantizedTensor) -> tuple[Form, tuple[Array, ...]]:
    """The form of a weight `[..., O, D]` and its operands: words `[..., O, D / slots]`, then its parts.

    Raises:
        ValueError: D is no multiple of 32 (packed weights).
    """
    if not isinstance(w, QuantizedTensor):
        return Form("plain"), (lax.bitcast_convert_type(w, jnp.bfloat16) if w.dtype == jnp.uint16 else w,)
    if w.shape[-1] % 32:
        raise ValueError(f"a packed weight of shape {list(w.shape)}: the last axis must be a multiple of 32")
    codes, lead = w.codes, w.codes.shape[:-1]
    if codes.dtype != jnp.uint8:
        codes = lax.bitcast_convert_type(codes, jnp.uint8)
    codes = lax.bitcast_convert_type(codes.reshape(*lead, -1, 4), jnp.uint32)
    parts = {name: part for name in PARTS if (part := getattr(w, name)) is not None}
    if w.layout == "codes5":  # one high bit an element: those of a block of 32 are a word
        parts["high"] = lax.bitcast_convert_type(parts["high"].reshape(*lead, -1, 4), jnp.uint32)
    super_group = 0 if w.super_scale is None else w.shape[-1] // w.super_scale.shape[-1]
    return Form(w.layout, w.group, w.table, tuple(parts), super_group), (codes, *parts.values())


def select_bytes(a: Array, b: Array, selector: Array) -> Array:
    """The instruction `prmt.b32` in arithmetic: byte i of the result is the byte of (a, b) that the low 3 bits of nibble
    i of the selector name. Bit 3 of these must be 0."""
    out = jnp.zeros_like(a)
    for i in range(4):
        n = selector >> jnp.uint32(4 * i) & jnp.uint32(7)
        shift = (n & jnp.uint32(3)) * jnp.uint32(8)
        byte = jnp.where(n < jnp.uint32(4), a >> shift, b >> shift) & jnp.uint32(255)
        out = out | byte << jnp.uint32(8 * i)
    return out


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """`select_bytes` as one instruction of an NVIDIA GPU; selector bits above the low 16 are ignored by it."""
    out = jax.ShapeDtypeStruct(selector.shape, jnp.int32)  # the lowering takes signed integers only
    args = [lax.bitcast_convert_type(word, jnp.int32) for word in (a, b, selector)]
    asm = "prmt.b32 $0, $1, $2, $3;"
    [found] = plt.elementwise_inline_asm(asm, args=args, constraints="=r,r,r,r", pack=1, result_shape_dtypes=[out])
    return lax.bitcast_convert_type(found, jnp.uint32)


def _biased(byte: Array, bias: int) -> Array:
    """Small unsigned integers minus `bias` as float32, without a conversion: they become the last bits of 2^23."""
    return lax.bitcast_convert_type(byte | jnp.uint32(0x4B000000), jnp.float32) - jnp.float32(2**23 + bias)


def unpack(form: Form, word: Array, select: Select, high: Array | None = None) -> list[Array]:
    """float32 values t of each slot of words of indices and of `codes8`, before scale and offset; `fp8`: the values.

    `codes4` looks 4 nibbles up at a time: two selections of a byte by the low three bits, in each half of the table,
    and one between their results by bit 3.
    """
    if form.slots == 1:
        return [word]
    if form.layout == "codes8":  # two's complement with the top bit flipped is the value + 128
        flipped = word ^ jnp.uint32(0x80808080)
        return [_biased(flipped >> jnp.uint32(8 * n) & jnp.uint32(255), 128) for n in range(4)]
    if form.layout == "fp8":
        return [_e4m3(word >> jnp.uint32(8 * n) & jnp.uint32(255)) for n in range(4)]
    assert form.table is not None
    first, steps = form.table[0], {b - a for a, b in zip(form.table, form.table[1:], strict=False)}
    if high is not None:
        bits = INDICES[form.layout] - 4
        low = [word >> jnp.uint32(4 * n) & jnp.uint32(15) for n in range(8)]
        top = [_moved(high, bits * n, 4) & jnp.uint32((1 << bits) - 1 << 4) for n in range(8)]
        return [_biased(a | b, -first) for a, b in zip(low, top, strict=True)]
    if len(steps) == 1:  # evenly spaced: no table
        step = steps.pop()
        even = [_biased(word >> jnp.uint32(4 * n) & jnp.uint32(15), 0) for n in range(8)]
        return [t + first if step == 1 else t * step + first for t in even]
    quarters = [sum((t + 128) << 8 * i for i, t in enumerate(form.table[4 * q : 4 * q + 4])) for q in range(4)]
    table = [jnp.full(word.shape, jnp.uint32(q)) for q in quarters]
    found = []
    for nibbles in (word, word >> jnp.uint32(16)):
        low_bits = nibbles & jnp.uint32(0x7777)
        halves = (select(table[0], table[1], low_bits), select(table[2], table[3], low_bits))
        found.append(select(*halves, (nibbles & jnp.uint32(0x8888)) >> jnp.uint32(1) | jnp.uint32(0x3210)))
    return [_biased(found[n // 4] >> jnp.uint32(8 * (n % 4)) & jnp.uint32(255), 128) for n in range(8)]


def _moved(word: Array, start: int, end: int) -> Array:
    """Bit `start` at the place of bit `end`."""
    return word >> jnp.uint32(start - end) if start > end else word << jnp.uint32(end - start)


def _e4m3(byte: Array) -> Array:
    """float8_e4m3fn (no NaN) as float32: its bits are those of a float16 whose exponent is 8 too small. No GPU before
    compute capability 8.9 converts them itself."""
    half = (byte & jnp.uint32(0x80)) << jnp.uint32(8) | (byte & jnp.uint32(0x7F)) << jnp.uint32(7)
    return lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16).astype(jnp.float32) * 256.0


def load_tile(
    form: Form,
    refs: tuple[Any, ...],
    lead: tuple[Array, ...],
    rows: Array,
    first_word: Array,
    count: int,
    shape: tuple[int, int],
    dtype: Any,
    select: Select,
) -> Float[Array, "rows count*slots"]:
    """Inside a kernel: a tile of the weight, dequantised in float32 and rounded to `dtype`, in the order of `load_rows`.

    Args:
        refs: the operands of `words`.
        lead: indices of the leading axes.
        rows: rows of the tile, `[rows]` int32.
        first_word, count: words along D.
        shape: rows and words of the weight; beyond them the tile is zero.
    """
    whole = shape[0] % rows.size == 0 == shape[1] % count

    def load(name: str, cols: Array, per: int = 1) -> Array:
        """Columns of a part, each of which stands for `per` words."""
        o, j = grid(rows, cols)
        inside = None if whole else (o < shape[0]) & (j * per < shape[1])
        return plt.load(parts[name].at[(*lead, o, j)], mask=inside, other=None if whole else 0)

    def groups(name: str, words: int, half: int | None = None) -> Float[Array, "rows groups"]:
        """What a part holds for each `words` words of the tile; of pairs, one half."""
        cols = lax.div(first_word, words) + jnp.arange(max(1, count // words))
        part = load(name, cols, words) if half is None else load(name, 2 * cols + half, words // 2)
        return part.astype(jnp.float32)

    def spread(numbers: Shaped[Array, "rows groups"]) -> Shaped[Array, "rows count"]:
        """The number of its group for every word."""
        each = (*numbers.shape, count // numbers.shape[1])
        return jnp.broadcast_to(numbers[:, :, None], each).reshape(rows.size, count)

    parts = dict(zip(("words", *form.parts), refs, strict=True))
    at = first_word + jnp.arange(count)
    high = None
    if form.layout == "codes6":
        high = load("high", at).astype(jnp.uint32)
    elif form.layout == "codes5":
        blocks = load("high", lax.div(first_word, 4) + jnp.arange(count // 4), 4)
        high = spread(blocks) >> (lax.rem(jnp.arange(count), 4) * 8).astype(jnp.uint32)
    values = unpack(form, load("words", at), select, high)
    if form.slots == 1:
        return values[0].astype(dtype)
    if form.layout == "fp8":
        rows = lax.div(rows, 128)
        scale = spread(groups("scale", 32))
        return _interleave([(t * scale).astype(dtype) for t in values])

    def of_groups(name: str) -> list[Array]:
        """Scale or offset of every word, of the two halves of a block of 32 elements if they differ."""
        halves = form.group < 32 and form.slots == 8
        numbers = [groups(name, 4, half) for half in range(2)] if halves else [groups(name, form.group // form.slots)]
        if f"super_{name}" in parts:
            outer = groups(f"super_{name}", form.super_group // form.slots)
            numbers = [outer * number for number in numbers]
        return [spread(number) for number in numbers]

    scales = of_groups("scale")
    out = [t * scales[n % len(scales)] for n, t in enumerate(values)]
    if "offset" in parts:
        offsets = of_groups("offset")
        out = [v + offsets[n % len(offsets)] for n, v in enumerate(out)]
    return _interleave([v.astype(dtype) for v in out])


def _interleave(values: list[Array]) -> Array:
    """`[rows, n]` each -> `[rows, n * len(values)]`, element by element; in registers, two at a time."""
    if len(values) == 1:
        return values[0]
    pair = jnp.stack([_interleave(values[0::2]), _interleave(values[1::2])], axis=-1)
    return pair.reshape(pair.shape[0], -1)


def grid(rows: Array, cols: Array) -> tuple[Array, Array]:
    """Row and column of every element of a tile."""
    shape = (rows.size, cols.size)
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(cols[None, :], shape)


def power(size: int) -> int:
    """The power of two that holds so many: kernels' arrays have such sizes."""
    return 1 << (size - 1).bit_length()


def summed(ref: Any, *at: Any, mask: Any = None) -> Array:
    """Inside a kernel: elements `at` of parts, which are added in their order; 0 where `mask` is False."""

    def load(part: int) -> Array:
        other = None if mask is None else 0
        return plt.load(ref.at[(jnp.int32(part), *at)], mask=mask, other=other)  # a plain int among scalars is refused

    total = load(0)
    for part in range(1, ref.shape[0]):
        total = total + load(part)
    return total


def load_rows(form: Form, x_ref: Any, rows: Array, first: Array, count: int) -> Float[Array, "rows count"]:
    """Inside a kernel: elements `first ... first + count - 1` of rows of `x_ref`, zero beyond either end, in the order in
    which words of `form` are unpacked.

    In a block of 32 indices, byte c of word j holds elements 4 j + c and 16 + 4 j + c: the two halves come out in turn.
    """

    def load(cols: Array) -> Array:
        at = grid(rows, cols)
        inside = at[0] < x_ref.shape[0]
        if x_ref.shape[1] % count:
            inside &= at[1] < x_ref.shape[1]
        return plt.load(x_ref.at[at], mask=inside, other=0)

    if form.layout not in INDICES:
        return load(first + jnp.arange(count))
    half = jnp.arange(count // 2)
    low = first + lax.div(half, 16) * 32 + lax.rem(half, 16)
    return _interleave([load(low), load(low + 16)])


def dot(w: Float[Array, "O K"], x: Float[Array, "M K"]) -> Float[Array, "O M"]:
    """`w @ x.T`, float32; weights are the left operand so that the same instruction serves any number of rows."""
    precision = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return lax.dot_general(w, x, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
