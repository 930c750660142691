"""Gradients of the room `matmul` that JAX does not derive by itself; only training uses them."""

from __future__ import annotations

import jax
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.weights.bitcast import bitcast, to_movable


@jax.custom_vjp
def take_rows_as_bits(w: Float[Array, "O F"], rows: Int[Array, "*rows"]) -> Float[Array, "*rows F"]:
    """Return `w[rows]`, read as integers of the same bits; the gradient is that of `w[rows]`."""
    return bitcast(to_movable(w)[rows], w.dtype)


_Saved = tuple[Array, Array]


def _forward(w: Array, rows: Array) -> tuple[Array, _Saved]:
    return take_rows_as_bits(w, rows), (w, rows)


def _backward(saved: _Saved, grad: Array) -> tuple[Array, None]:
    w, rows = saved
    [d_w] = jax.vjp(lambda w: w[rows], w)[1](grad)
    return d_w, None


take_rows_as_bits.defvjp(_forward, _backward)
