"""How a GPU kernel reads a stored weight: 32-bit words, each holding a few elements of one row, unpacked in registers.

A tensor-core instruction wants certain elements of a tile in each thread. The weight is read as it is stored, four words of a
row in a thread, which are a quarter of the row's words in a step; so the rows that are multiplied with it are read in
the order that makes those the wanted elements (`load_rows`), and the rows of the weight in such an order, too (`tile_rows`).
Words also keep the offsets of the Triton lowering in range: up to 4 GiB it counts elements in 32 signed bits, which single
bytes would overflow at 2 GiB.
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

from kernels_pallas.packed.ptx_ops import Instructions
from kernels_pallas.packed.unpack import PAIR_SCALE, floats, pairs
from kernels_pallas.platform import capability
from kernels_pallas.tiles import index_grid
from kernels_pallas.weights.quantized import FP8_BLOCK, INDICES, QuantizedTensor

LANES = 4  # threads that share the words of a row in a step
PARTS = ("high", "scale", "offset", "super_scale", "super_offset")


@dataclass(frozen=True)
class Form:
    """The static half of a stored weight.

    Attributes:
        layout, group, table: as in `QuantizedTensor`; "plain" is an array, whose elements are read as they are.
        parts: names of its operands after the words.
        narrow: parts that are read as 32-bit words, too, and the dtype of what these hold: the compiler prefetches nothing
            that is less than four bytes a thread.
        super_group: elements of a `super_scale`.
        run: elements of a row that a thread has side by side for the tensor cores; see `neighbours`.
    """

    layout: str
    group: int = 0
    table: tuple[int, ...] | None = None
    parts: tuple[str, ...] = ()
    narrow: tuple[tuple[str, str], ...] = ()
    super_group: int = 0
    run: int = 2

    @property
    def slots(self) -> int:
        """Elements of a word."""
        return 8 if self.layout in INDICES else 1 if self.layout == "plain" else 4

    @property
    def step(self) -> int:
        """Words along D that one turn of a kernel's loop takes. Fixed by the form, so that a row's sum is always taken
        in the same order."""
        return {1: 64, 4: 32, 8: 16}[self.slots]

    def stages(self, rows: int, dtype: Any) -> int:
        """Turns of a kernel's loop that are under way at once, for tiles of so many rows: fewer where what is prefetched would
        not fit the 99 KiB that a block has on smaller cards: float32, or bytes with scales and offsets of small groups."""
        large = rows > 16 and self.slots == 4 and "offset" in self.parts
        return 2 if large or dtype == jnp.float32 else 3


def wide() -> bool:
    """Whether the tensor cores of the target take 64 rows at once (`wgmma` and what followed it). The compiler takes these
    for sixteen columns and more, older instructions for fewer."""
    return capability() >= (9, 0)


def few_rows() -> int:
    """Rows of a tile at least: what the tensor cores take, by the same instruction as more of them."""
    return 16 if wide() else 8


def most_rows(dtype: Any) -> int:
    """Rows of a tile at most: larger ones of float32 do not fit the shared memory of smaller cards."""
    return 16 if dtype == jnp.float32 else 64


def neighbours() -> int:
    """Elements of a row that a thread has side by side where the compiler loads a tile for the tensor cores: two; four for the
    older instructions, in jax before 0.11, if a tile is put together from several. The wrong number costs time alone."""
    return 2 if wide() or jax.__version_info__ >= (0, 11) else 4


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
    if w.high is not None:  # those of two or four words are one
        parts["high"] = lax.bitcast_convert_type(w.high.reshape(*lead, -1, 4 // w.high.dtype.itemsize), jnp.uint32)
    super_group = 0 if w.super_scale is None else w.shape[-1] // w.super_scale.shape[-1]
    narrow = {}
    for name, part in parts.items():
        each, group = 4 // part.dtype.itemsize, super_group if name.startswith("super") else w.group
        side_by_side = (
            group == 32 and each == 2
        )  # four of them in a step of a row: two for a thread, which are four bytes
        if name != "high" and each > 1 and part.shape[-1] % each == 0 and not side_by_side:
            narrow[name] = part.dtype.name
            parts[name] = lax.bitcast_convert_type(part.reshape(*part.shape[:-1], -1, each), jnp.uint32)
    form = Form(w.layout, w.group, w.table, tuple(parts), tuple(narrow.items()), super_group, neighbours())
    return form, (codes, *parts.values())


def load_tile(
    form: Form,
    refs: tuple[Any, ...],
    lead: tuple[Array, ...],
    rows: Array,
    first_word: Array,
    count: int,
    shape: tuple[int, int],
    dtype: Any,
    ops: Instructions,
) -> Float[Array, "rows count*slots"]:
    """Inside a kernel: a tile of the weight in `dtype`, dequantised, in the order of `load_rows`. To bfloat16 it is rounded once
    from float32, or without offsets as `Instructions.scaled` does, which in one case of ten thousand is the second nearest.

    Args:
        refs: the operands of `words`.
        lead: indices of the leading axes.
        rows: rows of the tile, `[rows]` int32, in the order of `tile_rows`.
        first_word, count: words along D.
        shape: rows and words of the weight; beyond them the tile is zero.
    """
    whole = shape[0] % rows.size == 0 == shape[1] % count

    def load(name: str, cols: Array, per: int = 1) -> Array:
        """Columns of a part, each of which stands for `per` words."""
        o, j = index_grid(rows, cols)
        inside = None if whole else (o < shape[0]) & (j * per < shape[1])
        return plt.load(parts[name].at[(*lead, o, j)], mask=inside, other=None if whole else 0)

    def groups(name: str, words: int, half: int | None = None) -> Float[Array, "rows groups"]:
        """What a part holds for each `words` words of the tile; of pairs, one half."""
        cols = lax.div(first_word, words) + jnp.arange(max(1, count // words))
        several = 1 if half is None else 2
        at = cols if half is None else 2 * cols + half
        if name not in narrow:
            return load(name, at, words // several).astype(jnp.float32)
        kept = jnp.dtype(narrow[name])
        each = 4 // kept.itemsize
        word = load(name, lax.div(cols, each // several), words // several * each)
        bits = word >> (lax.rem(at, each) * 8 * kept.itemsize).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits.astype(f"uint{8 * kept.itemsize}"), kept).astype(jnp.float32)

    def spread(numbers: Shaped[Array, "rows groups"]) -> Shaped[Array, "rows count"]:
        """The number of its group for every word."""
        each = (*numbers.shape, count // numbers.shape[1])
        return jnp.broadcast_to(numbers[:, :, None], each).reshape(rows.size, count)

    parts, narrow = dict(zip(("words", *form.parts), refs, strict=True)), dict(form.narrow)
    high = None
    if "high" in parts:
        sharing = 32 // (8 * (INDICES[form.layout] - 4))  # words whose high bits are one word
        together = load("high", lax.div(first_word, sharing) + jnp.arange(count // sharing), sharing)
        high = spread(together) >> (lax.rem(jnp.arange(count), sharing) * (32 // sharing)).astype(jnp.uint32)
    word = load("words", first_word + jnp.arange(count))
    if form.slots == 1:
        return word.astype(dtype)
    if form.layout == "fp8":
        rows = lax.div(rows, FP8_BLOCK)

    def of_groups(name: str) -> list[Array]:
        """Scale or offset of every group, of the two halves of a block of 32 elements if they differ."""
        halves = form.group < 32 and form.slots == 8
        numbers = [groups(name, 4, half) for half in range(2)] if halves else [groups(name, form.group // form.slots)]
        if f"super_{name}" in parts:
            outer = groups(f"super_{name}", form.super_group // form.slots)
            numbers = [outer * number for number in numbers]
        return numbers

    scales = of_groups("scale")
    short = dtype == jnp.bfloat16
    if short and "offset" not in parts:
        return _arranged(_halves(_scaled_pairs(pairs(form, word, ops, high), scales, spread, ops), ops), form.run)
    values, bias = floats(form, word, ops, high)
    offsets = of_groups("offset") if "offset" in parts else [jnp.zeros_like(scale) for scale in scales]
    if short and bias <= 256:  # what the sum loses is 2^-16 of the scale at most
        offsets = [offset - bias * scale for offset, scale in zip(offsets, scales, strict=True)]
    else:
        values = [m - bias for m in values]
    each = [(spread(scale), spread(offset)) for scale, offset in zip(scales, offsets, strict=True)]
    out = [ops.fused(m, *each[n // 4 % len(each)]) for n, m in enumerate(values)]
    if short:
        out = _halves([ops.pair(*out[n : n + 2]) for n in range(0, len(out), 2)], ops)
    return _arranged(out, form.run).astype(dtype)


def _halves(whole: list[Array], ops: Instructions) -> list[Array]:
    """The numbers of pairs, in their order."""
    return [number for pair in whole for number in ops.split(pair)]


def _scaled_pairs(
    numbers: list[Array], scales: list[Array], spread: Callable[[Array], Array], ops: Instructions
) -> list[Array]:
    """Pairs by their scales (one, or those of the two halves), each scale as the sum of two bfloat16."""
    factors = []
    for scale in scales:
        high = ops.pair(scale * PAIR_SCALE, scale * PAIR_SCALE)
        rest = scale * PAIR_SCALE - lax.bitcast_convert_type(high & jnp.uint32(0xFFFF0000), jnp.float32)
        factors.append((spread(high), spread(ops.pair(rest, rest))))
    return [ops.scaled(pair, *factors[n // 2 % len(factors)]) for n, pair in enumerate(numbers)]


def _interleave(values: list[Array]) -> Array:
    """`[rows, n]` each -> `[rows, n * len(values)]`, element by element; in registers, two at a time."""
    if len(values) == 1:
        return values[0]
    pair = jnp.stack([_interleave(values[0::2]), _interleave(values[1::2])], axis=-1)
    return pair.reshape(pair.shape[0], -1)


def _arranged(values: list[Array], run: int) -> Array:
    """The elements that words were unpacked to, in the order of `load_rows`."""
    rows, words = values[0].shape
    halves = len(values) // 4
    tile = _interleave([_interleave(values[4 * h : 4 * h + 4]) for h in range(halves)])
    tile = tile.reshape(-1, 4, 8, LANES, words // LANES, 4 // run, run, halves)
    return tile.transpose(1, 0, 2, 7, 4, 5, 3, 6).reshape(rows, -1)


def tile_rows(form: Form, count: int) -> Array:
    """Numbers of the rows of a tile, in the order in which `load_tile` reads them: for four warps, each of which has 8 rows at
    a time and as a result those that lie together."""
    at = jnp.arange(count)
    if form.slots == 1:
        return at
    return lax.rem(lax.div(at, 8), 4) * (count // 4) + lax.div(at, 32) * 8 + lax.rem(at, 8)


def load_rows(form: Form, x_ref: Any, rows: Array, first: Array, count: int) -> Float[Array, "rows count"]:
    """Inside a kernel: elements `first ... first + count - 1` of rows of `x_ref`, zero beyond either end, in the order in
    which words of `form` are unpacked: a few of each lane's share in turn."""
    cols = jnp.arange(count)
    if form.slots > 1:
        lane, turn = lax.rem(lax.div(cols, form.run), LANES), lax.div(cols, form.run * LANES)
        cols = lane * (count // LANES) + turn * form.run + lax.rem(cols, form.run)
    at = index_grid(rows, first + cols)
    inside = at[0] < x_ref.shape[0]
    if x_ref.shape[1] % count:
        inside &= at[1] < x_ref.shape[1]
    return plt.load(x_ref.at[at], mask=inside, other=0)
