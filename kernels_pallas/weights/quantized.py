"""`QuantizedTensor`: a weight that stays packed, and how its codes are packed.

Every layout is exact: `dequantize` gives in float32 the very values that the dequantiser of the file format gives.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

FP8_BLOCK = 128  # rows and columns that share a scale
INDICES = {"codes4": 4, "codes5": 5, "codes6": 6}  # layouts of indices into a table, and their bits


class QuantizedTensor(struct.PyTreeNode):
    """A weight `[..., O, D]`, the contraction axis last. An element is `scale * t + offset`, all in float32.

    Attributes:
        codes: codes4, codes5 and codes6: the low four bits of indices, t = table[index], uint8 `[..., O, D/2]`: in every
            block of 32, byte j holds element j in its low nibble and element j + 16 in its high nibble, as GGUF does;
            codes8: int8 `[..., O, D]`, t = code; fp8: float8_e4m3fn `[..., O, D]`, t = the value.
        scale: float16, bfloat16 or float32 `[..., O, D/group]`; fp8: float32 `[..., ceil(O/128), ceil(D/128)]`; int8 where
            there is a `super_scale`: the scale is then the product of both.
        offset: like scale, or None for zero.
        high: codes5: uint8, codes6: uint16, `[..., O, D/8]`: one or two bits above the low four of eight indices, in the
            order of the nibbles of a 32-bit word of codes.
        super_scale, super_offset: float16, for several groups each, or None.
        group: elements along D that share a scale: 16, 32, 64 or 128.
        table: of indices: int8 values, 16 of codes4; of codes5 and codes6 32 and 64, one after the other.
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
        """Of the weight."""
        *lead, size = self.codes.shape
        return (*lead, 2 * size if self.layout in INDICES else size)

    @property
    def ndim(self) -> int:
        return len(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """True bytes, scales and offsets included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, at: Any) -> QuantizedTensor:
        """Slice along leading axes and rows; `fp8` along leading axes alone, its rows share scales."""
        if at is Ellipsis:
            return self
        if self.layout == "fp8" and (len(at) if isinstance(at, tuple) else 1) > self.ndim - 2:
            raise ValueError(f"rows of an fp8 weight of shape {list(self.shape)} share scales in blocks of {FP8_BLOCK}")
        return jax.tree.map(lambda part: part[at], self)

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """The weight, computed in float32 and rounded once to `dtype`."""
        if self.layout in INDICES:
            values = jnp.asarray(self.table, jnp.float32)[self._indices()]
        else:
            values = self.codes.astype(jnp.float32)
        values = values * self._spread(self.scale, self.super_scale)
        if self.offset is not None:
            values = values + self._spread(self.offset, self.super_offset)
        return values.astype(dtype)

    def _indices(self) -> Array:
        block = self.codes.reshape(*self.codes.shape[:-1], -1, 16)
        low = jnp.stack([block & 15, block >> 4], axis=-2).reshape(*self.codes.shape[:-1], -1)
        if self.high is None:
            return low
        bits = INDICES[self.layout] - 4
        each = self.high[..., None] >> jnp.arange(0, 8 * bits, bits, dtype=self.high.dtype) & ((1 << bits) - 1)
        by_word = each.astype(jnp.uint8).reshape(*self.codes.shape[:-1], -1, 4, 4, 2)  # [..., block, word, byte, half]
        return low | jnp.moveaxis(by_word, -1, -3).reshape(low.shape) << 4

    def _spread(self, part: Array, outer: Array | None) -> Array:
        """A scale or offset for every element."""
        wide = part.astype(jnp.float32)
        if outer is not None:
            wide = jnp.repeat(outer.astype(jnp.float32), part.shape[-1] // outer.shape[-1], axis=-1) * wide
        if self.layout != "fp8":
            return jnp.repeat(wide, self.group, axis=-1)
        rows, size = self.shape[-2:]
        wide = jnp.repeat(jnp.repeat(wide, FP8_BLOCK, axis=-2), FP8_BLOCK, axis=-1)
        return lax.slice_in_dim(lax.slice_in_dim(wide, 0, rows, axis=-2), 0, size, axis=-1)
