"""Plain `lax` products: the oracle of every matmul kernel and the CPU path."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


def dot_last(
    x: Float[Array, "*rows D"], w: Float[Array, "O D"], precision: lax.Precision | None = None
) -> Float[Array, "*rows O"]:
    """Contract the last axis of both operands; float32 result."""
    contract = (((x.ndim - 1,), (w.ndim - 1,)), ((), ()))
    return lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)


def dot_first(
    x: Float[Array, "*rows D"], w: Float[Array, "D O"], precision: lax.Precision | None = None
) -> Float[Array, "*rows O"]:
    """Contract the last axis of the rows with the first of the weight; float32 result."""
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, w, contract, precision=precision, preferred_element_type=jnp.float32)
