"""`QuantizedTensor`: a weight that stays packed, and how its codes are packed.

Every layout is exact: `dequantize` gives in float32 the very values that the dequantiser of the file format gives.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Num, UInt8

from kernels_pallas.weights.bitcast import slice_expert
from kernels_pallas.weights.stored import DenseMatrix, StoredWeight

FP8_BLOCK = 128  # rows and columns that share a scale
INDEX_BITS = {"codes4": 4, "codes5": 5, "codes6": 6}  # layouts whose codes are indices into a table -> bits of an index


class QuantizedTensor(StoredWeight):
    """A packed weight `[..., O, F]`. An element is `scale * value + offset`, all in float32.

    Attributes:
        codes: layouts "codes4", "codes5" and "codes6": the low four bits of indices, value = table[index], uint8
            `[..., O, F/2]`. In every block of 32 elements, byte j holds element j in its low nibble and element j + 16
            in its high nibble, as in GGUF. Layout "codes8": int8 `[..., O, F]`, value = code. Layout "fp8":
            float8_e4m3fn `[..., O, F]`, value = the number itself.
        scale: float16, bfloat16 or float32 `[..., O, F/group]`; fp8: float32 `[..., ceil(O/128), ceil(F/128)]`. With a
            `super_scale` it is int8, and the scale of an element is the product of both.
        offset: like `scale`, or None for zero.
        layout: "codes4", "codes5", "codes6", "codes8" or "fp8".
        group: elements along F that share a scale: 16, 32, 64 or 128.
        table: int8 values of the indices: 16 for codes4; 32 for codes5 and 64 for codes6, which must be consecutive.
        high: codes5: uint8, codes6: uint16, `[..., O, F/8]`: the one or two bits above the low four of eight indices,
            in the order of the nibbles of a 32-bit word of codes.
        super_scale, super_offset: float16, each for several groups, or None.
    """

    codes: Array
    scale: Array
    offset: Array | None
    layout: str = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    table: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    high: Array | None = None
    super_scale: Array | None = None
    super_offset: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, size = self.codes.shape
        return (*lead, 2 * size if self.layout in INDEX_BITS else size)

    @property
    def nbytes(self) -> int:
        """The bytes that the weight takes, scales and offsets included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """Return the weight itself for `...`, else a part of it along the leading axes and the rows.

        Raises:
            ValueError: the index is one of rows and the layout is fp8, whose rows share scales.
        """
        if index is Ellipsis:
            return self
        if self.layout == "fp8" and (len(index) if isinstance(index, tuple) else 1) > self.ndim - 2:
            raise ValueError(f"rows of an fp8 weight of shape {list(self.shape)} share scales in blocks of {FP8_BLOCK}")
        return jax.tree.map(lambda array: array[index], self)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
        """Return the weight as a plain array, computed in float32 and rounded once to `dtype`."""
        if self.layout in INDEX_BITS:
            values = jnp.asarray(self.table, jnp.float32)[self._indices()]
        else:
            values = self.codes.astype(jnp.float32)
        values = values * self._per_element(self.scale, self.super_scale)
        if self.offset is not None:
            values = values + self._per_element(self.offset, self.super_offset)
        return values.astype(dtype)

    def dense_matrix(self, dtype: DTypeLike) -> DenseMatrix:
        return DenseMatrix(self.dequantize(dtype), 1)

    def expert_matrix(self, layer: Array, expert: Array, dtype: DTypeLike) -> Float[Array, "O F"]:
        return jax.tree.map(lambda array: slice_expert(array, layer, expert), self).dequantize(dtype)

    def _indices(self) -> UInt8[Array, "*shape"]:
        """Return the index of every element."""
        blocks = self.codes.reshape(*self.codes.shape[:-1], -1, 16)
        low = jnp.stack([blocks & 15, blocks >> 4], axis=-2).reshape(*self.codes.shape[:-1], -1)
        if self.high is None:
            return low
        bits = INDEX_BITS[self.layout] - 4
        high = self.high[..., None] >> jnp.arange(0, 8 * bits, bits, dtype=self.high.dtype) & ((1 << bits) - 1)
        high = high.astype(jnp.uint8).reshape(*self.codes.shape[:-1], -1, 4, 4, 2)  # [..., block, word, byte, nibble]
        return low | jnp.moveaxis(high, -1, -3).reshape(low.shape) << 4

    def _per_element(self, groups: Num[Array, "..."], super_groups: Array | None) -> Float[Array, "*shape"]:
        """Return the scale or the offset of every element."""
        values = groups.astype(jnp.float32)
        if super_groups is not None:
            ratio = groups.shape[-1] // super_groups.shape[-1]
            values = jnp.repeat(super_groups.astype(jnp.float32), ratio, axis=-1) * values
        if self.layout != "fp8":
            return jnp.repeat(values, self.group, axis=-1)
        rows, size = self.shape[-2:]
        values = jnp.repeat(jnp.repeat(values, FP8_BLOCK, axis=-2), FP8_BLOCK, axis=-1)
        return lax.slice_in_dim(lax.slice_in_dim(values, 0, rows, axis=-2), 0, size, axis=-1)
