"""Variable types of the model's weights and the factory of (abstract) parameters.

The layer axis: every weight inside the trunk's layers has a leading axis of size 1. Kernels take whole stacks
`[layer, ...]` with the index of a layer, because a slice that goes to a kernel is a copy. Each super-block holds
stacks of its own, so that no weight is ever sliced and each may be stored in its own form; `ONLY_LAYER` is the index
into them.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

ONLY_LAYER = 0


class Dense(nnx.Param):
    """A matrix of which every row of a step reads all."""


class Vector(nnx.Param):
    """A small weight that is never quantized nor transposed: norm weights, convolution taps, decay rates."""


class Expert(nnx.Param):
    """A stack `[layer, expert, ...]` of routed experts. It is always passed on whole, with the index of the layer."""


class TokenIds(nnx.Variable):
    """Ids of the tokens that the rows of a matrix belong to, int32, ascending."""


@dataclass(frozen=True)
class ParamFactory:
    """Makes parameters that have a shape and a dtype and no value: nothing is allocated or traced.

    Attributes:
        dtype: dtype of matrices and experts.
        layer_axis: add the layer axis (see above) to every weight. Experts have one in any case.
    """

    dtype: DTypeLike
    layer_axis: bool = False

    def _leading_axes(self) -> tuple[int, ...]:
        return (1,) if self.layer_axis else ()

    def matrix(self, out_features: int, in_features: int) -> Dense:
        """Return a linear weight `[out, in]`, the layout of published checkpoints."""
        return Dense(jax.ShapeDtypeStruct((*self._leading_axes(), out_features, in_features), self.dtype))

    def vector(self, *shape: int) -> Vector:
        """Return a small weight, which is always float32."""
        return Vector(jax.ShapeDtypeStruct((*self._leading_axes(), *shape), jnp.float32))

    def experts(self, num_experts: int, out_features: int, in_features: int) -> Expert:
        """Return the matrices `[layer, expert, out, in]` of all experts of a layer."""
        return Expert(jax.ShapeDtypeStruct((1, num_experts, out_features, in_features), self.dtype))
