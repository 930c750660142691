"""Variable types of the model's weights and the maker of (abstract) parameters.

The layer axis: every weight inside the trunk's layers has a leading axis of size 1. Kernels take whole stacks
`[layer, ...]` with the index of a layer, because a slice that goes to a kernel is a copy. Each super-block holds stacks of
its own, so that no weight is ever sliced and each may be stored in its own form; `ONLY_LAYER` is the index into them.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

ONLY_LAYER = 0


class Dense(nnx.Param):
    """A weight that is read whole by every row."""


class Vector(nnx.Param):
    """Norm weights, taps, decay rates: small, never packed nor turned."""


class Expert(nnx.Param):
    """A stack `[layer, expert, ...]` of routed experts; always handed on whole, with the index of the layer."""


@dataclass(frozen=True)
class ParamFactory:
    """Makes zero parameters of a given shape. Modules are built under `nnx.eval_shape`, so nothing is allocated.

    `layer_axis` adds the layer axis (see above) to every weight; experts have one in any case.
    """

    dtype: jnp.dtype
    layer_axis: bool = False

    def _lead(self) -> tuple[int, ...]:
        return (1,) if self.layer_axis else ()

    def matrix(self, rows: int, columns: int) -> Dense:
        """A linear weight, `[out, in]` as published."""
        return Dense(jnp.zeros((*self._lead(), rows, columns), self.dtype))

    def vector(self, *shape: int) -> Vector:
        """Norm weights and the like: small, always float32."""
        return Vector(jnp.zeros((*self._lead(), *shape), jnp.float32))

    def experts(self, experts: int, rows: int, columns: int) -> Expert:
        return Expert(jnp.zeros((1, experts, rows, columns), self.dtype))
