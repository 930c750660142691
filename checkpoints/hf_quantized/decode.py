"""The tensors of one quantised weight `[O, D]` -> its values, exactly: a `PackedArray`, or float32 where no layout holds them.

A value is what the libraries compute in float32: (code - zero) * scale with scales as they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.gguf.block_types import E2M1_TABLE, PLAIN4_TABLE, SIGNED4_TABLE
from checkpoints.packed_array import FP8_BLOCK, PackedArray, indexed, pack4

GROUPS = (128, 64, 32, 16)  # columns that can share a scale in memory
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where element i of eight lies among the nibbles of an AWQ word
_ONES = {4: 0x11111111, 8: 0x01010101}  # a one in every field of a word

Arrays = Mapping[str, NDArray[Any]]
Decoded = PackedArray | NDArray[np.float32]


class Unsupported(ValueError):
    """Says which setting or tensor is not understood."""


def held_group(size: int, groups: int) -> int | None:
    """Columns that share a number in memory where each of `groups` equal parts of D shares one in the file; None: none can."""
    if size % 32 or groups < 1 or size % groups:
        return None
    return next((group for group in GROUPS if size // groups % group == 0), None)


def unpacked(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Numbers of four or eight bits out of 32-bit words, the lowest first: `[..., n]` -> `[..., 32 n / bits]`."""
    parts = np.ascontiguousarray(words).view(np.uint8)
    return parts if bits == 8 else np.stack([parts & 15, parts >> 4], axis=-1).reshape(*parts.shape[:-1], -1)


def numbers(scale: NDArray[Any]) -> NDArray[np.float32]:
    """Scales as float32; bytes are powers of two (E8M0)."""
    wide = (scale.view(ml_dtypes.float8_e8m0fnu) if scale.dtype == np.uint8 else scale).astype(np.float32)
    if not np.isfinite(wide).all():
        raise Unsupported("scales hold NaN or infinity. Download the file again")
    return wide


