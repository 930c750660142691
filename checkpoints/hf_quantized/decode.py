"""Decode the tensors of one quantised weight `[O, D]` exactly: to a `PackedArray`, or to float32 if no layout fits.

A value is what the formats' own libraries compute in float32: (code - zero) * scale, with scales as they are stored.
In the shapes below, G is the number of groups along D that have a scale of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.code_tables import DOUBLED_E2M1_TABLE, INT4_TABLE, UINT4_TABLE
from checkpoints.hf_quantized.errors import UnsupportedQuantizationError
from checkpoints.packed_array import FP8_BLOCK, PackedArray, from_indices, pack4

GROUP_SIZES = (128, 64, 32, 16)  # columns that can share a scale in a `PackedArray`
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the nibble of an AWQ word that holds element i of eight
_ONE_IN_EVERY_FIELD = {4: 0x11111111, 8: 0x01010101}  # of a 32-bit word, by the bits of a field

Arrays = Mapping[str, NDArray[Any]]  # the tensors of a weight by suffix
Decoded = PackedArray | NDArray[np.float32]


def supported_group_size(columns: int, num_groups: int) -> int | None:
    """Return the largest group size of a `PackedArray` that divides the file's; None if there is none.

    In the file, each of `num_groups` equal parts of the columns shares a scale.
    """
    if columns % 32 or num_groups < 1 or columns % num_groups:
        return None
    return next((size for size in GROUP_SIZES if columns // num_groups % size == 0), None)


def unpack_int32(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Unpack fields of four or eight bits from 32-bit words, lowest first: `[..., n]` -> `[..., 32 n / bits]`."""
    fields = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return fields
    return np.stack([fields & 15, fields >> 4], axis=-1).reshape(*fields.shape[:-1], -1)


def scales_to_float32(scale: NDArray[Any]) -> NDArray[np.float32]:
    """Convert scales to float32; uint8 scales are powers of two, E8M0 of OCP Microscaling v1.0.

    Raises UnsupportedQuantizationError if a scale is NaN or infinite.
    """
    converted = (scale.view(ml_dtypes.float8_e8m0fnu) if scale.dtype == np.uint8 else scale).astype(np.float32)
    if not np.isfinite(converted).all():
        raise UnsupportedQuantizationError("scales hold NaN or infinity. Download the file again")
    return converted


