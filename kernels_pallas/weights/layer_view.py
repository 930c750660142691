"""A packed weight inside a stack of layers that is never sliced: a slice handed to a kernel would be a copy."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct
from jax import Array, lax

from kernels_pallas.weights.quantized import QuantizedTensor


class LayerView(struct.PyTreeNode):
    """Weight `[O, D]` number `layer` of a stack `[L, O, D]`."""

    stack: QuantizedTensor
    layer: Array  # int32 scalar

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stack.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, at: Any) -> LayerView:
        if at is not Ellipsis:
            raise TypeError("a layer of a stack is read whole; take() makes a slice of its own")
        return self

    def take(self) -> QuantizedTensor:
        """The one weight, sliced out of the stack."""
        return jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, self.layer, keepdims=False), self.stack)
