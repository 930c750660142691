"""`linear`: the one call by which the model multiplies rows with a weight; nothing above it asks how the weight is stored."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.matmul import triton
from kernels_pallas.matmul.reference import dot_last
from kernels_pallas.quantized import QuantizedTensor
from kernels_pallas.stacked import StackedTensor
from kernels_pallas.target import target

# On a CPU, up to so many float32 rows are multiplied one by one with a weight of at most so many bytes, which stays in the
# core's own cache: XLA hands two rows or more to a pool of threads, and the hand-over costs more than the product.
FEW_ROWS, SMALL_WEIGHT = 9, 1 << 20

# Platform -> kernel for packed weights, (rows [M, D], weight, layer | None, out_dtype=) -> [M, O]. Elsewhere: `lax`.
KERNELS: dict[str, Callable[..., Array]] = {"cuda": triton.matmul}


def linear(
    x: Float[Array, "*rows D"], w: Array | QuantizedTensor | StackedTensor, *, out_dtype: jnp.dtype | None = None
) -> Array:
    """`x @ w.T`, accumulated in float32.

    Args:
        x: rows, in the compute dtype.
        w: weight as published, `[out, in]`, in any float dtype or packed; read in the dtype of `x`.
        out_dtype: dtype of the result; that of `x` unless told.

    Returns:
        `[*rows, O]`.
    """
    if isinstance(w, QuantizedTensor | StackedTensor):
        return _packed(x, w, out_dtype or x.dtype)
    w = w.astype(x.dtype)
    rows = math.prod(x.shape[:-1])
    if x.dtype == jnp.bfloat16 and rows == 1 and target() == "cpu":
        # For a single bfloat16 row XLA's CPU backend first converts the whole weight to float32, twenty times the cost
        # of the product; for two rows it multiplies bfloat16 as it is.
        two = jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])
        y = dot_last(two, w)[:1].reshape(*x.shape[:-1], w.shape[0])
    elif x.dtype == jnp.float32 and 1 < rows <= FEW_ROWS and w.size * 4 <= SMALL_WEIGHT and target() == "cpu":
        each = x.reshape(rows, 1, -1)
        y = jnp.concatenate([dot_last(each[i], w, lax.Precision.HIGHEST) for i in range(rows)])
        y = y.reshape(*x.shape[:-1], w.shape[0])
    else:
        # float32 rows ask for float32 products: a GPU would otherwise round the operands to TF32.
        y = dot_last(x, w, lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
    return y.astype(out_dtype or x.dtype)


def _packed(x: Array, w: QuantizedTensor | StackedTensor, out_dtype: jnp.dtype) -> Array:
    kernel = KERNELS.get(target())
    if kernel is None:
        whole = w.take() if isinstance(w, StackedTensor) else w
        return linear(x, whole.dequantize(x.dtype), out_dtype=out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    weight, layer = (w.stack, w.layer) if isinstance(w, StackedTensor) else (w, None)
    return kernel(rows, weight, layer, out_dtype=out_dtype).reshape(*x.shape[:-1], weight.shape[-2])


def take_rows(w: Array | QuantizedTensor, rows: Int[Array, "*B"], dtype: jnp.dtype) -> Float[Array, "*B D"]:
    """Rows of a weight `[O, D]` in `dtype`; of a packed one only these are dequantised. FP8 blocks are not supported."""
    if isinstance(w, QuantizedTensor):
        return w[rows].dequantize(dtype)
    if w.dtype == jnp.bfloat16 and target() == "cpu":
        return _take_bits(w, rows).astype(dtype)
    return w[rows].astype(dtype)


@jax.custom_vjp
def _take_bits(w: Float[Array, "O D"], rows: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """`w[rows]` by way of integers: of bfloat16, XLA's CPU backend would first convert the whole weight to float32."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(w, jnp.uint16)[rows], w.dtype)


_take_bits.defvjp(
    lambda w, rows: (_take_bits(w, rows), (w, rows)),
    lambda saved, grad: jax.vjp(lambda w: w[saved[1]], saved[0])[1](grad) + (None,),
)
