"""`PackedArray`: a quantised weight in numpy, in one of the layouts to which every file format is repacked.

The layouts are those of `QuantizedTensor` in `kernels_pallas/weights/quantized.py`, which the GPU kernels read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FP8_BLOCK = 128  # rows and columns that share a scale
INDEX_BITS = {"codes4": 4, "codes5": 5, "codes6": 6}  # bits per index of the layouts with a table
ARRAY_FIELDS = ("codes", "high", "scale", "offset", "super_scale", "super_offset")


@dataclass(frozen=True)
class PackedArray:
    """A weight `[..., O, D]` of elements `scale * t + offset`, computed in float32; D is the contraction axis.

    Attributes:
        codes: "codes4", "codes5", "codes6": the low four bits of indices, t = table[index], uint8 `[..., O, D/2]` in
            the order of `pack4`. "codes8": int8 `[..., O, D]`, t = code. "fp8": float8_e4m3fn `[..., O, D]`, t = code.
        scale: float16, bfloat16 or float32 `[..., O, D/group]`; int8 if there is a `super_scale`: the scale is then
            the product of both, exact in float32. fp8: float32 `[..., ceil(O/128), ceil(D/128)]`.
        offset: like `scale`, with `super_offset`. None: zero.
        layout: one of the names above.
        group: the number of consecutive columns that share a scale.
        table: the value of every index. For codes5 and codes6 these are consecutive integers.
        high: the bits above the low four of each index, in the order of `pack_high`: codes5 uint8, codes6 uint16,
            `[..., O, D/8]`.
        super_scale, super_offset: float16 or float32 `[..., O, D/super group]`; a super group is several groups.
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
        """The arrays that are not None, by field name."""
        return {name: array for name in ARRAY_FIELDS if (array := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """The number of bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def num_columns(self) -> int:
        """D, the size of the contraction axis."""
        return self.codes.shape[-1] * (2 if self.layout in INDEX_BITS else 1)

    @property
    def layout_key(self) -> tuple[Any, ...]:
        """A key that is equal for two weights if their arrays can be stacked without a conversion."""
        fields = tuple((name, array.dtype, self.num_columns / array.shape[-1]) for name, array in self.arrays.items())
        return self.layout, self.group, self.table, fields

    def map_arrays(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> PackedArray:
        """Return a copy with `change` applied to every array."""
        changed: dict[str, Any] = {name: change(array) for name, array in self.arrays.items()}
        return replace(self, **changed)

    def group_scales(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return scale and offset `[..., O, D/group]`, multiplied by their super scales if there are any."""
        if self.super_scale is None:
            return self.scale, self.offset
        return _times_super_scale(self.scale, self.super_scale), _times_super_scale(self.offset, self.super_offset)

    def times(self, factor: NDArray[np.float32]) -> PackedArray:
        """Return the weight with the rows multiplied by `factor` `[..., O, 1]`; each scale is rounded once to float32.

        Raises ValueError for the layout fp8, whose scales several rows share.
        """
        if self.layout == "fp8":
            raise ValueError("rows of fp8 weights share scales and cannot be multiplied one by one")
        names = ("scale", "offset") if self.super_scale is None else ("super_scale", "super_offset")
        scaled: dict[str, Any] = {
            name: array.astype(np.float32) * factor for name in names if (array := getattr(self, name)) is not None
        }
        return replace(self, **scaled)

    def split_super_groups(self, columns: int) -> PackedArray:
        """Return the same weight with super groups of at most `columns` columns: each super scale is repeated.

        Blocks of `columns` columns can then be reordered.
        """
        if self.super_scale is None or (times := self.num_columns // self.super_scale.shape[-1] // columns) <= 1:
            return self
        repeated: dict[str, Any] = {
            name: array.repeat(times, axis=-1) for name, array in self.arrays.items() if name.startswith("super")
        }
        return replace(self, **repeated)

    def unscaled_values(self) -> NDArray[Any]:
        """Return t of every element, `[..., O, D]`: int8, or float8_e4m3fn for the layout fp8."""
        if self.layout not in INDEX_BITS:
            return self.codes
        blocks = self.codes.reshape(*self.codes.shape[:-1], -1, 16)
        indices = np.stack([blocks & 15, blocks >> 4], axis=-2).reshape(*self.codes.shape[:-1], -1)
        if self.high is not None:
            indices = indices | unpack_high(self.high, INDEX_BITS[self.layout] - 4) << 4
        return np.asarray(self.table, np.int8)[indices]

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weight as float32 `[..., O, D]`."""
        values = self.unscaled_values().astype(np.float32)
        if self.layout == "fp8":
            scale_per_element = self.scale.repeat(FP8_BLOCK, axis=-2).repeat(FP8_BLOCK, axis=-1)
            return values * scale_per_element[..., : values.shape[-2], : values.shape[-1]]
        scale, offset = self.group_scales()
        groups = values.reshape(*values.shape[:-1], -1, self.group)  # a view: the updates below reach `values`
        groups *= scale.astype(np.float32)[..., None]
        if offset is not None:
            groups += offset.astype(np.float32)[..., None]
        return values


def _times_super_scale(scale: NDArray[Any] | None, super_scale: NDArray[Any] | None) -> Any:
    if super_scale is None or scale is None:
        return None
    repeated = super_scale.astype(np.float32).repeat(scale.shape[-1] // super_scale.shape[-1], axis=-1)
    return repeated * scale.astype(np.float32)


def pack4(indices: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack the low four bits of indices `[..., D]` into bytes `[..., D/2]`, in GGUF's order.

    In every block of 32 elements, byte j holds element j in its low nibble and element j + 16 in its high nibble.
    """
    halves = indices.reshape(*indices.shape[:-1], -1, 2, 16).astype(np.uint8, copy=False)
    packed: NDArray[np.uint8] = halves[..., 0, :] & np.uint8(15) | halves[..., 1, :] << np.uint8(4)
    return packed.reshape(*indices.shape[:-1], -1)


def pack_high(indices: NDArray[Any], bits: int) -> NDArray[Any]:
    """Pack the bits from bit 4 on of indices `[..., D]`, eight elements to a uint8 or uint16: `[..., D/8]`.

    Entry j of a block of 32 elements belongs to the bytes 4 j to 4 j + 3 of `pack4`, nibble by nibble, lowest first.

    Args:
        indices: integers of 4 + `bits` bits.
        bits: 1 (uint8) or 2 (uint16).
    """
    high = indices.reshape(*indices.shape[:-1], -1, 2, 16).astype(np.uint8, copy=False) >> np.uint8(4)
    words = (high[..., 0, :] | high[..., 1, :] << np.uint8(bits)).view("<u4")  # byte c: high bits of `pack4`'s byte c
    mask = (1 << 2 * bits) - 1
    packed = words & np.uint32(mask)
    for c in range(1, 4):
        packed |= words >> np.uint32(c * (8 - 2 * bits)) & np.uint32(mask << 2 * bits * c)
    return packed.astype(np.uint8 if bits == 1 else np.uint16).reshape(*indices.shape[:-1], -1)


def unpack_high(high: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Invert `pack_high`: `[..., D/8]` -> `[..., D]` of values 0 to 1 (`bits` = 1) or 0 to 3 (`bits` = 2)."""
    fields = (high[..., None] >> (bits * np.arange(8)).astype(high.dtype)) & high.dtype.type((1 << bits) - 1)
    fields = fields.astype(np.uint8).reshape(*high.shape[:-1], -1, 4, 4, 2)  # [..., block, entry, byte, nibble]
    return np.moveaxis(fields, -1, -3).reshape(*high.shape[:-1], -1)


def from_indices(indices: NDArray[Any], layout: str, first: int, **fields: Any) -> PackedArray:
    """Return a `PackedArray` whose table is the consecutive integers from `first` on.

    Args:
        indices: `[..., D]` integers from 0 to 2**bits - 1.
        layout: "codes4", "codes5" or "codes6".
        first: the value of index 0.
        fields: the other fields of `PackedArray`: scales, offsets and group.
    """
    bits = INDEX_BITS[layout]
    return PackedArray(
        codes=pack4(indices),
        high=pack_high(indices, bits - 4) if bits > 4 else None,
        layout=layout,
        table=tuple(range(first, first + (1 << bits))),
        **fields,
    )


def to_common_layout(weights: Sequence[PackedArray]) -> list[PackedArray]:
    """Return the same weights, exactly, in one layout whose arrays can be stacked.

    Weights of one layout stay as they are. Different ones are widened to codes8, with the smallest group among them.

    Raises:
        ValueError: an fp8 weight is among weights of other layouts.
    """
    if len({weight.layout_key for weight in weights}) == 1:
        return list(weights)
    if any(weight.layout == "fp8" for weight in weights):
        raise ValueError("fp8 weights and weights of other layouts cannot share one array")
    all_scales = [weight.group_scales() for weight in weights]
    group, any_offset = min(w.group for w in weights), any(offset is not None for _, offset in all_scales)
    dtype = np.result_type(*{scale.dtype for scale, _ in all_scales})

    def widen(w: PackedArray, scale: NDArray[Any], offset: NDArray[Any] | None) -> PackedArray:
        scale = scale.astype(dtype).repeat(w.group // group, axis=-1)
        if offset is not None:
            offset = offset.astype(dtype).repeat(w.group // group, axis=-1)
        elif any_offset:
            offset = np.zeros_like(scale)
        return PackedArray(w.unscaled_values(), scale, offset, "codes8", group)

    return [widen(w, *scales) for w, scales in zip(weights, all_scales, strict=True)]


def concatenate(weights: Sequence[PackedArray], axis: int) -> PackedArray:
    """Concatenate weights along `axis`, which must not be the contraction axis; raises as `to_common_layout`."""
    common = to_common_layout(weights)
    arrays: dict[str, Any] = {name: np.concatenate([w.arrays[name] for w in common], axis) for name in common[0].arrays}
    return replace(common[0], **arrays)
