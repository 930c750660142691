"""`PackedArray`: a quantised weight in numpy, in one of the two layouts into which every file format is repacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedArray:
    """A weight `[..., O, D]` of elements `scale * t + offset`, computed in float32; D is the contraction axis.

    Attributes:
        codes: "codes4": uint8 `[..., O, D/2]`, t = table[index], of each 32 elements byte j holds element j in its low
            and element j + 16 in its high nibble; "codes8": int8 `[..., O, D]`, t = code.
        scale: float16 or float32 `[..., O, D/group]`.
        offset: like scale, or None for zero.
    """

    codes: NDArray[Any]
    scale: NDArray[Any]
    offset: NDArray[Any] | None
    layout: str
    group: int
    table: tuple[int, ...] | None = None

    def dequantize(self) -> NDArray[np.float32]:
        """The weight, float32."""
        if self.layout == "codes4":
            block = self.codes.reshape(*self.codes.shape[:-1], -1, 16)
            indices = np.stack([block & 15, block >> 4], axis=-2).reshape(*self.codes.shape[:-1], -1)
            t = np.asarray(self.table, np.float32)[indices]
        else:
            t = self.codes.astype(np.float32)
        groups = t.reshape(*t.shape[:-1], -1, self.group)
        groups *= self.scale.astype(np.float32)[..., None]
        if self.offset is not None:
            groups += self.offset.astype(np.float32)[..., None]
        return t
