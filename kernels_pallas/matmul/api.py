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
from kernels_pallas.quantized import QuantizedTensor
from kernels_pallas.stacked import StackedTensor
from kernels_pallas.target import target
from kernels_pallas.turned import TurnedTensor

Packed = QuantizedTensor | StackedTensor

# Platform -> kernel for packed weights, (rows [M, D], [(weight, layer | None)], out_dtypes) -> parts [[S, M, O]].
KERNELS: dict[str, Callable[..., list[Array]]] = {"cuda": triton.matmul_parts}  # elsewhere: `lax`


def linear(
    x: Float[Array, "*rows D"],
    w: Array | QuantizedTensor | StackedTensor | TurnedTensor,
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
        return _packed(x, [w], [out_dtype or x.dtype])[0]
    # float32 rows ask for float32 products: a GPU would otherwise round the operands to TF32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    rows = math.prod(x.shape[:-1])
    alone = x.dtype == jnp.bfloat16 and rows == 1 and target() == "cpu"
    if alone:
        # For a single bfloat16 row XLA's CPU backend first converts the whole weight to float32, twenty times the cost
        # of the product; for two rows it multiplies bfloat16 as it is.
        given, x = x, jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])
    if isinstance(w, TurnedTensor):
        y = dot_first(x, w.array.astype(x.dtype), precision)
    else:
        y = dot_last(x, w.astype(x.dtype), precision)
    if alone:
        y = y[:1].reshape(*given.shape[:-1], y.shape[-1])
    return y.astype(out_dtype or x.dtype)


def linears(
    x: Float[Array, "*rows D"],
    *weights: Any,
    out_dtypes: Sequence[jnp.dtype | None] | None = None,
) -> list[Array]:
    """`linear` of the same rows with each weight, into its own dtype: one product of those that lie side by side in the
    first, one launch where any is packed."""
    dtypes = [dtype or x.dtype for dtype in out_dtypes or [None] * len(weights)]
    first = weights[0]
    if isinstance(first, TurnedTensor) and first.parts:
        each = jnp.split(linear(x, first, out_dtype=jnp.float32), np.cumsum(first.parts)[:-1].tolist(), axis=-1)
        beside = [y.astype(dtype) for y, dtype in zip(each, dtypes, strict=False)]
        others = weights[len(each) :]
        return beside + (linears(x, *others, out_dtypes=dtypes[len(each) :]) if others else [])
    if any(isinstance(w, Packed) for w in weights) and KERNELS.get(target()):
        return _packed(x, weights, dtypes)
    return [linear(x, w, out_dtype=dtype) for w, dtype in zip(weights, dtypes, strict=True)]


def _packed(x: Array, weights: Sequence[Array | Packed], out_dtypes: Sequence[Any]) -> list[Array]:
    kernel = KERNELS.get(target())
    if kernel is None:
        whole = [w.take() if isinstance(w, StackedTensor) else w for w in weights]
        values = [w.dequantize(x.dtype) if isinstance(w, QuantizedTensor) else w for w in whole]
        return [linear(x, w, out_dtype=dtype) for w, dtype in zip(values, out_dtypes, strict=True)]
    parts = kernel(x.reshape(-1, x.shape[-1]), _operands(weights), out_dtypes)
    results = (triton.added(each, dtype) for each, dtype in zip(parts, out_dtypes, strict=True))
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in results]


def _operands(weights: Sequence[Array | Packed]) -> list[tuple[Array | QuantizedTensor, Array | None]]:
    return [(w.stack, w.layer) if isinstance(w, StackedTensor) else (w, None) for w in weights]


def with_first_in_parts(x: Float[Array, "*rows D"], *weights: Any) -> tuple[Float[Array, "S M O"], list[Array]]:
    """`linears` into float32, but for the first of the results, which comes as parts to be added in their order by the
    kernel that reads it. Only where `KERNELS` has one for the target."""
    parts, *others = KERNELS[target()](x.reshape(-1, x.shape[-1]), _operands(weights), [jnp.float32] * len(weights))
    return parts, [triton.added(each, jnp.float32).reshape(*x.shape[:-1], each.shape[-1]) for each in others]


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
