"""bfloat16 as the integers of the same bits, which XLA's CPU backend moves as they are.

That backend slices or gathers a bfloat16 array by converting all of it to float32 first: all experts of a layer for one
of them, or a whole embedding for one row. It does nothing of the kind to integers.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import BFloat16, Num, Shaped, UInt16

from kernels_pallas.weights.stored import DenseMatrix, StoredWeight


def bitcast(x: Shaped[Array, "*shape"], dtype: DTypeLike) -> Shaped[Array, "*shape"]:
    """Return the same bits as an array of `dtype`, which must have the width of `x.dtype`."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def to_movable(x: Num[Array, "*shape"]) -> Num[Array, "*shape"]:
    """Return bfloat16 as the uint16 of the same bits, and any other array as it is."""
    return bitcast(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def slice_expert(stack: Num[Array, "L E rows cols"], layer: Array, expert: Array) -> Num[Array, "rows cols"]:
    """Return `stack[layer, expert]` without a copy of any other part of the stack."""
    return lax.dynamic_slice(stack, (layer, expert, 0, 0), (1, 1, *stack.shape[2:])).reshape(stack.shape[2:])


class BitcastBfloat16(StoredWeight):
    """A bfloat16 weight `[..., O, F]`, held as uint16 of the same bits."""

    bits: UInt16[Array, "*shape"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)

    def to_bfloat16(self) -> BFloat16[Array, "*shape"]:
        """Return the weight as the bfloat16 array that it is."""
        return bitcast(self.bits, jnp.bfloat16)

    def dense_matrix(self, dtype: DTypeLike) -> DenseMatrix:
        return DenseMatrix(self.to_bfloat16().astype(dtype), 1)

    def expert_matrix(self, layer: Array, expert: Array, dtype: DTypeLike) -> BFloat16[Array, "O F"]:
        return bitcast(slice_expert(self.bits, layer, expert), jnp.bfloat16)
