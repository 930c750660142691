"""Helpers for tiles inside Pallas kernels: index grids, sizes, and the product that every kernel uses."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


def index_grid(
    rows: Int[Array, " rows"], cols: Int[Array, " cols"]
) -> tuple[Int[Array, "rows cols"], Int[Array, "rows cols"]]:
    """Return the row index and the column index of every element of a tile."""
    shape = (rows.size, cols.size)
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(cols[None, :], shape)


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`: Triton's arrays have such sizes."""
    return 1 << (size - 1).bit_length()


def dot(w: Float[Array, "O F"], x: Float[Array, "rows F"]) -> Float[Array, "O rows"]:
    """Return `w @ x.T` in float32. The weight is the left operand: one instruction serves any number of token rows."""
    precision = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return lax.dot_general(w, x, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
