"""`x @ w.T` with w read packed: a Pallas kernel through the Triton lowering, for compute capability 8.0 and above.

One launch multiplies the same rows with several weights. That saves the start of kernels that take longer to start than
to run, and small matrices fill the GPU together.

A row's result does not depend on the other rows of the call nor on the other weights, bit for bit. The sum over F is
cut into steps and splits that depend on the shape of the weight alone (split-K), and every sum is taken in the same
order. With few rows each split is a program of its own, so that a small matrix fills the GPU, too; with many rows one
program adds the splits up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas.matmul.tiling import DECODE_ROWS, OUT_TILE, Operands, Tiling, choose_tiling
from kernels_pallas.packed.dequantize import WeightRefs, load_tile
from kernels_pallas.packed.layout import PackedLayout, load_rows, mma_m_order, pack_operands
from kernels_pallas.packed.ptx_ops import WordOps, word_ops
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.tiles import dot, index_grid
from kernels_pallas.weights import BitcastBfloat16, LayerView, QuantizedTensor, StoredWeight, Weight

__all__ = ["DECODE_ROWS", "OUT_TILE", "matmul", "matmul_split_k", "supports"]


def supports(w: Weight) -> bool:
    """Return whether the kernel reads a weight: a plain array, or a packed one whose rows are whole blocks of 32."""
    if isinstance(w, QuantizedTensor | LayerView):
        return w.shape[-1] % 32 == 0
    return isinstance(w, BitcastBfloat16) or not isinstance(w, StoredWeight)


class _Product(NamedTuple):
    """The static half of one of the products of a launch."""

    layer: int | None  # which of the numbers of layers is its own; None: the weight is no stack
    layout: PackedLayout
    first_operand: int  # its share of the kernel's references
    num_operands: int
    first_tile: int  # its first tile among those of all results
    num_tiles: int
    num_steps: int
    num_splits: int

    @property
    def steps_per_split(self) -> int:
        """The steps of a split; the last splits may have fewer or none."""
        return -(-self.num_steps // self.num_splits)


class _Program(NamedTuple):
    """What one program of a launch computes: token rows, a tile of outputs, and a split if it writes partial sums."""

    rows: Int[Array, " row_tile"]
    tile: Int[Array, ""]
    split: Int[Array, ""]


def _kernel(
    layer_refs: tuple[Any, ...], x_ref: Any, *refs: Any, products: tuple[_Product, ...], tiling: Tiling, ops: WordOps
) -> None:
    """Compute one tile of one result, or one partial sum of it."""
    first_row = pl.program_id(0) * tiling.row_tile
    program = _Program(first_row + jnp.arange(tiling.row_tile), pl.program_id(1), pl.program_id(2))
    y_refs = refs[len(refs) - len(products) :]
    for product, y_ref in zip(products, y_refs, strict=True):
        weight_refs = refs[product.first_operand :][: product.num_operands]
        run = partial(_store_tile, layer_refs, x_ref, weight_refs, y_ref, product, tiling, program, ops)
        if len(products) == 1:
            run()
        else:
            mine = (program.tile >= product.first_tile) & (program.tile < product.first_tile + product.num_tiles)
            if tiling.write_partials:
                mine &= program.split < product.num_splits
            pl.when(mine)(run)


def _store_tile(
    layer_refs: tuple[Any, ...],
    x_ref: Any,
    weight_refs: tuple[Any, ...],
    y_ref: Any,
    product: _Product,
    tiling: Tiling,
    program: _Program,
    ops: WordOps,
) -> None:
    """Compute one split of the sum over F for a tile of one result, or all splits, added in their order."""
    layout, (num_rows, outputs) = product.layout, y_ref.shape[1:]
    index = () if product.layer is None else (layer_refs[product.layer][0],)
    weight = WeightRefs(layout, weight_refs, index, outputs, x_ref.shape[1] // layout.values_per_word, ops)
    first_out = (program.tile - product.first_tile) * tiling.out_tile
    weight_rows = first_out + mma_m_order(layout, tiling.out_tile)

    def add_step(i: Array, total: Array) -> Array:
        first_word = i * layout.words_per_step
        w = load_tile(weight, weight_rows, first_word, x_ref.dtype)
        first_value = first_word * layout.values_per_word
        return total + dot(w, load_rows(layout, x_ref, program.rows, first_value, layout.values_per_step))

    zero = jnp.zeros((tiling.out_tile, program.rows.size), jnp.float32)

    if tiling.write_partials or product.num_splits == 1:
        split = program.split if tiling.write_partials else 0
        first_step = split * product.steps_per_split
        iterations: Array | int = product.steps_per_split
        if product.num_steps % product.num_splits:  # no step begins behind the end of a row, where nothing is masked
            iterations = jnp.clip(product.num_steps - first_step, 0, iterations)
        total = lax.fori_loop(0, iterations, lambda i, total: add_step(first_step + i, total), zero)
    else:
        total = _sum_of_splits(add_step, product, zero)
    row, col = index_grid(program.rows, first_out + jnp.arange(tiling.out_tile))
    part = program.split if tiling.write_partials else 0
    plt.store(y_ref.at[part, row, col], total.T.astype(y_ref.dtype), mask=(row < num_rows) & (col < outputs))


def _sum_of_splits(
    add_step: Callable[[Array, Array], Array], product: _Product, zero: Float[Array, "out_tile rows"]
) -> Float[Array, "out_tile rows"]:
    """Add all splits in their order, each summed by itself: the additions of few rows, in one loop over all steps.

    A loop over splits around a loop over their few steps would wait for memory at the start of every split.
    """

    def run_step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        part, total = add_step(i, sums[0]), sums[1]
        ends_split = lax.rem(i, product.steps_per_split) == product.steps_per_split - 1
        if product.num_steps % product.steps_per_split:
            ends_split |= i == product.num_steps - 1
        return lax.cond(ends_split, lambda: (zero, total + part), lambda: (part, total))

    return lax.fori_loop(0, product.num_steps, run_step, (zero, zero))[1]


def matmul(
    x: Float[Array, "rows F"],
    w: Weight,
    layer: Array | None = None,
    *,
    out_dtype: DTypeLike = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "rows O"]:
    """Return `x @ w.T`, accumulated in float32. The weight is dequantised in float32 and rounded to the dtype of `x`.

    Args:
        w: `[O, F]`, or with `layer` (an int32 scalar) a stack `[L, O, F]` of which one layer is read in place.
        interpret: run as plain `jnp`, on any device.
    """
    [product] = matmul_split_k(x, [(w, layer)], [out_dtype], interpret=interpret)
    return product.sum(out_dtype)


def matmul_split_k(
    x: Float[Array, "rows F"],
    weights: Sequence[tuple[Weight, Array | None]],
    out_dtypes: Sequence[DTypeLike],
    *,
    interpret: bool = False,
) -> list[PartialSums]:
    """Multiply the same rows with each (weight, layer) in one launch, and leave the partial sums unadded.

    The partial sums `[P, rows, O]` of a product are float32, or, where P = 1, of its `out_dtype`.
    """
    rows = x.shape[0]
    packed = [Operands(*pack_operands(w)) for w, _ in weights]
    tiling = choose_tiling(rows, packed, x.dtype)
    products: list[_Product] = []
    operands: list[Array] = []
    shapes: list[jax.ShapeDtypeStruct] = []
    tiles = 0
    # An array each: XLA would need a kernel to put several together.
    layers = tuple(jnp.asarray(layer, jnp.int32).reshape(1) for _, layer in weights if layer is not None)
    num_stacks = 0
    for weight, (_, layer), dtype in zip(packed, weights, out_dtypes, strict=True):
        product = _Product(
            layer=None if layer is None else num_stacks,
            layout=weight.layout,
            first_operand=len(operands),
            num_operands=len(weight.arrays),
            first_tile=tiles,
            num_tiles=-(-weight.outputs // tiling.out_tile),
            num_steps=weight.num_steps,
            num_splits=weight.num_splits,
        )
        products.append(product)
        num_stacks += layer is not None
        operands += weight.arrays
        tiles += product.num_tiles
        parts = product.num_splits if tiling.write_partials else 1
        shapes.append(jax.ShapeDtypeStruct((parts, rows, weight.outputs), jnp.float32 if parts > 1 else dtype))
    results = pl.pallas_call(
        partial(_kernel, products=tuple(products), tiling=tiling, ops=word_ops(interpret=interpret)),
        grid=(-(-rows // tiling.row_tile), tiles, max(shape.shape[0] for shape in shapes)),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="matmul_" + "_".join(dict.fromkeys(product.layout.layout for product in products)),
    )(layers, x, *operands)
    return [PartialSums(parts) for parts in results]
