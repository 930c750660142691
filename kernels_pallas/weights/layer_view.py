"""`LayerView`: a packed weight inside a stack of layers. A slice of the stack that goes to a kernel would be a copy."""

from __future__ import annotations

import jax
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Int

from kernels_pallas.weights.quantized import QuantizedTensor
from kernels_pallas.weights.stored import DenseMatrix, StoredWeight


class LayerView(StoredWeight):
    """The weight `[O, F]` of one layer in a packed stack `[L, O, F]`."""

    stack: QuantizedTensor
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stack.shape[1:])

    def take(self) -> QuantizedTensor:
        """Return the weight of the layer, sliced out of the stack."""
        return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, self.layer, keepdims=False), self.stack)

    def dense_matrix(self, dtype: DTypeLike) -> DenseMatrix:
        return self.take().dense_matrix(dtype)
