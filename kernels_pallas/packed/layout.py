"""The arrays that a kernel gets for a stored weight, and the order in which the kernel reads weight and rows.

The operands of an MMA (tensor-core) instruction need a fixed register layout: of every row, a thread must hold certain
K positions. The weight stays in storage order, and a thread loads four words of a row that lie side by side. So the K
order of the product is permuted instead: x is read in the order that puts the same element of x and of the weight at
the same K position (`mma_k_order`). For a row of four-bit weights, a step of 128 elements in 16 words:

    words of the row        0   1   2   3 | 4   5   6   7 | 8   9  10  11 |12  13  14  15
    elements in them        0 ...      31 |32 ...      63 |64 ...      95 |96 ...     127
    loaded by thread              0       |       1       |       2       |       3

    K position of the MMA   0   1 | 2   3 | 4   5 | 6   7 | 8   9 |10  11 |12  13 | ...
    held by thread            0   |   1   |   2   |   3   |   0   |   1   |   2   | ...
    element of the weight   0   1 |32  33 |64  65 |96  97 | 2   3 |34  35 |66  67 | ...
    element of x            0   1 |32  33 |64  65 |96  97 | 2   3 |34  35 |66  67 | ...

The M order of the weight's rows is permuted to match, too (`mma_m_order`): the four warps of a program load 8 rows each
at a time, and each needs rows that lie together in the result.

A weight is read as 32-bit words because the Triton lowering counts the elements of an array below 4 GiB in 32 signed
bits, which single bytes would overflow at 2 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from kernels_pallas.platform import capability
from kernels_pallas.tiles import index_grid
from kernels_pallas.weights.bitcast import BitcastBfloat16
from kernels_pallas.weights.quantized import INDEX_BITS, QuantizedTensor
from kernels_pallas.weights.stored import StoredWeight, Weight

THREADS_PER_ROW = 4  # threads that share the words of a row in a step
OPTIONAL_ARRAYS = ("high", "scale", "offset", "super_scale", "super_offset")  # of a `QuantizedTensor`, beside its codes


@dataclass(frozen=True)
class PackedLayout:
    """The static half of a stored weight: how its operands are to be read.

    Attributes:
        layout, group, table: as in `QuantizedTensor`. The layout "plain" is an array of float elements.
        operand_names: the names of the operands after the words, in their order.
        packed_dtypes: operands whose values are packed in 32-bit words, and the dtypes of the values. The compiler
            prefetches nothing that is less than four bytes a thread.
        super_group: elements that share a `super_scale`, or 0.
        k_values_per_thread: elements of a row that a thread holds side by side for the tensor cores; see the function
            of that name.
    """

    layout: str
    group: int = 0
    table: tuple[int, ...] | None = None
    operand_names: tuple[str, ...] = ()
    packed_dtypes: tuple[tuple[str, str], ...] = ()
    super_group: int = 0
    k_values_per_thread: int = 2

    @property
    def values_per_word(self) -> int:
        """The elements in a word of codes."""
        return 8 if self.layout in INDEX_BITS else 1 if self.layout == "plain" else 4

    @property
    def words_per_step(self) -> int:
        """The words along F that one iteration of a kernel's loop reads.

        The layout alone decides, so the sum of a row is always taken in the same order.
        """
        return {1: 64, 4: 32, 8: 16}[self.values_per_word]

    @property
    def values_per_step(self) -> int:
        """The elements along F that one iteration of a kernel's loop reads."""
        return self.words_per_step * self.values_per_word


def has_wgmma() -> bool:
    """Return whether the tensor cores of the platform take 64 rows of the weight at once (`wgmma` and `tcgen05`).

    The compiler uses these instructions for sixteen token rows and more, and older ones for fewer. Consumer cards of
    the Blackwell generation (12.0) have the older ones only.
    """
    return (9, 0) <= capability() < (12, 0)


def min_row_tile() -> int:
    """Return the least token rows of a tile that the tensor cores multiply by the same instruction as more rows."""
    return 16 if has_wgmma() else 8


def max_row_tile(dtype: DTypeLike) -> int:
    """Return the most token rows of a tile: more rows of float32 do not fit the shared memory of smaller cards."""
    return 16 if dtype == jnp.float32 else 64


def k_values_per_thread() -> int:
    """Return the elements of a row that a thread holds side by side where a tile is loaded for the tensor cores.

    Two; or four with the older instructions in jax before 0.11, if a tile is put together from several arrays. The
    wrong number gives the same result and takes longer.
    """
    return 2 if has_wgmma() or jax.__version_info__ >= (0, 11) else 4


