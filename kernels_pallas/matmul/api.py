"""`linear`: the one call by which the model multiplies rows with a weight; nothing above it asks how the weight is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.matmul import triton
from kernels_pallas.matmul.reference import dot_first, dot_last
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import platform
from kernels_pallas.weights.layer_view import LayerView
from kernels_pallas.weights.quantized import QuantizedTensor
from kernels_pallas.weights.transposed import TransposedWeight

Packed = QuantizedTensor | LayerView

# Platform -> kernel for packed weights, (rows [M, D], [(weight, layer | None)], out_dtypes) -> partial sums of each product.
KERNELS: dict[str, Callable[..., list[PartialSums]]] = {"cuda": triton.matmul_parts}  # elsewhere: `lax`


def linear(
    x: Float[Array, "*rows D"],
    w: Array | QuantizedTensor | LayerView | TransposedWeight,
    *,
    out_dtype: jnp.dtype | None = None,
) -> Array:
    """`x @ w.T`, accumulated in float32.

    Args:
        x: rows, in the compute dtype.
        w: weight `[out, in]` in any float dtype, turned or packed; read in the dtype of `x`.
        out_dtype: dtype of the result; that of `x` unless told.

    Returns:
        `[*rows, O]`.
    """
    if isinstance(w, Packed):
        if KERNELS.get(platform()):
            return fused_linears(x, w, out_dtypes=[out_dtype])[0]
        w = w.take() if isinstance(w, LayerView) else w
        w = w.dequantize(x.dtype)
    # float32 rows ask for float32 products: a GPU would otherwise round the operands to TF32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    rows = math.prod(x.shape[:-1])
    alone = x.dtype == jnp.bfloat16 and rows == 1 and platform() == "cpu"
    if alone:
        # For a single bfloat16 row XLA's CPU backend first converts the whole weight to float32, twenty times the cost
        # of the product; for two rows it multiplies bfloat16 as it is.
        given, x = x, jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])
    if isinstance(w, TransposedWeight):
        y = dot_first(x, w.array.astype(x.dtype), precision)
    else:
        y = dot_last(x, w.astype(x.dtype), precision)
    if alone:
        y = y[:1].reshape(*given.shape[:-1], y.shape[-1])
    return y.astype(out_dtype or x.dtype)


def fused_linears(
    x: Float[Array, "*rows D"],
    *weights: Any,
    out_dtypes: Sequence[jnp.dtype | None] | None = None,
) -> list[Array]:
    """`linear` of the same rows with each weight, into its own dtype: one product of those that lie side by side in the
    first, one launch where any is packed."""
    dtypes = [dtype or x.dtype for dtype in out_dtypes or [None] * len(weights)]
    first = weights[0]
    if isinstance(first, TransposedWeight) and first.parts:
        each = jnp.split(linear(x, first, out_dtype=jnp.float32), np.cumsum(first.parts)[:-1].tolist(), axis=-1)
        beside = [y.astype(dtype) for y, dtype in zip(each, dtypes, strict=False)]
        others = weights[len(each) :]
        return beside + (fused_linears(x, *others, out_dtypes=dtypes[len(each) :]) if others else [])
    if any(isinstance(w, Packed) for w in weights) and KERNELS.get(platform()):
        products = linears_split_k(x, *weights, out_dtypes=dtypes)
        return [
            y.sum(dtype).reshape(*x.shape[:-1], y.parts.shape[-1]) for y, dtype in zip(products, dtypes, strict=True)
        ]
    return [linear(x, w, out_dtype=dtype) for w, dtype in zip(weights, dtypes, strict=True)]


def linears_split_k(
    x: Float[Array, "*rows D"], *weights: Any, out_dtypes: Sequence[jnp.dtype | None] | None = None
) -> list[PartialSums]:
    """Multiply the same rows with each weight, as `fused_linears` does, and return the split-K partial sums of each product.

    Leading axes of `x` are flattened: the partial sums are `[P, M, O]`, M the product of those axes. They are float32, or, where
    P = 1, in the dtype of the result.
    """
    dtypes = [dtype or x.dtype for dtype in out_dtypes or [None] * len(weights)]
    kernel = KERNELS.get(platform())
    if kernel is None or not any(isinstance(w, Packed) for w in weights):
        return [PartialSums(y.reshape(1, -1, y.shape[-1])) for y in fused_linears(x, *weights, out_dtypes=dtypes)]
    if x.size == 0:
        return [PartialSums(jnp.zeros((1, 0, w.shape[-2]), dtype)) for w, dtype in zip(weights, dtypes, strict=True)]
    operands = [(w.stack, w.layer) if isinstance(w, LayerView) else (w, None) for w in weights]
    return kernel(x.reshape(-1, x.shape[-1]), operands, dtypes)


def embedding_lookup(w: Array | QuantizedTensor, rows: Int[Array, "*B"], dtype: jnp.dtype) -> Float[Array, "*B D"]:
    """Rows of a weight `[O, D]` in `dtype`; of a packed one only these are dequantised. FP8 blocks are not supported."""
    if isinstance(w, QuantizedTensor):
        return w[rows].dequantize(dtype)
    if w.dtype == jnp.bfloat16 and platform() == "cpu":
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
