"""Variable types of the model's weights and the maker of (abstract) parameters."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx


class Dense(nnx.Param):
    """A weight that is read whole by every row; sliced by layer when layers are scanned."""


class Vector(nnx.Param):
    """Norm weights, taps, decay rates: small, never packed nor turned."""


class Expert(nnx.Param):
    """A stack `[layer, expert, ...]` of routed experts; always handed on whole, never sliced by layer."""


@dataclass(frozen=True)
class ParamFactory:
    """Makes zero parameters of a given shape. Modules are built under `nnx.eval_shape`, so nothing is allocated.

    `stack` is the leading layer axis of every weight; None for weights outside the layers.
    """

    dtype: jnp.dtype
    stack: int | None = None

    def _lead(self) -> tuple[int, ...]:
        return () if self.stack is None else (self.stack,)

    def matrix(self, rows: int, columns: int) -> Dense:
        """A linear weight, `[out, in]` as published."""
        return Dense(jnp.zeros((*self._lead(), rows, columns), self.dtype))

    def vector(self, *shape: int) -> Vector:
        """Norm weights and the like: small, always float32."""
        return Vector(jnp.zeros((*self._lead(), *shape), jnp.float32))

    def experts(self, experts: int, rows: int, columns: int) -> Expert:
        return Expert(jnp.zeros((self.stack or 1, experts, rows, columns), self.dtype))
