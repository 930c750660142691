"""`PackedArray`: a quantised weight in numpy, in one of the layouts into which every file format is repacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FP8_BLOCK = 128  # rows and columns that share a scale
INDICES = {"codes4": 4, "codes5": 5, "codes6": 6}  # layouts of indices into a table, and their bits
ARRAYS = ("codes", "high", "scale", "offset", "super_scale", "super_offset")


@dataclass(frozen=True)
class PackedArray:
    """A weight `[..., O, D]` of elements `scale * t + offset`, computed in float32; D is the contraction axis.

    Attributes:
        codes: "codes4", "codes5", "codes6": the low four bits of indices, t = table[index], uint8 `[..., O, D/2]` as
            `pack4` lays them out; "codes8": int8 `[..., O, D]`, t = code; "fp8": float8_e4m3fn.
        scale: float16 or float32 `[..., O, D/group]`; fp8: float32 `[..., ceil(O/128), ceil(D/128)]`. With `super_scale`
            int8, and the scale is the product of both, exact in float32.
        offset: like scale, with `super_offset`; or None for zero.
        table: of indices, a value for each; of codes5 and codes6 whole numbers one after the other.
        high: the bits above the low four as `pack_high` lays them out: codes5 uint8, codes6 uint16, `[..., O, D/8]`.
        super_scale, super_offset: float16 `[..., O, D/super group]`, of several groups each.
    """

    codes: NDArray[Any]
    scale: NDArray[Any]
    offset: NDArray[Any] | None
    layout: str
    group: int
    table: tuple[int, ...] | None = None
    high: NDArray[Any] | None = None
    super_scale: NDArray[Any] | None = None
    super_offset: NDArray[Any] | None = None

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Those that there are, by the name of their field."""
        return {name: array for name in ARRAYS if (array := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def size(self) -> int:
        """D."""
        return self.codes.shape[-1] * (2 if self.layout in INDICES else 1)

    @property
    def form(self) -> tuple[Any, ...]:
        """What two weights must share to lie in one array."""
        kinds = tuple((name, array.dtype, self.size / array.shape[-1]) for name, array in self.arrays.items())
        return self.layout, self.group, self.table, kinds

    def each(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> PackedArray:
        """All arrays changed alike."""
        changed: dict[str, Any] = {name: change(array) for name, array in self.arrays.items()}
        return replace(self, **changed)

    def scales(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Scale and offset of every group, each one number."""
        if self.super_scale is None:
            return self.scale, self.offset
        return _product(self.super_scale, self.scale), _product(self.super_offset, self.offset)

    def finer(self, columns: int) -> PackedArray:
        """The same with no number of a super group shared by more than `columns` columns, so that these can be moved."""
        if self.super_scale is None or (times := self.size // self.super_scale.shape[-1] // columns) <= 1:
            return self
        wide: dict[str, Any] = {
            name: a.repeat(times, axis=-1) for name, a in self.arrays.items() if name.startswith("super")
        }
        return replace(self, **wide)

    def integers(self) -> NDArray[Any]:
        """t of every element, int8 (fp8: as it is)."""
        if self.layout not in INDICES:
            return self.codes
        block = self.codes.reshape(*self.codes.shape[:-1], -1, 16)
        indices = np.stack([block & 15, block >> 4], axis=-2).reshape(*self.codes.shape[:-1], -1)
        if self.high is not None:
            indices = indices | unpack_high(self.high, INDICES[self.layout] - 4) << 4
        return np.asarray(self.table, np.int8)[indices]

    def dequantize(self) -> NDArray[np.float32]:
        """The weight, float32."""
        t = self.integers().astype(np.float32)
        if self.layout == "fp8":
            wide = self.scale.repeat(FP8_BLOCK, axis=-2).repeat(FP8_BLOCK, axis=-1)
            return t * wide[..., : t.shape[-2], : t.shape[-1]]
        scale, offset = self.scales()
        groups = t.reshape(*t.shape[:-1], -1, self.group)
        groups *= scale.astype(np.float32)[..., None]
        if offset is not None:
            groups += offset.astype(np.float32)[..., None]
        return t


def _product(outer: NDArray[Any] | None, inner: NDArray[Any] | None) -> Any:
    if outer is None or inner is None:
        return None
    return outer.astype(np.float32).repeat(inner.shape[-1] // outer.shape[-1], axis=-1) * inner.astype(np.float32)


def pack4(indices: NDArray[Any]) -> NDArray[np.uint8]:
    """The low four bits of indices `[..., D]` -> `[..., D/2]`: of each 32 elements byte j holds element j in its low and
    element j + 16 in its high nibble."""
    halves = indices.reshape(*indices.shape[:-1], -1, 2, 16).astype(np.uint8, copy=False)
    packed: NDArray[np.uint8] = halves[..., 0, :] & np.uint8(15) | halves[..., 1, :] << np.uint8(4)
    return packed.reshape(*indices.shape[:-1], -1)


def pack_high(indices: NDArray[Any], bits: int) -> NDArray[Any]:
    """Bits 4 and up of indices `[..., D]`: one or two each, eight elements to a uint8 or uint16, `[..., D/8]`.

    Number j of a block of 32 holds those of the four bytes from 4 j on of `pack4`, nibble by nibble, the lowest first.
    """
    top = indices.reshape(*indices.shape[:-1], -1, 2, 16).astype(np.uint8, copy=False) >> np.uint8(4)
    words = (top[..., 0, :] | top[..., 1, :] << np.uint8(bits)).view("<u4")  # byte c: the bits of byte c of `pack4`
    mask = (1 << 2 * bits) - 1
    out = words & np.uint32(mask)
    for c in range(1, 4):
        out |= words >> np.uint32(c * (8 - 2 * bits)) & np.uint32(mask << 2 * bits * c)
    return out.astype(np.uint8 if bits == 1 else np.uint16).reshape(*indices.shape[:-1], -1)


def unpack_high(high: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack_high`, `[..., D]` of 0 to 1 or 3."""
    nibbles = (high[..., None] >> (bits * np.arange(8)).astype(high.dtype)) & high.dtype.type((1 << bits) - 1)
    parts = nibbles.astype(np.uint8).reshape(*high.shape[:-1], -1, 4, 4, 2)  # [..., block, j, byte, half]
    return np.moveaxis(parts, -1, -3).reshape(*high.shape[:-1], -1)


def indexed(indices: NDArray[Any], layout: str, first: int, **others: Any) -> PackedArray:
    """Indices `[..., D]` of codes4, codes5 or codes6 that count from `first`."""
    bits = INDICES[layout]
    return PackedArray(
        codes=pack4(indices),
        high=pack_high(indices, bits - 4) if bits > 4 else None,
        layout=layout,
        table=tuple(range(first, first + (1 << bits))),
        **others,
    )


def alike(weights: Sequence[PackedArray]) -> list[PackedArray]:
    """The same weights in one form, exactly: as they are, or all widened to codes8 with the smallest group among them."""
    if len({weight.form for weight in weights}) == 1:
        return list(weights)
    if any(weight.layout == "fp8" for weight in weights):
        raise ValueError("fp8 weights and others cannot lie in one array")
    each = [weight.scales() for weight in weights]
    group, offsets = min(w.group for w in weights), any(offset is not None for _, offset in each)
    dtype = np.result_type(*{scale.dtype for scale, _ in each})

    def widened(w: PackedArray, scale: NDArray[Any], offset: NDArray[Any] | None) -> PackedArray:
        scale = scale.astype(dtype).repeat(w.group // group, axis=-1)
        offset = None if offset is None else offset.astype(dtype).repeat(w.group // group, axis=-1)
        return PackedArray(
            w.integers(), scale, np.zeros_like(scale) if offsets and offset is None else offset, "codes8", group
        )

    return [widened(w, *scales) for w, scales in zip(weights, each, strict=True)]


def concatenated(weights: Sequence[PackedArray], axis: int) -> PackedArray:
    """Weights one after the other along an axis that is not the contraction axis."""
    same = alike(weights)
    parts: dict[str, Any] = {name: np.concatenate([w.arrays[name] for w in same], axis) for name in same[0].arrays}
    return replace(same[0], **parts)
