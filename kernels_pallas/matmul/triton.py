"""`x @ w.T` with w read packed: a Pallas kernel through the Triton lowering, for compute capability 8.0 and above.

One launch multiplies the same rows with several weights. That saves the start of kernels that take longer to start than
to run, and small matrices fill the GPU together.

A row's result does not depend on the other rows of the call nor on the other weights, bit for bit. The sum over F is
cut into steps and splits that depend on the shape of the weight alone (split-K), and every sum is taken in the same
order. With few rows each split is a program of its own, so that a small matrix fills the GPU, too; with many rows one
program adds the splits up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas.packed.dequantize import WeightRefs, load_tile
from kernels_pallas.packed.layout import (
    PackedLayout,
    load_rows,
    max_row_tile,
    min_row_tile,
    mma_m_order,
    pack_operands,
)
from kernels_pallas.packed.ptx_ops import WordOps, word_ops
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.tiles import dot, index_grid, next_power_of_2
from kernels_pallas.weights import BitcastBfloat16, LayerView, QuantizedTensor, StoredWeight, Weight

DECODE_ROWS = 64  # rows of a call up to which each split is a program of its own
PROGRAMS = 128  # programs that fill a GPU
OUT_TILE = 64


def supports(w: Weight) -> bool:
    """Return whether the kernel reads a weight: a plain array, or a packed one whose rows are whole blocks of 32."""
    if isinstance(w, QuantizedTensor | LayerView):
        return w.shape[-1] % 32 == 0
    return isinstance(w, BitcastBfloat16) or not isinstance(w, StoredWeight)


def num_splits(outputs: int, steps: int) -> int:
    """Return the splits of the sum over F: a power of two that makes about `PROGRAMS` programs of two steps or more."""
    splits = 1
    while splits * -(-outputs // OUT_TILE) < PROGRAMS and steps // (2 * splits) >= 2:
        splits *= 2
    return splits


class _Product(NamedTuple):
    """The static half of one of the products of a launch."""

    number: int
    layout: PackedLayout
    first_operand: int  # its share of the kernel's references
    num_operands: int
    is_stack: bool
    first_tile: int  # its first tile among those of all results
    num_tiles: int
    num_steps: int
    num_splits: int

    @property
    def steps_per_split(self) -> int:
        """The steps of a split; the last splits may have fewer or none."""
        return -(-self.num_steps // self.num_splits)


class _Tiling(NamedTuple):
    """The tiles of a launch."""

    row_tile: int
    out_tile: int
    write_partials: bool  # each split is a program of its own, which writes its partial sum


class _Program(NamedTuple):
    """What one program of a launch computes: token rows, a tile of outputs, and a split if it writes partial sums."""

    rows: Int[Array, " row_tile"]
    tile: Int[Array, ""]
    split: Int[Array, ""]


def _kernel(
    layer_ref: Any, x_ref: Any, *refs: Any, products: tuple[_Product, ...], tiling: _Tiling, ops: WordOps
) -> None:
    """Compute one tile of one result, or one partial sum of it."""
    first_row = pl.program_id(0) * tiling.row_tile
    program = _Program(first_row + jnp.arange(tiling.row_tile), pl.program_id(1), pl.program_id(2))
    y_refs = refs[len(refs) - len(products) :]
    for product, y_ref in zip(products, y_refs, strict=True):
        weight_refs = refs[product.first_operand :][: product.num_operands]
        run = partial(_store_tile, layer_ref, x_ref, weight_refs, y_ref, product, tiling, program, ops)
        if len(products) == 1:
            run()
        else:
            mine = (program.tile >= product.first_tile) & (program.tile < product.first_tile + product.num_tiles)
            if tiling.write_partials:
                mine &= program.split < product.num_splits
            pl.when(mine)(run)


def _store_tile(
    layer_ref: Any,
    x_ref: Any,
    weight_refs: tuple[Any, ...],
    y_ref: Any,
    product: _Product,
    tiling: _Tiling,
    program: _Program,
    ops: WordOps,
) -> None:
    """Compute one split of the sum over F for a tile of one result, or all splits, added in their order."""
    layout, (num_rows, outputs) = product.layout, y_ref.shape[1:]
    index = (layer_ref[product.number],) if product.is_stack else ()
    weight = WeightRefs(layout, weight_refs, index, outputs, x_ref.shape[1] // layout.values_per_word, ops)
    first_out = (program.tile - product.first_tile) * tiling.out_tile
    weight_rows = first_out + mma_m_order(layout, tiling.out_tile)

    def add_step(i: Array, total: Array) -> Array:
        first_word = i * layout.words_per_step
        w = load_tile(weight, weight_rows, first_word, x_ref.dtype)
        first_value = first_word * layout.values_per_word
        return total + dot(w, load_rows(layout, x_ref, program.rows, first_value, layout.values_per_step))

    zero = jnp.zeros((tiling.out_tile, program.rows.size), jnp.float32)

    def sum_of_split(split: Array | int) -> Array:
        first_step = split * product.steps_per_split
        iterations: Array | int = product.steps_per_split
        if product.num_steps % product.num_splits:  # no step begins behind the end of a row, where nothing is masked
            iterations = jnp.clip(product.num_steps - first_step, 0, iterations)
        return lax.fori_loop(0, iterations, lambda i, total: add_step(first_step + i, total), zero)

    if tiling.write_partials:
        total = sum_of_split(program.split)
    elif product.num_splits == 1:
        total = sum_of_split(0)
    else:  # a loop: written out, sixteen splits would be sixteen times the code to compile
        total = lax.fori_loop(0, product.num_splits, lambda split, total: total + sum_of_split(split), zero)
    row, col = index_grid(program.rows, first_out + jnp.arange(tiling.out_tile))
    part = program.split if tiling.write_partials else 0
    plt.store(y_ref.at[part, row, col], total.T.astype(y_ref.dtype), mask=(row < num_rows) & (col < outputs))


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
    write_partials = rows <= DECODE_ROWS
    row_tile = max(min_row_tile(), min(next_power_of_2(rows), max_row_tile(x.dtype)))
    out_tile, warps = (2 * OUT_TILE, 8) if row_tile == 64 and not write_partials else (OUT_TILE, 4)
    products: list[_Product] = []
    operands: list[Array] = []
    shapes: list[jax.ShapeDtypeStruct] = []
    tiles = 0
    for number, ((w, layer), dtype) in enumerate(zip(weights, out_dtypes, strict=True)):
        layout, arrays = pack_operands(w)
        outputs, steps = arrays[0].shape[-2], -(-arrays[0].shape[-1] // layout.words_per_step)
        product = _Product(
            number=number,
            layout=layout,
            first_operand=len(operands),
            num_operands=len(arrays),
            is_stack=layer is not None,
            first_tile=tiles,
            num_tiles=-(-outputs // out_tile),
            num_steps=steps,
            num_splits=num_splits(outputs, steps),
        )
        products.append(product)
        operands += arrays
        tiles += product.num_tiles
        parts = product.num_splits if write_partials else 1
        shapes.append(jax.ShapeDtypeStruct((parts, rows, outputs), jnp.float32 if parts > 1 else dtype))
    layers = jnp.stack([jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32) for _, layer in weights])
    results = pl.pallas_call(
        partial(
            _kernel,
            products=tuple(products),
            tiling=_Tiling(row_tile, out_tile, write_partials),
            ops=word_ops(interpret=interpret),
        ),
        grid=(-(-rows // row_tile), tiles, max(shape.shape[0] for shape in shapes)),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(
            num_warps=warps, num_stages=min(p.layout.num_stages(row_tile, x.dtype) for p in products)
        ),
        interpret=interpret,
        name="matmul_" + "_".join(dict.fromkeys(product.layout.layout for product in products)),
    )(layers, x, *operands)
    return [PartialSums(parts) for parts in results]
