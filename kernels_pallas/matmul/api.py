"""`linear`: the one call by which the model multiplies rows with a weight; nothing above it asks how the weight is stored."""

from __future__ import annotations

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
    # float32 rows ask for float32 products: a GPU would otherwise round the operands to TF32.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return dot_last(x, w.astype(x.dtype), precision).astype(out_dtype or x.dtype)
