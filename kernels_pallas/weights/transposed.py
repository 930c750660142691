"""Weights that lie `[in, out]` instead of `[out, in]` as published: as a CPU multiplies a few rows with them fastest.

XLA's CPU backend reads such a weight once for all rows and sums over `in` in order, so that a row of two or more has the same
bits whatever the others are. A weight `[out, in]` it first reorders, at several times the cost of the product.
"""

from __future__ import annotations

from typing import Any

from flax import struct
from jax import Array


class TransposedWeight(struct.PyTreeNode):
    """Weight or stack of weights `[..., O, D]`, held as `[..., D, O]`.

    `parts`: outputs of each of the weights that lie side by side in it, read by one product; see `fused_linears`.
    """

    array: Array
    parts: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, inputs, outputs = self.array.shape
        return (*lead, outputs, inputs)

    @property
    def ndim(self) -> int:
        return self.array.ndim

    def __getitem__(self, at: Any) -> TransposedWeight:
        """All of it, or one or some of the stack."""
        return self if at is Ellipsis else self.replace(array=self.array[at])


class FusedPlaceholder(struct.PyTreeNode):
    """Stands where a weight was that now lies in the `TransposedWeight` of another one."""

    def __getitem__(self, at: Any) -> FusedPlaceholder:
        return self


class FusedExperts(struct.PyTreeNode):
    """Stack of experts `[P, E, O, D]`, held as `[P, D, E, O]`: the experts of a layer are one weight of E * O outputs."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        stack, inputs, experts, outputs = self.array.shape
        return stack, experts, outputs, inputs

    @property
    def ndim(self) -> int:
        return 4

    def __getitem__(self, at: Any) -> FusedExperts:
        if at is not Ellipsis:
            raise TypeError("a stack of experts is handed on whole")
        return self
