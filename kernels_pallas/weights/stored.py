"""`StoredWeight`: what every weight that is not one plain array offers to the ops."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import struct
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float


class DenseMatrix(NamedTuple):
    """One matrix `[O, F]` as a plain array, for `lax.dot_general`."""

    array: Float[Array, "rows cols"]
    input_axis: int  # 1: the array is `[O, F]`; 0: it is `[F, O]`


class StoredWeight(struct.PyTreeNode):
    """A matrix, or a stack of matrices, `[..., O, F]` (outputs, inputs) that is stored in a form of its own.

    A subclass defines `shape` and those of the other methods that its form allows; the rest raise TypeError.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[..., O, F]` of the weight, which may differ from the shapes of the arrays that hold it."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> StoredWeight:
        """Return the weight itself for `...`.

        nnx reads the value of a variable by `variable[...]`, and flax passes that index on to the value. Subclasses
        whose form allows it take other indices, too.
        """
        if index is not Ellipsis:
            raise TypeError(
                f"{type(self).__name__} of shape {list(self.shape)} is read whole, by [...], not by [{index}]"
            )
        return self

    def dense_matrix(self, dtype: DTypeLike) -> DenseMatrix:
        """Return the matrix as a plain array of `dtype`. The weight must have two axes."""
        raise TypeError(f"{type(self).__name__} of shape {list(self.shape)} is not a single matrix")

    def expert_matrix(self, layer: Array, expert: Array, dtype: DTypeLike) -> Weight:
        """Return the matrix of one expert out of a stack `[L, E, O, F]`; a packed one is dequantised to `dtype`.

        `layer` and `expert` are int32 scalars. Only the part of the stack that belongs to the expert is read.
        """
        raise TypeError(f"{type(self).__name__} of shape {list(self.shape)} is not a stack of experts")


Weight = Array | StoredWeight
