"""Stored weights: the forms of a matrix in memory, and the one protocol by which the ops read them.

A weight is a plain array `[..., O, F]` (outputs, inputs, as published) or a `StoredWeight`:

    QuantizedTensor    packed codes of 4 to 8 bits with scales; stays packed
    LayerView          one layer of a packed stack that is not sliced
    TransposedWeight   `[..., F, O]`: small weights on a CPU, also several side by side
    FusedPlaceholder   where such a neighbour stood
    FusedExperts       all experts of a layer as one weight: small experts on a CPU
    BitcastBfloat16    bfloat16 experts as uint16, because a CPU slices those without a conversion

A `StoredWeight` offers `shape` and `ndim` of the weight `[..., O, F]`, `weight[...]` (the weight itself; nnx reads the
values of its variables that way), `dense_matrix(dtype)` (the matrix as a plain array) and `expert_matrix(layer, expert,
dtype)` (one matrix of a stack of experts). `dense_matrix` and `expert_matrix` of this module take a plain array, too.
Kernels read packed weights in their packed form, by way of `kernels_pallas.packed`.
"""

from __future__ import annotations

from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.weights.bitcast import BitcastBfloat16, slice_expert
from kernels_pallas.weights.layer_view import LayerView
from kernels_pallas.weights.quantized import QuantizedTensor
from kernels_pallas.weights.stored import DenseMatrix, StoredWeight, Weight
from kernels_pallas.weights.transposed import FusedExperts, FusedPlaceholder, TransposedWeight

__all__ = [
    "BitcastBfloat16",
    "DenseMatrix",
    "FusedExperts",
    "FusedPlaceholder",
    "LayerView",
    "QuantizedTensor",
    "StoredWeight",
    "TransposedWeight",
    "Weight",
    "dense_matrix",
    "expert_matrix",
]


def dense_matrix(w: Weight, dtype: DTypeLike) -> DenseMatrix:
    """Return a weight `[O, F]` as a plain array of `dtype`; a packed one is computed in float32 and rounded once."""
    return w.dense_matrix(dtype) if isinstance(w, StoredWeight) else DenseMatrix(w.astype(dtype), 1)


def expert_matrix(stack: Weight, layer: Array, expert: Array, dtype: DTypeLike) -> Weight:
    """Return the matrix of one expert out of a stack `[L, E, O, F]`; a packed one is dequantised to `dtype`.

    `layer` and `expert` are int32 scalars. No other part of the stack is copied.
    """
    if isinstance(stack, StoredWeight):
        return stack.expert_matrix(layer, expert, dtype)
    return slice_expert(stack, layer, expert)