def affine(q: NDArray[np.uint8], scale: NDArray[Any], zero: NDArray[np.uint8] | None, bits: int) -> Decoded:
    """`(q - zero) * scale` with q `[O, D]`, scale and zero (None: the middle) `[O, G]`, one for each D / G columns.

    Without zeros a scale is kept as it is. With zeros the value is `q * scale - zero * scale`, which is exact in float32 where
    scales have few enough digits (all float16 and bfloat16 have); for others four bits become codes5 of the differences.
    """
    size, middle = q.shape[-1], 1 << bits - 1
    group = held_group(size, scale.shape[-1])
    assert group is not None, "checked when the folder was opened"

    def spread(parts: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(parts.repeat(size // group // parts.shape[-1], axis=-1))

    def codes(q: NDArray[np.uint8]) -> tuple[NDArray[Any], str]:
        return (pack4(q), "codes4") if bits == 4 else ((q ^ np.uint8(128)).view(np.int8), "codes8")

    if zero is None or (zero == middle).all():
        kept = scale if scale.dtype == np.float16 else numbers(scale)
        return PackedArray(codes(q)[0], spread(kept), None, codes(q)[1], group, SIGNED4_TABLE if bits == 4 else None)
    wide, away = numbers(scale), zero.astype(np.float32) - (0 if bits == 4 else middle)
    if not (wide.view(np.uint32) & np.uint32((1 << bits) - 1)).any():
        table = PLAIN4_TABLE if bits == 4 else None
        return PackedArray(codes(q)[0], spread(wide), spread(-wide * away), codes(q)[1], group, table)
    difference = q.reshape(len(q), scale.shape[-1], -1).astype(np.int16) - zero[..., None]
    if bits == 4:
        shifted = (difference + 16).astype(np.uint8).reshape(q.shape)
        return indexed(shifted, "codes5", -16, scale=spread(wide), offset=None, group=group)
    return (difference.astype(np.float32) * wide[..., None]).reshape(q.shape)


def gptq(arrays: Arrays, first_zero: int) -> Decoded:
    """Words along D, transposed: qweight `[D * bits / 32, O]`, qzeros `[G, O * bits / 32]`, scales `[G, O]`.

    `first_zero` is what is added to stored zeros: 1 in version 1 of the format, with carries from one field of a word to the
    next, for zeros were made by subtracting from whole words; 0 in version 2.
    """
    scale, zeros = arrays["scales"].T, arrays["qzeros"]
    bits = 32 * zeros.shape[1] // len(scale)
    q = unpacked(arrays["qweight"].T, bits)
    _refuse_order(arrays.get("g_idx"), "g_idx", q.shape[1], scale.shape[1])
    words = zeros.view(np.uint32) + np.uint32(first_zero * _ONES[bits])
    return affine(q, scale, unpacked(words, bits).T, bits)


def awq(arrays: Arrays) -> Decoded:
    """Words along O, transposed, nibbles in an order of their own: qweight `[D, O / 8]`, qzeros `[G, O / 8]`, scales `[G, O]`."""

    def ordered(words: NDArray[Any]) -> NDArray[np.uint8]:
        return unpacked(words, 4).reshape(len(words), -1, 8)[..., _AWQ_ORDER].reshape(len(words), -1).T

    return affine(np.ascontiguousarray(ordered(arrays["qweight"])), arrays["scales"].T, ordered(arrays["qzeros"]), 4)


def words(arrays: Arrays, bits: int) -> Decoded:
    """weight_packed `[O, D * bits / 32]`, weight_scale `[O, G]` or one for all, weight_zero_point `[O * bits / 32, G]`."""
    q = unpacked(arrays["weight_packed"], bits)
    scale = _by_rows(arrays["weight_scale"], len(q))
    _refuse_order(arrays.get("weight_g_idx"), "weight_g_idx", q.shape[1], scale.shape[1])
    zero = arrays.get("weight_zero_point")
    return affine(q, scale, None if zero is None else unpacked(zero.T, bits).T[: len(q)], bits)


def bytes8(arrays: Arrays) -> Decoded:
    """weight int8 `[O, D]`, weight_scale `[O, G]` or one for all, weight_zero_point int8 like it or none."""
    q, zero = arrays["weight"].view(np.uint8) ^ np.uint8(128), arrays.get("weight_zero_point")
    zero = None if zero is None else _by_rows(zero.view(np.uint8) ^ np.uint8(128), len(q))
    return affine(q, _by_rows(arrays["weight_scale"], len(q)), zero, 8)


def fp8(arrays: Arrays, scales: str) -> Decoded:
    """weight `[O, D]`; a scale for all, for blocks of 128 x 128, or (not packed) for each row or group of a row."""
    codes, scale = arrays["weight"], numbers(arrays[scales])
    blocks = -(-codes.shape[0] // FP8_BLOCK), -(-codes.shape[1] // FP8_BLOCK)
    if scale.size == 1:
        scale = np.full(blocks, scale.reshape(()), np.float32)
    if scale.shape in (blocks, (blocks[0], 1, blocks[1], 1)):
        return PackedArray(codes, scale.reshape(blocks), None, "fp8", FP8_BLOCK)
    each = scale.reshape(len(codes), -1, 1)
    return (codes.astype(np.float32).reshape(*each.shape[:2], -1) * each).reshape(codes.shape)


def fp4(pairs: NDArray[np.uint8], scale: NDArray[np.float32]) -> Decoded:
    """Pairs of E2M1, the lower nibble first, `[O, D / 2]`, and a scale `[O, G]`."""
    q = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)
    half = numbers(scale) * np.float32(0.5)  # the table holds twice the values
    return PackedArray(pack4(q), half, None, "codes4", q.shape[-1] // half.shape[-1], E2M1_TABLE)


def nvfp4(arrays: Arrays) -> Decoded:
    """modelopt: a float8 scale for 16 times a factor for all."""
    return fp4(
        arrays["weight"], numbers(arrays["weight_scale"]) * arrays["weight_scale_2"].astype(np.float32).reshape(())
    )


def nvfp4_divided(arrays: Arrays) -> Decoded:
    """compressed-tensors: a float8 scale for 16, divided by a number for all."""
    whole = arrays["weight_global_scale"].astype(np.float32).reshape(())
    with np.errstate(divide="ignore", invalid="ignore"):  # reported by `numbers`
        return fp4(arrays["weight_packed"], numbers(arrays["weight_scale"]) / whole)


def mxfp4(arrays: Arrays) -> Decoded:
    return fp4(arrays["weight_packed"], numbers(arrays["weight_scale"]))


def _by_rows(scale: NDArray[Any], rows: int) -> NDArray[Any]:
    """`[O, G]` of scales that may be one for all, or one for each row without a second axis."""
    return np.broadcast_to(scale.reshape(1, 1), (rows, 1)) if scale.size == 1 else scale.reshape(rows, -1)


def _refuse_order(order: NDArray[Any] | None, name: str, size: int, groups: int) -> None:
    group = size // groups
    if order is not None and not np.array_equal(order, np.arange(size) // group):
        raise Unsupported(
            f"{name!r} reorders columns (desc_act, actorder 'group'), expected groups of {group} one after the other; use a "
            "checkpoint without it"
        )
