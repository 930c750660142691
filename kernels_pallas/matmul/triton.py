"""`x @ w.T` with w read packed: a Pallas kernel through the Triton lowering, for compute capability 8.0 and above.

A row's result does not depend on the other rows of the call, bit for bit: the sum over D is cut into steps and splits
that depend on the shape of the weight alone, and every sum is taken in the same order. With few rows the splits are
programs of their own, so that a small matrix still fills the GPU; with many rows one program adds them up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from kernels_pallas.packed_words import Form, dot, grid, load_rows, load_tile, prmt, select_bytes, words
from kernels_pallas.quantized import QuantizedTensor

FEW = 64  # rows of a call up to which the splits are programs of their own
PROGRAMS = 128  # programs that fill a GPU
OUT_TILE = 64


def splits_of(out: int, steps: int) -> int:
    """Parts of the sum over D: a power of two, of at least two steps each, that makes about `PROGRAMS` programs."""
    splits = 1
    while splits * -(-out // OUT_TILE) < PROGRAMS and steps // (2 * splits) >= 2:
        splits *= 2
    return splits


def _kernel(
    layer_ref: Any,
    x_ref: Any,
    *refs: Any,
    form: Form,
    lead: int,
    out_tile: int,
    row_tile: int,
    turns: int,
    together: int,
    asm: bool,
) -> None:
    """One tile of the result; `together` splits of `turns` steps each, added in order."""
    *weight, y_ref = refs
    rows, out = y_ref.shape[1:]
    o = pl.program_id(1) * out_tile + jnp.arange(out_tile)
    m = pl.program_id(0) * row_tile + jnp.arange(row_tile)
    index = (layer_ref[0],) if lead else ()
    select = prmt if asm else select_bytes
    shape = (out, x_ref.shape[1] // form.slots)

    def step(i: Array, acc: Array) -> Array:
        first = i * form.step
        w = load_tile(form, tuple(weight), index, o, first, form.step, shape, x_ref.dtype, select)
        return acc + dot(w, load_rows(form, x_ref, m, first * form.slots, form.step * form.slots))

    def part(p: Array | int) -> Array:
        zero = jnp.zeros((out_tile, row_tile), jnp.float32)
        return lax.fori_loop(0, turns, lambda i, acc: step(p * turns + i, acc), zero)

    total = part(pl.program_id(2) * together)
    for p in range(1, together):
        total = total + part(p)
    row, col = grid(m, o)
    plt.store(y_ref.at[pl.program_id(2), row, col], total.T.astype(y_ref.dtype), mask=(row < rows) & (col < out))


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
    parts = matmul_parts(x, w, layer, out_dtype=out_dtype, interpret=interpret)
    total = parts[0]
    for part in range(1, len(parts)):
        total = total + parts[part]
    return total.astype(out_dtype)


def matmul_parts(
    x: Float[Array, "M D"],
    w: Array | QuantizedTensor,
    layer: Array | None = None,
    *,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "S M O"]:
    """The parts of `matmul`, to be added in their order: of `out_dtype` if there is one, else float32."""
    form, operands = words(w)
    out = operands[0].shape[-2]
    rows = x.shape[0]
    steps = -(-operands[0].shape[-1] // form.step)
    splits = splits_of(out, steps)
    few = rows <= FEW
    row_tile = 64 if not few else 16 if rows <= 16 else 32 if rows <= 32 else 64
    out_tile, warps = (OUT_TILE, 4) if few else (2 * OUT_TILE, 8)
    apart = splits if few else 1
    dtype = jnp.float32 if apart > 1 else out_dtype
    index = jnp.zeros(1, jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
    return pl.pallas_call(
        partial(
            _kernel,
            form=form,
            lead=int(layer is not None),
            out_tile=out_tile,
            row_tile=row_tile,
            turns=-(-steps // splits),
            together=splits // apart,
            asm=not interpret,
        ),
        grid=(-(-rows // row_tile), -(-out // out_tile), apart),
        out_shape=jax.ShapeDtypeStruct((apart, rows, out), dtype),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=3),
        interpret=interpret,
        name=f"matmul_{form.layout}",
    )(index, x, *operands)