def decode_affine(q: NDArray[np.uint8], scale: NDArray[Any], zero: NDArray[np.uint8] | None, bits: int) -> Decoded:
    """Decode `(q - zero) * scale`.

    Without zero points, a float16 scale is kept as it is. With zero points, the value is computed as
    `q * scale - zero * scale`. That is exact in float32 if the last `bits` bits of every scale are zero, as in all
    float16 and bfloat16 scales. Otherwise four-bit codes become codes5 of q - zero, and eight-bit codes float32.

    Args:
        q: codes `[O, D]`.
        scale: `[O, G]`, one for each D / G columns.
        zero: zero points `[O, G]`. None: 2**(bits - 1) everywhere.
        bits: 4 or 8.
    """
    columns, midpoint = q.shape[-1], 1 << bits - 1
    group = supported_group_size(columns, scale.shape[-1])
    assert group is not None, "the shapes were checked when the folder was opened"

    def repeat_to_groups(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array.repeat(columns // group // array.shape[-1], axis=-1))

    def pack_codes() -> tuple[NDArray[Any], str]:
        return (pack4(q), "codes4") if bits == 4 else ((q ^ np.uint8(128)).view(np.int8), "codes8")

    if zero is None or (zero == midpoint).all():
        stored_scale = scale if scale.dtype == np.float16 else scales_to_float32(scale)
        codes, layout = pack_codes()
        table = INT4_TABLE if bits == 4 else None
        return PackedArray(codes, repeat_to_groups(stored_scale), None, layout, group, table)
    scale_float32 = scales_to_float32(scale)
    if not (scale_float32.view(np.uint32) & np.uint32((1 << bits) - 1)).any():
        codes, layout = pack_codes()
        table, table_zero = (UINT4_TABLE, 0) if bits == 4 else (None, midpoint)
        offset = -scale_float32 * (zero.astype(np.float32) - table_zero)
        return PackedArray(codes, repeat_to_groups(scale_float32), repeat_to_groups(offset), layout, group, table)
    difference = q.reshape(len(q), scale.shape[-1], -1).astype(np.int16) - zero[..., None]
    if bits == 4:
        indices = (difference + 16).astype(np.uint8).reshape(q.shape)
        return from_indices(indices, "codes5", -16, scale=repeat_to_groups(scale_float32), offset=None, group=group)
    return (difference.astype(np.float32) * scale_float32[..., None]).reshape(q.shape)


def decode_gptq(arrays: Arrays, first_zero: int) -> Decoded:
    """Decode GPTQ (arXiv:2210.17323), transposed words along D.

    Args:
        arrays: qweight `[D * bits / 32, O]`, qzeros `[G, O * bits / 32]`, scales `[G, O]`, perhaps g_idx `[D]`.
        first_zero: the number to add to stored zero points: 1 in version 1 of the format, 0 in version 2. Version 1
            subtracted 1 from whole words, with borrows from field to field; adding to whole words undoes them.
    """
    scale, zeros = arrays["scales"].T, arrays["qzeros"]
    bits = 32 * zeros.shape[1] // len(scale)
    q = unpack_int32(arrays["qweight"].T, bits)
    _check_column_order(arrays.get("g_idx"), "g_idx", q.shape[1], scale.shape[1])
    zero_words = zeros.view(np.uint32) + np.uint32(first_zero * _ONE_IN_EVERY_FIELD[bits])
    return decode_affine(q, scale, unpack_int32(zero_words, bits).T, bits)


def decode_awq(arrays: Arrays) -> Decoded:
    """Decode AWQ (arXiv:2306.00978), transposed words along O with nibbles in an order of their own.

    `arrays`: qweight `[D, O / 8]`, qzeros `[G, O / 8]`, scales `[G, O]`.
    """

    def unpack(words: NDArray[Any]) -> NDArray[np.uint8]:
        return unpack_int32(words, 4).reshape(len(words), -1, 8)[..., _AWQ_ORDER].reshape(len(words), -1).T

    return decode_affine(
        np.ascontiguousarray(unpack(arrays["qweight"])), arrays["scales"].T, unpack(arrays["qzeros"]), 4
    )


def decode_packed_int32(arrays: Arrays, bits: int) -> Decoded:
    """Decode pack-quantized of compressed-tensors, words along D.

    `arrays`: weight_packed `[O, D * bits / 32]`, weight_scale `[O, G]` or one for all, perhaps weight_zero_point
    `[O * bits / 32, G]` and weight_g_idx `[D]`.
    """
    q = unpack_int32(arrays["weight_packed"], bits)
    scale = _scale_per_row(arrays["weight_scale"], len(q))
    _check_column_order(arrays.get("weight_g_idx"), "weight_g_idx", q.shape[1], scale.shape[1])
    zero = arrays.get("weight_zero_point")
    if zero is not None and zero.dtype == np.int8:
        _check_all_zero(zero)
        zero = None
    if zero is not None and len(zero) != -(-len(q) * bits // 32):
        raise UnsupportedQuantizationError(f"'weight_zero_point' has {len(zero)} rows of words, which are not packed")
    return decode_affine(q, scale, None if zero is None else unpack_int32(zero.T, bits).T[: len(q)], bits)


def decode_int8(arrays: Arrays) -> Decoded:
    """Decode int-quantized of compressed-tensors and W8A16 of modelopt.

    `arrays`: weight int8 `[O, D]`, weight_scale `[O, G]` or one for all, perhaps weight_zero_point int8 like the scale.
    """
    q, zero = arrays["weight"].view(np.uint8) ^ np.uint8(128), arrays.get("weight_zero_point")
    zero = None if zero is None else _scale_per_row(zero.view(np.uint8) ^ np.uint8(128), len(q))
    return decode_affine(q, _scale_per_row(arrays["weight_scale"], len(q)), zero, 8)


def decode_fp8(arrays: Arrays, scale_suffix: str) -> Decoded:
    """Decode FP8 (e4m3) with factors `arrays[scale_suffix]`, and MXFP8 (OCP Microscaling v1.0).

    One scale for the weight and scales for blocks of 128 x 128 give the layout fp8; one scale for each row, or for
    each group of a row, gives float32.
    """
    codes, scale = arrays["weight"], scales_to_float32(arrays[scale_suffix])
    _check_all_zero(arrays.get("weight_zero_point"))
    blocks = -(-codes.shape[0] // FP8_BLOCK), -(-codes.shape[1] // FP8_BLOCK)
    if scale.size == 1:
        scale = np.full(blocks, scale.reshape(()), np.float32)
    if scale.shape in (blocks, (blocks[0], 1, blocks[1], 1)):
        return PackedArray(codes, scale.reshape(blocks), None, "fp8", FP8_BLOCK)
    scale = scale.reshape(len(codes), -1, 1)
    return (codes.astype(np.float32).reshape(*scale.shape[:2], -1) * scale).reshape(codes.shape)


def decode_fp4(byte_pairs: NDArray[np.uint8], scale: NDArray[np.float32]) -> Decoded:
    """Decode pairs of E2M1 codes `[O, D / 2]`, lower nibble first, with float32 scales `[O, G]`."""
    q = np.stack([byte_pairs & 15, byte_pairs >> 4], axis=-1).reshape(len(byte_pairs), -1)
    half_scale = scales_to_float32(scale) * np.float32(0.5)  # the table holds twice the values
    return PackedArray(pack4(q), half_scale, None, "codes4", q.shape[-1] // half_scale.shape[-1], DOUBLED_E2M1_TABLE)


def decode_nvfp4_modelopt(arrays: Arrays) -> Decoded:
    """Decode NVFP4 of modelopt: a float8 scale for 16 elements, times one factor for the weight."""
    factor = arrays["weight_scale_2"].astype(np.float32).reshape(())
    return decode_fp4(arrays["weight"], scales_to_float32(arrays["weight_scale"]) * factor)


def decode_nvfp4_compressed(arrays: Arrays) -> Decoded:
    """Decode NVFP4 of compressed-tensors: a float8 scale for 16 elements, divided by one number for the weight."""
    divisor = arrays["weight_global_scale"].astype(np.float32).reshape(())
    with np.errstate(divide="ignore", invalid="ignore"):  # `decode_fp4` reports NaN and infinity
        return decode_fp4(arrays["weight_packed"], scales_to_float32(arrays["weight_scale"]) / divisor)


def decode_mxfp4(arrays: Arrays) -> Decoded:
    """Decode MXFP4 (OCP Microscaling v1.0): an E8M0 scale for 32 elements."""
    return decode_fp4(arrays["weight_packed"], scales_to_float32(arrays["weight_scale"]))


def _check_all_zero(zero: NDArray[Any] | None) -> None:
    """Check that zero points, if there are any, are zero: these formats have none."""
    if zero is not None and zero.astype(np.float32).any():
        raise UnsupportedQuantizationError("'weight_zero_point' is not zero, expected a symmetric weight")


def _scale_per_row(scale: NDArray[Any], rows: int) -> NDArray[Any]:
    """Return scales as `[O, G]`, of one scale for the weight, one for each row, or one for each group of a row."""
    return np.broadcast_to(scale.reshape(1, 1), (rows, 1)) if scale.size == 1 else scale.reshape(rows, -1)


def _check_column_order(group_index: NDArray[Any] | None, name: str, columns: int, num_groups: int) -> None:
    """Check that the group index of every column, if there is one, says that groups follow one another."""
    group = columns // num_groups
    if group_index is not None and not np.array_equal(group_index, np.arange(columns) // group):
        raise UnsupportedQuantizationError(
            f"{name!r} reorders columns (desc_act, actorder 'group'), expected groups of {group} one after the other; "
            "use a checkpoint without it"
        )
