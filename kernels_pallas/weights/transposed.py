"""Small weights in the order in which a CPU multiplies a few rows with them fastest: inputs first, `[..., F, O]`.

XLA's CPU backend reads such a weight once for all rows. It reorders a weight `[O, F]`, as it is published, first, which
takes several times as long as the product.

A row's product has the same bits whatever the other rows are, for numbers of rows that a test checks on several
instruction sets (`kernels_pallas.matmul.reference.dot_in_fixed_order` says how):

* bfloat16: any number of rows, one included.
* float32, at most 64 outputs: any number from 2 on.
* float32, more outputs: from 2 to 32. From the 34th, 41st, 52nd or 61st row on (it depends on the processor and on the
  shape of the weight) the product may be cut in other places, or may add up every second input apart.

In float32 this holds for up to 128 inputs, for a multiple of 128, and for at most 64 outputs for up to 512 inputs. A
single float32 row has bits of its own. The bits differ between processors, with fused multiply-add and without.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from kernels_pallas.weights.bitcast import bitcast, slice_expert, to_movable
from kernels_pallas.weights.stored import DenseMatrix, StoredWeight

# Outputs in the widest vector (AVX-512, float32), and outputs from which on a product is summed in the order of its
# inputs.
VECTOR_OUTPUTS, FIXED_ORDER_OUTPUTS = 16, 64


def padded_outputs(outputs: int) -> int:
    """Return the number of columns, zeros behind `outputs`, with which a product is always summed in one order."""
    return max(FIXED_ORDER_OUTPUTS, -(-outputs // VECTOR_OUTPUTS) * VECTOR_OUTPUTS)


class TransposedWeight(StoredWeight):
    """A weight or a stack of weights `[..., O, F]`, held as `[..., F, O]`.

    Attributes:
        array: the weight, its last two axes exchanged.
        output_sizes: the outputs O of each of the weights that lie side by side in the array and read the same rows.
            One product reads all of them; see `kernels_pallas.matmul.fused_linears`. The columns behind them are zeros,
            up to `padded_outputs`. Empty for a single weight without such columns.
    """

    array: Float[Array, "*stack F O"]
    output_sizes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, inputs, outputs = self.array.shape
        return (*lead, sum(self.output_sizes) or outputs, inputs)

    def __getitem__(self, index: Any) -> TransposedWeight:
        """Return the weight itself for `...`, else some of the weights of a stack."""
        return self if index is Ellipsis else self.replace(array=self.array[index])

    def dense_matrix(self, dtype: DTypeLike) -> DenseMatrix:
        return DenseMatrix(self.array.astype(dtype), 0)

    def expert_matrix(self, layer: Array, expert: Array, dtype: DTypeLike) -> TransposedWeight:
        return TransposedWeight(_slice_by_bits(self.array, layer, expert))


class FusedPlaceholder(StoredWeight):
    """Stands in the place of a weight that lies in the `TransposedWeight` of another one."""

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


class FusedExperts(StoredWeight):
    """A stack of experts `[L, E, O, F]`, held as `[L, F, E, O]`: those of a layer are one weight of E * O outputs."""

    array: Float[Array, "L F E O"]

    @property
    def shape(self) -> tuple[int, ...]:
        layers, inputs, experts, outputs = self.array.shape
        return layers, experts, outputs, inputs

    def expert_matrix(self, layer: Array, expert: Array, dtype: DTypeLike) -> TransposedWeight:
        by_expert = jnp.swapaxes(to_movable(self.array), 1, 2)
        return TransposedWeight(bitcast(slice_expert(by_expert, layer, expert), self.array.dtype))


def _slice_by_bits(stack: Float[Array, "L E F O"], layer: Array, expert: Array) -> Float[Array, "F O"]:
    return bitcast(slice_expert(to_movable(stack), layer, expert), stack.dtype)
