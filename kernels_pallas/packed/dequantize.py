"""`load_tile`: a tile of a stored weight, loaded and dequantised inside a kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped, UInt32

from kernels_pallas.packed.layout import PackedLayout, arrange_for_mma
from kernels_pallas.packed.ptx_ops import WordOps
from kernels_pallas.packed.unpack import PAIR_SCALE, unpack_bf16x2, unpack_f32
from kernels_pallas.tiles import index_grid
from kernels_pallas.weights.quantized import FP8_BLOCK, INDEX_BITS


class WeightRefs(NamedTuple):
    """One matrix of a stored weight, as a kernel sees it.

    Attributes:
        layout, refs: what `pack_operands` gave for the weight, as references to memory.
        matrix: the indices of the matrix along the leading axes of the operands.
        num_rows, num_words: the rows of the matrix, and the words in one of them.
        ops: the operations for words; see `ptx_ops`.
    """

    layout: PackedLayout
    refs: tuple[Any, ...]
    matrix: tuple[Array, ...]
    num_rows: int
    num_words: int
    ops: WordOps


class _Tile(NamedTuple):
    """Rows of a matrix, and `words_per_step` words of each from `first_word`."""

    weight: WeightRefs
    rows: Int[Array, " rows"]
    first_word: Int[Array, ""]

    @property
    def num_words(self) -> int:
        return self.weight.layout.words_per_step

    def load(self, name: str, cols: Int[Array, " cols"], words_per_col: int = 1) -> Shaped[Array, "rows cols"]:
        """Load columns of an operand, each of which stands for so many words of a row; 0 beyond the matrix."""
        layout, refs, matrix, num_rows, num_words, _ = self.weight
        ref = refs[("words", *layout.operand_names).index(name)]
        o, j = index_grid(self.rows, cols)
        whole = num_rows % self.rows.size == 0 == num_words % self.num_words
        inside = None if whole else (o < num_rows) & (j * words_per_col < num_words)
        return plt.load(ref.at[(*matrix, o, j)], mask=inside, other=None if whole else 0)

    def load_groups(self, name: str, words_per_group: int, half: int | None = None) -> Float[Array, "rows groups"]:
        """Load the values of an operand for the groups of the tile; with `half`, one half of each pair of values."""
        groups = lax.div(self.first_word, words_per_group) + jnp.arange(max(1, self.num_words // words_per_group))
        per_group = 1 if half is None else 2
        at = groups if half is None else 2 * groups + half
        packed_dtype = dict(self.weight.layout.packed_dtypes).get(name)
        if packed_dtype is None:
            return self.load(name, at, words_per_group // per_group).astype(jnp.float32)
        dtype = jnp.dtype(packed_dtype)
        per_word = 4 // dtype.itemsize
        word = self.load(name, lax.div(groups, per_word // per_group), words_per_group // per_group * per_word)
        bits = word >> (lax.rem(at, per_word) * 8 * dtype.itemsize).astype(jnp.uint32)
        return lax.bitcast_convert_type(bits.astype(f"uint{8 * dtype.itemsize}"), dtype).astype(jnp.float32)

    def load_factors(self, name: str) -> list[Float[Array, "rows groups"]]:
        """Load the scale or the offset of every group: two lists where the halves of a block of 32 elements differ."""
        layout = self.weight.layout
        if layout.group < 32 and layout.values_per_word == 8:
            factors = [self.load_groups(name, 4, half) for half in range(2)]
        else:
            factors = [self.load_groups(name, layout.group // layout.values_per_word)]
        if f"super_{name}" in layout.operand_names:
            outer = self.load_groups(f"super_{name}", layout.super_group // layout.values_per_word)
            factors = [outer * factor for factor in factors]
        return factors

    def load_high_bits(self) -> UInt32[Array, "rows words"]:
        """Load the high bits of the indices of every word, in the low bits of a word."""
        words_per_col = 32 // (8 * (INDEX_BITS[self.weight.layout.layout] - 4))
        cols = lax.div(self.first_word, words_per_col) + jnp.arange(self.num_words // words_per_col)
        shared = self.broadcast_groups(self.load("high", cols, words_per_col))
        shift = lax.rem(jnp.arange(self.num_words), words_per_col) * (32 // words_per_col)
        return shared >> shift.astype(jnp.uint32)

    def broadcast_groups(self, values: Shaped[Array, "rows groups"]) -> Shaped[Array, "rows words"]:
        """Return the value of its group for every word."""
        shape = (*values.shape, self.num_words // values.shape[1])
        return jnp.broadcast_to(values[:, :, None], shape).reshape(self.rows.size, self.num_words)


def load_tile(
    weight: WeightRefs, rows: Int[Array, " rows"], first_word: Int[Array, ""], dtype: DTypeLike
) -> Float[Array, "rows values_per_step"]:
    """Load and dequantise `words_per_step` words of rows of a weight. Beyond the matrix the tile is 0.

    To bfloat16 a weight with offsets is rounded once from float32. A weight without offsets is multiplied as
    `WordOps.mul_split_scale` does, which in one case of ten thousand gives the second nearest bfloat16.

    Args:
        rows: in the order of `mma_m_order`.
        first_word: the first word along F.
        dtype: of the result, float32 or bfloat16.

    Returns:
        Rows in their own order, columns in the order of `mma_k_order`.
    """
    layout, ops = weight.layout, weight.ops
    tile = _Tile(weight, rows, first_word)
    high = tile.load_high_bits() if "high" in layout.operand_names else None
    word = tile.load("words", first_word + jnp.arange(tile.num_words))
    if layout.values_per_word == 1:
        return word.astype(dtype)
    if layout.layout == "fp8":
        tile = tile._replace(rows=lax.div(rows, FP8_BLOCK))  # rows of the scales
    scales, to_bfloat16 = tile.load_factors("scale"), dtype == jnp.bfloat16
    if to_bfloat16 and "offset" not in layout.operand_names:
        pairs = _scale_pairs(tile, unpack_bf16x2(layout, word, ops, high), scales)
        return arrange_for_mma(_split_pairs(pairs, ops), layout.k_values_per_thread)
    values, bias = unpack_f32(layout, word, ops, high)
    offsets = tile.load_factors("offset") if "offset" in layout.operand_names else list(map(jnp.zeros_like, scales))
    if to_bfloat16 and bias <= 256:  # what the sum loses is 2^-16 of the scale at most
        offsets = [offset - bias * scale for offset, scale in zip(offsets, scales, strict=True)]
    else:
        values = [m - bias for m in values]
    factors = [
        (tile.broadcast_groups(scale), tile.broadcast_groups(offset))
        for scale, offset in zip(scales, offsets, strict=True)
    ]
    out = [ops.fma(m, *factors[n // 4 % len(factors)]) for n, m in enumerate(values)]
    if to_bfloat16:
        out = _split_pairs([ops.pack_bf16x2(*out[n : n + 2]) for n in range(0, len(out), 2)], ops)
    return arrange_for_mma(out, layout.k_values_per_thread).astype(dtype)


def _split_pairs(pairs: list[UInt32[Array, "rows words"]], ops: WordOps) -> list[Float[Array, "rows words"]]:
    """Return the numbers of pairs in their order."""
    return [number for pair in pairs for number in ops.split_bf16x2(pair)]


def _scale_pairs(
    tile: _Tile, pairs: list[UInt32[Array, "rows words"]], scales: list[Float[Array, "rows groups"]]
) -> list[UInt32[Array, "rows words"]]:
    """Multiply pairs by the scales of their groups, or of the halves of their blocks, each the sum of two bfloat16."""
    ops, factors = tile.weight.ops, []
    for scale in scales:
        high, low = split_scale(scale, ops)
        factors.append((tile.broadcast_groups(high), tile.broadcast_groups(low)))
    return [ops.mul_split_scale(pair, *factors[n // 2 % len(factors)]) for n, pair in enumerate(pairs)]


def split_scale(
    scale: Float[Array, "*groups"], ops: WordOps
) -> tuple[UInt32[Array, "*groups"], UInt32[Array, "*groups"]]:
    """Return `scale * PAIR_SCALE` as the sum of two bfloat16, each twice in a pair."""
    high = ops.pack_bf16x2(scale * PAIR_SCALE, scale * PAIR_SCALE)
    rest = scale * PAIR_SCALE - lax.bitcast_convert_type(high & jnp.uint32(0xFFFF0000), jnp.float32)
    return high, ops.pack_bf16x2(rest, rest)
