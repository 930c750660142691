"""`QuantizedTensor`: a weight that stays packed, and how its codes are packed.

Every layout is exact: `dequantize` gives in float32 the very values that the dequantiser of the file format gives.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

LAYOUTS = ("codes4", "codes8", "fp8")
FP8_BLOCK = 128  # rows and columns that share a scale


class QuantizedTensor(struct.PyTreeNode):
    """A weight `[..., O, D]`, the contraction axis last. An element is `scale * t + offset`, all in float32.

    Attributes:
        codes: codes4: uint8 `[..., O, D/2]` (`pack4`), t = table[index]; codes8: int8 `[..., O, D]`, t = code; fp8:
            float8_e4m3fn `[..., O, D]`, t = the value.
        scale: float16, bfloat16 or float32 `[..., O, D/group]`; fp8: float32 `[..., ceil(O/128), ceil(D/128)]`.
        offset: like scale, or None for zero.
        group: elements along D that share a scale: 16, 32, 64 or 128.
        table: codes4: its 16 int8 values.
    """

    codes: Array
    scale: Array
    offset: Array | None
    layout: str = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    table: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        *lead, size = self.codes.shape
        return (*lead, 2 * size if self.layout == "codes4" else size)

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
        if self.layout == "codes4":
            values = jnp.asarray(self.table, jnp.float32)[unpack4(self.codes)]
        else:
            values = self.codes.astype(jnp.float32)
        values = values * self._spread(self.scale)
        if self.offset is not None:
            values = values + self._spread(self.offset)
        return values.astype(dtype)

    def _spread(self, part: Array) -> Array:
        """A scale or offset for every element."""
        wide = part.astype(jnp.float32)
        if self.layout != "fp8":
            return jnp.repeat(wide, self.group, axis=-1)
        rows, size = self.shape[-2:]
        wide = jnp.repeat(jnp.repeat(wide, FP8_BLOCK, axis=-2), FP8_BLOCK, axis=-1)
        return lax.slice_in_dim(lax.slice_in_dim(wide, 0, rows, axis=-2), 0, size, axis=-1)


def pack4(indices: np.ndarray) -> np.ndarray:
    """uint8 indices 0...15 `[..., D]` -> `[..., D/2]`: in every block of 32, byte j holds element j in its low nibble and
    element j + 16 in its high nibble, as GGUF does."""
    halves = indices.reshape(*indices.shape[:-1], -1, 2, 16)
    return (halves[..., 0, :] | halves[..., 1, :] << 4).astype(np.uint8).reshape(*indices.shape[:-1], -1)


def unpack4(codes: Any) -> Any:
    """The inverse of `pack4`, for numpy and jax arrays."""
    xp = np if isinstance(codes, np.ndarray) else jnp
    block = codes.reshape(*codes.shape[:-1], -1, 16)
    return xp.stack([block & 15, block >> 4], axis=-2).reshape(*codes.shape[:-1], -1)
