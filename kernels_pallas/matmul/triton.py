"""`x @ w.T` with w read packed: a Pallas kernel through the Triton lowering, for compute capability 8.0 and above.

One launch multiplies the same rows with several weights: that saves the start of kernels that take longer to start than to
run, and small matrices fill the GPU together. A row's result does not depend on the other rows of the call nor on the
other weights, bit for bit: the sum over D is cut into steps and splits that depend on the shape of the weight alone, and
every sum is taken in the same order. With few rows the splits are programs of their own, so that a small matrix still
fills the GPU; with many rows one program adds them up.
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
from jaxtyping import Float

from kernels_pallas.packed.dequantize import Form, few_rows, load_rows, load_tile, most_rows, tile_rows, words
from kernels_pallas.packed.ptx_ops import ARITHMETIC, MACHINE
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.tiles import dot, index_grid, next_power_of_2
from kernels_pallas.weights.quantized import QuantizedTensor

FEW = 64  # rows of a call up to which the splits are programs of their own
PROGRAMS = 128  # programs that fill a GPU
OUT_TILE = 64


def splits_of(out: int, steps: int) -> int:
    """Parts of the sum over D: a power of two, of at least two steps each, that makes about `PROGRAMS` programs."""
    splits = 1
    while splits * -(-out // OUT_TILE) < PROGRAMS and steps // (2 * splits) >= 2:
        splits *= 2
    return splits


class Product(NamedTuple):
    """The static half of one of the products of a launch."""

    form: Form
    operands: int  # its share of the kernel's references
    lead: bool  # whether the weight is a stack
    first: int  # its first tile of the result
    tiles: int
    steps: int
    splits: int

    @property
    def turns(self) -> int:
        """Steps of a split; the last ones may have fewer or none."""
        return -(-self.steps // self.splits)


def _kernel(
    layer_ref: Any, x_ref: Any, *refs: Any, products: tuple[Product, ...], out_tile: int, row_tile: int, apart: bool, asm: bool
) -> None:  # fmt: skip
    """One tile of one result."""
    tile, split = pl.program_id(1), pl.program_id(2)  # not inside of a branch
    m = pl.program_id(0) * row_tile + jnp.arange(row_tile)
    y_refs, at = refs[len(refs) - len(products) :], 0
    for number, product in enumerate(products):
        weight, at = refs[at : at + product.operands], at + product.operands
        first = (tile - product.first) * out_tile
        part = split if apart else None
        run = partial(_tile, layer_ref, x_ref, weight, y_refs[number], number, product, m, first, out_tile, part, asm)
        if len(products) == 1:
            run()
        else:
            mine = (tile >= product.first) & (tile < product.first + product.tiles)
            pl.when(mine & (split < product.splits if apart else mine))(run)


def _tile(
    layer_ref: Any, x_ref: Any, weight: tuple[Any, ...], y_ref: Any, number: int, product: Product, m: Array, first_out: Array,
    out_tile: int, split: Array | None, asm: bool,
) -> None:  # fmt: skip
    """Rows m and some columns of a result: one split of the sum over D, or (None) all of them, added in order."""
    form, (rows, out) = product.form, y_ref.shape[1:]
    index = (layer_ref[number],) if product.lead else ()
    ops = MACHINE if asm else ARITHMETIC
    shape = (out, x_ref.shape[1] // form.slots)
    rows_read = first_out + tile_rows(form, out_tile)

    def step(i: Array, acc: Array) -> Array:
        first = i * form.step
        w = load_tile(form, weight, index, rows_read, first, form.step, shape, x_ref.dtype, ops)
        return acc + dot(w, load_rows(form, x_ref, m, first * form.slots, form.step * form.slots))

    zero = jnp.zeros((out_tile, m.size), jnp.float32)

    def part(p: Array | int) -> Array:
        first = p * product.turns
        turns: Array | int = product.turns
        if product.steps % product.splits:  # no step begins behind the end of a row, where nothing is masked
            turns = jnp.clip(product.steps - first, 0, turns)
        return lax.fori_loop(0, turns, lambda i, acc: step(first + i, acc), zero)

    if split is not None:
        total = part(split)
    elif product.splits == 1:
        total = part(0)
    else:  # a loop: written out, sixteen parts would be sixteen times the code to compile
        total = lax.fori_loop(0, product.splits, lambda p, total: total + part(p), zero)
    row, col = index_grid(m, first_out + jnp.arange(out_tile))
    plt.store(
        y_ref.at[0 if split is None else split, row, col], total.T.astype(y_ref.dtype), mask=(row < rows) & (col < out)
    )


def matmul(
    x: Float[Array, "M D"],
    w: Array | QuantizedTensor,
    layer: Array | None = None,
    *,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "M O"]:
    """`x @ w.T`, accumulated in float32; w is dequantised in float32 and rounded to the dtype of x.

    Args:
        w: `[O, D]`, or with `layer` (int32 scalar) a stack `[L, O, D]` of which that one is read in place.
        interpret: run as plain `jnp`, on any device.
    """
    [product] = matmul_parts(x, [(w, layer)], [out_dtype], interpret=interpret)
    return product.sum(out_dtype)


def matmul_parts(
    x: Float[Array, "M D"],
    weights: Sequence[tuple[Array | QuantizedTensor, Array | None]],
    out_dtypes: Sequence[Any],
    *,
    interpret: bool = False,
) -> list[PartialSums]:
    """Multiply the same rows with each (weight, layer) in one launch, as `matmul` does, and leave the partial sums unadded.

    The partial sums of a product are float32, or in its `out_dtype` where there is only one.
    """
    rows = x.shape[0]
    few = rows <= FEW
    row_tile = max(few_rows(), min(next_power_of_2(rows), most_rows(x.dtype)))
    out_tile, warps = (2 * OUT_TILE, 8) if row_tile == 64 and not few else (OUT_TILE, 4)
    products: list[Product] = []
    operands: list[Array] = []
    shapes, tiles = [], 0
    for (w, layer), dtype in zip(weights, out_dtypes, strict=True):
        form, parts = words(w)
        out, steps = parts[0].shape[-2], -(-parts[0].shape[-1] // form.step)
        splits = splits_of(out, steps)
        products.append(Product(form, len(parts), layer is not None, tiles, -(-out // out_tile), steps, splits))
        operands += parts
        tiles += products[-1].tiles
        apart = splits if few else 1
        shapes.append(jax.ShapeDtypeStruct((apart, rows, out), jnp.float32 if apart > 1 else dtype))
    index = jnp.stack([jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32) for _, layer in weights])
    kernel = partial(
        _kernel, products=tuple(products), out_tile=out_tile, row_tile=row_tile, apart=few, asm=not interpret
    )
    results = pl.pallas_call(
        kernel,
        grid=(-(-rows // row_tile), tiles, max(shape.shape[0] for shape in shapes)),
        out_shape=shapes,
        compiler_params=plt.CompilerParams(
            num_warps=warps, num_stages=min(p.form.stages(row_tile, x.dtype) for p in products)
        ),
        interpret=interpret,
        name="matmul_" + "_".join(dict.fromkeys(product.form.layout for product in products)),
    )(index, x, *operands)
    return [PartialSums(parts) for parts in results]
