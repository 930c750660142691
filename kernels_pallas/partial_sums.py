"""`PartialSums`: the result of a matrix product whose sum was split (split-K), before the partial sums are added.

A kernel with few rows splits the sum over the contraction axis among programs. Whoever reads the result adds the
partial sums, always in the same order, so a row's result does not depend on the other rows of the call (batch
invariance). The reader is often another kernel, which saves a launch.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Bool, Float


class PartialSums(struct.PyTreeNode):
    """P partial sums of the product of token rows with a weight: float32, or, if P = 1, in the dtype of the result."""

    __no_type_check__ = True  # JAX also builds pytrees of shapes and of placeholders, which jaxtyping would refuse
    parts: Float[Array, "P rows O"]

    def sum(self, dtype: DTypeLike) -> Float[Array, "rows O"]:
        """Add the partial sums in their order and round the total to `dtype`."""
        total = self.parts[0]
        for part in range(1, self.parts.shape[0]):
            total = total + self.parts[part]
        return total.astype(dtype)


def load_partial_sum(ref: Any, *index: Any, mask: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
    """Inside a kernel: load the elements `index` of all partial sums of `ref` `[P, ...]` and add them in their order.

    Elements outside `mask` are 0.
    """

    def load(part: int) -> Array:
        # Pallas takes no Python integer beside arrays of indices.
        return plt.load(ref.at[(jnp.int32(part), *index)], mask=mask, other=None if mask is None else 0)

    total = load(0)
    for part in range(1, ref.shape[0]):
        total = total + load(part)
    return total
