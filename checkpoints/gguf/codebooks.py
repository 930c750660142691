"""The GGUF types of one to three bits, repacked exactly. They index a codebook, which ggml calls a grid.

A grid entry is a point of four or eight elements. Each element takes one of at most 16 values, so the layout is
`codes4`. The grids are those of the `gguf` package; the layouts are those of ggml-common.h of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.gguf.block_types import BlockType, Bytes, as_float16, merge_blocks
from checkpoints.packed_array import PackedArray, pack4


@cache
def load_grid(name: str) -> NDArray[np.float32]:
    """Return the grid of a type as points `[N, 4 or 8]`. Raises ImportError without the `gguf` package."""
    from gguf import quants

    quant_class = getattr(quants, name)
    quant_class.init_grid()
    return np.asarray(quant_class.grid, np.float32).reshape(quant_class.grid_shape)


@cache
def _signed_table(name: str) -> tuple[tuple[int, ...], NDArray[np.uint8], int]:
    """Return the value table of a grid of magnitudes, the grid as indices of magnitudes, and their number M.

    The table has 16 entries: all M magnitudes with a minus, ascending, all with a plus, ascending, and zeros.
    """
    grid = load_grid(name)
    magnitudes, indices = np.unique(grid, return_inverse=True)
    values = tuple(int(v) for v in (*-magnitudes[::-1], *magnitudes))
    return values + (0,) * (16 - len(values)), indices.reshape(grid.shape).astype(np.uint8), len(magnitudes)


def _unpack_bits(raw: Bytes) -> NDArray[np.uint8]:
    """Unpack eight bits per byte, lowest first: `[..., n]` -> `[..., n, 8]`."""
    return np.unpackbits(raw[..., None], axis=-1, bitorder="little")


def _unpack_7bit_signs(words: NDArray[Any], count: int) -> NDArray[np.uint8]:
    """Unpack `count` times seven sign bits, lowest first, and their parity: `[..., n]` -> `[..., n, count, 8]`.

    The eighth sign makes the number of minus signs even (`ksigns_iq2xs` in ggml-common.h).
    """
    fields = ((words[..., None] >> (7 * np.arange(count)).astype(words.dtype)) & 127).astype(np.uint8)
    signs = _unpack_bits(fields)
    signs[..., 7] = signs[..., :7].sum(axis=-1) & 1
    return signs


def _unpack_nibbles(raw: Bytes) -> NDArray[np.uint8]:
    """Unpack the low, then the high nibble of every byte: `[..., n]` -> `[..., 2 n]`."""
    return np.stack([raw & 15, raw >> 4], axis=-1).reshape(*raw.shape[:-1], -1)


def _repack_signed_grid(
    name: str,
    grid_index: NDArray[Any],
    is_negative: NDArray[np.uint8],
    scales: NDArray[Any],
    d: NDArray[Any],
    divisor: int,
    group: int,
) -> PackedArray:
    """Repack points of a grid of magnitudes with a sign for every element, times (2 scales + 1) d / divisor.

    Args:
        name: the class of `gguf.quants` that has the grid.
        grid_index: `[R, N, points per block]`.
        is_negative: 1 for a minus; any shape with one entry per element.
        scales: the stored scale of every group, `[R, N, groups per block]`.
        d: float16 `[R, N, 1]`. d / divisor may need more bits than float16 has and is float32 then.
        divisor: a power of two.
        group: elements that share a scale.
    """
    table, magnitude_grid, num_magnitudes = _signed_table(name)
    magnitude = magnitude_grid[grid_index].reshape(*grid_index.shape[:2], -1)
    first_positive = np.uint8(num_magnitudes)
    minus = is_negative.reshape(magnitude.shape).astype(bool)
    codes = np.where(minus, first_positive - 1 - magnitude, first_positive + magnitude)
    scale = merge_blocks((2 * scales.astype(np.int8) + 1).astype(np.int8))
    super_scale = merge_blocks(d if divisor == 1 else d.astype(np.float32) / np.float32(divisor))
    return PackedArray(pack4(merge_blocks(codes)), scale, None, "codes4", group, table, super_scale=super_scale)


def _repack_iq2_xxs(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 2:]).view("<u4").reshape(*raw.shape[:-1], 8, 2)
    grid_index = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    signs, scales, d = _unpack_7bit_signs(words[..., 1], 4), words[..., 1] >> 28, as_float16(raw[..., :2])
    return _repack_signed_grid("IQ2_XXS", grid_index, signs, scales, d, divisor=8, group=32)


def _repack_iq2_xs(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 2:66]).view("<u2")
    signs, scales, d = _unpack_7bit_signs(words >> 9, 1), _unpack_nibbles(raw[..., 66:]), as_float16(raw[..., :2])
    return _repack_signed_grid("IQ2_XS", words & 511, signs, scales, d, divisor=8, group=16)


def _repack_iq2_s(raw: Bytes) -> PackedArray:
    qh = (raw[..., 66:74, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    grid_index = raw[..., 2:34] | qh.reshape(*raw.shape[:-1], 32).astype(np.uint16) << 8
    signs, scales, d = _unpack_bits(raw[..., 34:66]), _unpack_nibbles(raw[..., 74:]), as_float16(raw[..., :2])
    return _repack_signed_grid("IQ2_S", grid_index, signs, scales, d, divisor=8, group=16)


def _repack_iq3_xxs(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 66:]).view("<u4")
    signs, scales, d = _unpack_7bit_signs(words, 4), words >> 28, as_float16(raw[..., :2])
    return _repack_signed_grid("IQ3_XXS", raw[..., 2:66], signs, scales, d, divisor=4, group=32)


def _repack_iq3_s(raw: Bytes) -> PackedArray:
    qh = _unpack_bits(raw[..., 66:74]).reshape(*raw.shape[:-1], 64)
    grid_index = raw[..., 2:66] | qh.astype(np.uint16) << 8
    signs, scales, d = _unpack_bits(raw[..., 74:106]), _unpack_nibbles(raw[..., 106:]), as_float16(raw[..., :2])
    return _repack_signed_grid("IQ3_S", grid_index, signs, scales, d, divisor=1, group=32)


# Eight times the values of IQ1: -1, 0 and 1, each minus or plus an eighth (`IQ1S_DELTA` in ggml-common.h).
_IQ1_TABLE = (-9, -7, -1, 1, 7, 9) + (0,) * 10


def _repack_iq1(
    grid_index: NDArray[Any], delta_is_positive: NDArray[Any], scales: NDArray[Any], d: NDArray[Any], group: int
) -> PackedArray:
    """Repack points of -1, 0 and 1, plus or minus an eighth, times (2 scales + 1) d.

    Args:
        grid_index: `[R, N, 32]`.
        delta_is_positive: whether a point's eighth is added, `[R, N, 32]`; else it is subtracted.
        scales: the stored scale of every group, `[R, N, groups per block]`.
        d: float16 `[R, N, 1]`.
        group: elements that share a scale.
    """
    codes = 2 * (load_grid("IQ1_S").astype(np.int8)[grid_index] + 1) + delta_is_positive[..., None]
    packed = pack4(merge_blocks(codes.reshape(*grid_index.shape[:2], -1)))
    scale = merge_blocks((2 * scales + 1).astype(np.int8))
    super_scale = merge_blocks(d.astype(np.float32) / np.float32(8))
    return PackedArray(packed, scale, None, "codes4", group, _IQ1_TABLE, super_scale=super_scale)


def _repack_iq1_s(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 34:]).view("<u2")
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & 7
    grid_index = raw[..., 2:34] | high.reshape(*raw.shape[:-1], 32) << 8
    delta_is_positive = (words >> 15 == 0).repeat(4, axis=-1)
    return _repack_iq1(grid_index, delta_is_positive, (words >> 12) & 7, as_float16(raw[..., :2]), group=32)


def _repack_iq1_m(raw: Bytes) -> PackedArray:
    words = np.ascontiguousarray(raw[..., 48:]).view("<u2")
    d_nibbles = words >> 12 << np.array([0, 4, 8, 12], np.uint16)  # the float16 d is spread over four words
    d = d_nibbles.sum(axis=-1, keepdims=True).astype(np.uint16).view(np.float16)
    scales = ((words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & 7).reshape(*raw.shape[:-1], 16)
    qh = _unpack_nibbles(raw[..., 32:48])
    grid_index = raw[..., :32] | (qh & 7).astype(np.uint16) << 8
    return _repack_iq1(grid_index, qh >> 3 == 0, scales, d, group=16)


def _codebook_type(name: str, size: int, repack: Callable[[Bytes], PackedArray]) -> BlockType:
    return BlockType(name, 256, size, repack=repack, codebook="IQ1_S" if name.startswith("IQ1") else name)


# By type number, as `BLOCK_TYPES`.
CODEBOOK_TYPES: dict[int, BlockType] = {
    16: _codebook_type("IQ2_XXS", 66, _repack_iq2_xxs),
    17: _codebook_type("IQ2_XS", 74, _repack_iq2_xs),
    22: _codebook_type("IQ2_S", 82, _repack_iq2_s),
    18: _codebook_type("IQ3_XXS", 98, _repack_iq3_xxs),
    21: _codebook_type("IQ3_S", 110, _repack_iq3_s),
    19: _codebook_type("IQ1_S", 50, _repack_iq1_s),
    29: _codebook_type("IQ1_M", 56, _repack_iq1_m),
}
