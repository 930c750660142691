"""`PackedArray`: a quantised weight in numpy, in one of the layouts into which every file format is repacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FP8_BLOCK = 128  # rows and columns that share a scale


@dataclass(frozen=True)
class PackedArray:
    """A weight `[..., O, D]` of elements `scale * t + offset`, computed in float32; D is the contraction axis.

    Attributes:
        codes: "codes4": uint8 `[..., O, D/2]`, t = table[index], of each 32 elements byte j holds element j in its low
            and element j + 16 in its high nibble; "codes8": int8 `[..., O, D]`, t = code; "fp8": float8_e4m3fn.
        scale: float16 or float32 `[..., O, D/group]`; fp8: float32 `[..., ceil(O/128), ceil(D/128)]`.
        offset: like scale, or None for zero.
    """

    codes: NDArray[Any]
    scale: NDArray[Any]
    offset: NDArray[Any] | None
    layout: str
    group: int
    table: tuple[int, ...] | None = None

    @property
    def form(self) -> tuple[Any, ...]:
        """What two weights must share to lie in one array."""
        return self.layout, self.group, self.table, self.offset is None, self.scale.dtype

    def each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> PackedArray:
        """Codes, scales and offsets changed alike."""
        offset = None if self.offset is None else change(self.offset)
        return replace(self, codes=change(self.codes), scale=change(self.scale), offset=offset)

    def integers(self) -> NDArray[Any]:
        """t of every element, int8 (fp8: as it is)."""
        if self.layout != "codes4":
            return self.codes
        block = self.codes.reshape(*self.codes.shape[:-1], -1, 16)
        indices = np.stack([block & 15, block >> 4], axis=-2).reshape(*self.codes.shape[:-1], -1)
        return np.asarray(self.table, np.int8)[indices]

    def dequantize(self) -> NDArray[np.float32]:
        """The weight, float32."""
        t = self.integers().astype(np.float32)
        if self.layout == "fp8":
            wide = self.scale.repeat(FP8_BLOCK, axis=-2).repeat(FP8_BLOCK, axis=-1)
            return t * wide[..., : t.shape[-2], : t.shape[-1]]
        groups = t.reshape(*t.shape[:-1], -1, self.group)
        groups *= self.scale.astype(np.float32)[..., None]
        if self.offset is not None:
            groups += self.offset.astype(np.float32)[..., None]
        return t


def alike(weights: Sequence[PackedArray]) -> list[PackedArray]:
    """The same weights in one form, exactly: as they are, or all widened to codes8 with the smallest group among them."""
    if len({weight.form for weight in weights}) == 1:
        return list(weights)
    if any(weight.layout == "fp8" for weight in weights):
        raise ValueError("fp8 weights and others cannot lie in one array")
    group, offsets = min(w.group for w in weights), any(w.offset is not None for w in weights)
    dtype = np.result_type(*{w.scale.dtype for w in weights})

    def widened(w: PackedArray) -> PackedArray:
        scale = w.scale.astype(dtype).repeat(w.group // group, axis=-1)
        offset = None if w.offset is None else w.offset.astype(dtype).repeat(w.group // group, axis=-1)
        return PackedArray(w.integers(), scale, np.zeros_like(scale) if offsets and offset is None else offset, "codes8", group)

    return [widened(w) for w in weights]


def concatenated(weights: Sequence[PackedArray], axis: int) -> PackedArray:
    """Weights one after the other along an axis that is not the contraction axis."""
    same = alike(weights)
    offsets = [w.offset for w in same if w.offset is not None]
    return replace(
        same[0],
        codes=np.concatenate([w.codes for w in same], axis),
        scale=np.concatenate([w.scale for w in same], axis),
        offset=np.concatenate(offsets, axis) if offsets else None,
    )
