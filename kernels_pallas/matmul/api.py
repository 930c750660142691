"""`linear`: the one call by which the model multiplies rows with a weight; nothing above it asks how the weight is stored."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.matmul.reference import dot_last


def linear(x: Float[Array, "*rows D"], w: Float[Array, "O D"], *, out_dtype: jnp.dtype | None = None) -> Array:
    """`x @ w.T`, accumulated in float32.

    Args:
        x: rows, in the compute dtype.
        w: weight as published, `[out, in]`, in any float dtype; read in the dtype of `x`.
        out_dtype: dtype of the result; that of `x` unless told.

    Returns:
        `[*rows, O]`.
    """
    w = w.astype(x.dtype)
    if x.dtype == jnp.bfloat16 and math.prod(x.shape[:-1]) == 1 and jax.default_backend() == "cpu":
        # For a single bfloat16 row XLA's CPU backend first converts the whole weight to float32, twenty times the cost
        # of the product; for two rows it multiplies bfloat16 as it is.
        two = jnp.concatenate([x.reshape(1, -1), jnp.zeros((1, x.shape[-1]), x.dtype)])
        y = dot_last(two, w)[:1].reshape(*x.shape[:-1], w.shape[0])
    else:
        # float32 rows ask for float32 products: a GPU would otherwise round the operands to TF32.
        y = dot_last(x, w, lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
    return y.astype(out_dtype or x.dtype)