def pack_operands(w: Weight) -> tuple[PackedLayout, tuple[Array, ...]]:
    """Return the layout of a weight `[..., O, F]` and the operands of a kernel that reads it.

    The operands are the words `[..., O, F / values_per_word]`, then those that the layout names.

    Raises:
        ValueError: the weight is packed and F is not a multiple of 32.
        TypeError: the weight is stored in a form that kernels do not read.
    """
    if isinstance(w, BitcastBfloat16):
        return PackedLayout("plain"), (w.to_bfloat16(),)
    if not isinstance(w, StoredWeight):
        return PackedLayout("plain"), (w,)
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"kernels read plain arrays, BitcastBfloat16 and QuantizedTensor, not {type(w).__name__}")
    if w.shape[-1] % 32:
        raise ValueError(f"a packed weight of shape {list(w.shape)}: the last axis must be a multiple of 32")
    lead, bytes_ = w.codes.shape[:-1], w.codes
    if bytes_.dtype != jnp.uint8:
        bytes_ = lax.bitcast_convert_type(bytes_, jnp.uint8)
    words = lax.bitcast_convert_type(bytes_.reshape(*lead, -1, 4), jnp.uint32)
    operands = {name: array for name in OPTIONAL_ARRAYS if (array := getattr(w, name)) is not None}
    if w.high is not None:  # the high bits of two (codes6) or four (codes5) words make one word
        operands["high"] = lax.bitcast_convert_type(w.high.reshape(*lead, -1, 4 // w.high.dtype.itemsize), jnp.uint32)
    super_group = 0 if w.super_scale is None else w.shape[-1] // w.super_scale.shape[-1]
    packed_dtypes = {}
    for name, array in operands.items():
        per_word, group = 4 // array.dtype.itemsize, super_group if name.startswith("super") else w.group
        # Groups of 32 have four values in a step of a row. Of two bytes each, these are four bytes a thread already.
        wide_enough = group == 32 and per_word == 2
        if name != "high" and per_word > 1 and array.shape[-1] % per_word == 0 and not wide_enough:
            packed_dtypes[name] = array.dtype.name
            operands[name] = lax.bitcast_convert_type(array.reshape(*array.shape[:-1], -1, per_word), jnp.uint32)
    layout = PackedLayout(
        w.layout, w.group, w.table, tuple(operands), tuple(packed_dtypes.items()), super_group, k_values_per_thread()
    )
    return layout, (words, *operands.values())


def mma_m_order(layout: PackedLayout, count: int) -> Int[Array, " count"]:
    """Return the rows of a weight tile in the order in which `load_tile` reads them.

    Each of the four warps reads 8 rows at a time, and the rows of a warp lie together in the result.
    """
    at = jnp.arange(count)
    if layout.values_per_word == 1:
        return at
    return lax.rem(lax.div(at, 8), 4) * (count // 4) + lax.div(at, 32) * 8 + lax.rem(at, 8)


def mma_k_order(layout: PackedLayout, count: int) -> Int[Array, " count"]:
    """Return the element of a step of `count` elements that stands at each K position of the product."""
    at, values = jnp.arange(count), layout.k_values_per_thread
    if layout.values_per_word == 1:
        return at
    thread, turn = lax.rem(lax.div(at, values), THREADS_PER_ROW), lax.div(at, values * THREADS_PER_ROW)
    return thread * (count // THREADS_PER_ROW) + turn * values + lax.rem(at, values)


def load_rows(
    layout: PackedLayout, x_ref: Any, rows: Int[Array, " rows"], first: Int[Array, ""], count: int
) -> Shaped[Array, "rows count"]:
    """Inside a kernel: load elements `first ... first + count - 1` of token rows, in the order `mma_k_order`.

    Elements beyond the last row or behind the end of a row are 0.
    """
    at = index_grid(rows, first + mma_k_order(layout, count))
    inside = at[0] < x_ref.shape[0]
    if x_ref.shape[1] % count:
        inside &= at[1] < x_ref.shape[1]
    return plt.load(x_ref.at[at], mask=inside, other=0)


def arrange_for_mma(values: list[Float[Array, "rows words"]], k_values_per_thread: int) -> Float[Array, "rows count"]:
    """Put together a tile from the elements of its words: rows in their own order, columns in the order `mma_k_order`.

    Args:
        values: element n of every word, for each n, rows in the order `mma_m_order`.
    """
    rows, words = values[0].shape
    nibbles = len(values) // 4
    tile = _interleave([_interleave(values[4 * n : 4 * n + 4]) for n in range(nibbles)])
    tile = tile.reshape(
        -1, 4, 8, THREADS_PER_ROW, words // THREADS_PER_ROW, 4 // k_values_per_thread, k_values_per_thread, nibbles
    )
    return tile.transpose(1, 0, 2, 7, 4, 5, 3, 6).reshape(rows, -1)


def _interleave(values: list[Float[Array, "rows words"]]) -> Float[Array, "rows columns"]:
    """Join `n` arrays element by element, two at a time, which happens in registers."""
    if len(values) == 1:
        return values[0]
    pair = jnp.stack([_interleave(values[0::2]), _interleave(values[1::2])], axis=-1)
    return pair.reshape(pair.shape[0], -1)
