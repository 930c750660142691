"""Quantise a weight in numpy: 4 and 8 bits with a scale per 32 elements, or FP8 with a scale per 128 x 128 block."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.code_tables import INT4_TABLE, IQ4_NL_TABLE
from checkpoints.packed_array import FP8_BLOCK, PackedArray, pack4

MODES = ("int4", "int8", "iq4nl", "fp8")
GROUP = 32  # columns that share a scale
TABLES = {"int4": INT4_TABLE, "iq4nl": IQ4_NL_TABLE}
_BLOCKS_PER_BATCH = 1 << 16  # of 32 elements: the search for scales holds a few arrays of that size
_LARGEST_FP8 = 448.0  # of float8_e4m3fn


def quantize_blocks(
    blocks: NDArray[np.float32], table: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Return indices into `table` (uint8 `[N, 32]`) and scales (float16 `[N, 1]`) for blocks `[N, 32]`.

    Tries several scales around the one that maps the largest magnitude of a block to an end of the table. For the
    codes of each, the best scale is the least-squares one. Keeps the scale with the least squared error per block.
    """
    values = np.asarray(table, np.float32)
    boundaries = (values[1:] + values[:-1]) / 2
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    best_scale, best_error = np.zeros((len(blocks), 1), np.float32), np.full((len(blocks), 1), np.inf, np.float32)
    for end in np.concatenate([values[0] * np.linspace(0.83, 1.18, 10), values[-1] * np.linspace(0.83, 1.18, 9)]):
        scale = largest / np.float32(end)
        t = values[np.searchsorted(boundaries, blocks / _nonzero(scale))]
        scale = np.sum(blocks * t, axis=1, keepdims=True) / np.maximum(np.sum(t * t, axis=1, keepdims=True), 1e-30)
        error = np.sum((blocks - scale * t) ** 2, axis=1, keepdims=True)
        is_better = error < best_error
        best_scale, best_error = np.where(is_better, scale, best_scale), np.where(is_better, error, best_error)
    stored_scale = best_scale.astype(np.float16)
    scale = stored_scale.astype(np.float32)
    return np.searchsorted(boundaries, blocks / _nonzero(scale)).astype(np.uint8), stored_scale


def _nonzero(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Replace zeros by one, as a divisor: a block of zeros has the scale zero."""
    return np.where(scale == 0, 1, scale)


def _quantize_codes4(x: NDArray[np.float32], table: tuple[int, ...]) -> PackedArray:
    blocks = x.reshape(-1, GROUP)
    codes, scale = np.empty(blocks.shape, np.uint8), np.empty((len(blocks), 1), np.float16)
    for i in range(0, len(blocks), _BLOCKS_PER_BATCH):
        batch = slice(i, i + _BLOCKS_PER_BATCH)
        codes[batch], scale[batch] = quantize_blocks(blocks[batch], table)
    shape = (*x.shape[:-1], -1)
    return PackedArray(pack4(codes).reshape(shape), scale.reshape(shape), None, "codes4", GROUP, table)


def _quantize_codes8(x: NDArray[np.float32]) -> PackedArray:
    blocks = x.reshape(-1, GROUP)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    codes = np.clip(np.rint(blocks / _nonzero(scale.astype(np.float32))), -127, 127).astype(np.int8)
    return PackedArray(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], -1), None, "codes8", GROUP)


def _quantize_fp8(x: NDArray[np.float32]) -> PackedArray:
    *lead, rows, columns = x.shape
    row_blocks, column_blocks = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = np.zeros((*lead, row_blocks * FP8_BLOCK, column_blocks * FP8_BLOCK), np.float32)
    padded[..., :rows, :columns] = x
    blocks = padded.reshape(*lead, row_blocks, FP8_BLOCK, column_blocks, FP8_BLOCK)
    scale = np.maximum(np.abs(blocks).max(axis=(-3, -1)) / _LARGEST_FP8, 1e-12).astype(np.float32)
    codes = (blocks / scale[..., :, None, :, None]).reshape(padded.shape)[..., :rows, :columns]
    return PackedArray(codes.astype(ml_dtypes.float8_e4m3fn), scale, None, "fp8", FP8_BLOCK)


def quantize(x: NDArray[Any], mode: str) -> PackedArray:
    """Quantise a weight `[..., O, D]` of any float dtype.

    Args:
        x: the weight; D must be a multiple of 32, except for fp8.
        mode: one of `MODES`: "int4" and "iq4nl" give codes4, "int8" gives codes8, "fp8" gives fp8.
    """
    weight = np.ascontiguousarray(x, np.float32)
    if mode in TABLES:
        return _quantize_codes4(weight, TABLES[mode])
    return _quantize_codes8(weight) if mode == "int8" else _quantize_fp8(weight)
