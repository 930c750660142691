"""Quantising a weight in numpy: four and eight bits with a scale for 32 elements, FP8 with one for 128 x 128."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.gguf.block_types import IQ4_TABLE, SIGNED4_TABLE
from checkpoints.packed_array import FP8_BLOCK, PackedArray, pack4

MODES = ("int4", "int8", "iq4nl", "fp8")
GROUP = 32
TABLES = {"int4": SIGNED4_TABLE, "iq4nl": IQ4_TABLE}
_ROWS = 1 << 16  # blocks of 32 at a time: the search holds a few arrays of that size
_LARGEST_FP8 = 448.0


def nearest_codes(blocks: NDArray[np.float32], table: tuple[int, ...]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Indices into `table` and scales for blocks `[N, 32]`: uint8 `[N, 32]`, float16 `[N, 1]`.

    Of several scales around the one that maps the largest magnitude to an end of the table, that with the least squared
    error after the best factor for its codes is kept, block by block.
    """
    values = np.asarray(table, np.float32)
    middles = (values[1:] + values[:-1]) / 2
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    best_d, best_error = np.zeros((len(blocks), 1), np.float32), np.full((len(blocks), 1), np.inf, np.float32)
    for end in np.concatenate([values[0] * np.linspace(0.83, 1.18, 10), values[-1] * np.linspace(0.83, 1.18, 9)]):
        d = largest / np.float32(end)
        t = values[np.searchsorted(middles, blocks / np.where(d == 0, 1, d))]
        d = np.sum(blocks * t, axis=1, keepdims=True) / np.maximum(np.sum(t * t, axis=1, keepdims=True), 1e-30)
        error = np.sum((blocks - d * t) ** 2, axis=1, keepdims=True)
        better = error < best_error
        best_d, best_error = np.where(better, d, best_d), np.where(better, error, best_error)
    half = best_d.astype(np.float16)
    wide = half.astype(np.float32)
    return np.searchsorted(middles, blocks / np.where(wide == 0, 1, wide)).astype(np.uint8), half


def _codes4(x: NDArray[np.float32], table: tuple[int, ...]) -> PackedArray:
    blocks = x.reshape(-1, GROUP)
    codes, scale = np.empty(blocks.shape, np.uint8), np.empty((len(blocks), 1), np.float16)
    for i in range(0, len(blocks), _ROWS):
        codes[i : i + _ROWS], scale[i : i + _ROWS] = nearest_codes(blocks[i : i + _ROWS], table)
    shape = (*x.shape[:-1], -1)
    return PackedArray(pack4(codes).reshape(shape), scale.reshape(shape), None, "codes4", GROUP, table)


def _codes8(x: NDArray[np.float32]) -> PackedArray:
    blocks = x.reshape(-1, GROUP)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    wide = scale.astype(np.float32)
    codes = np.clip(np.rint(blocks / np.where(wide == 0, 1, wide)), -127, 127).astype(np.int8)
    return PackedArray(codes.reshape(x.shape), scale.reshape(*x.shape[:-1], -1), None, "codes8", GROUP)


def _fp8(x: NDArray[np.float32]) -> PackedArray:
    *lead, rows, size = x.shape
    high, wide = -(-rows // FP8_BLOCK), -(-size // FP8_BLOCK)
    padded = np.zeros((*lead, high * FP8_BLOCK, wide * FP8_BLOCK), np.float32)
    padded[..., :rows, :size] = x
    blocks = padded.reshape(*lead, high, FP8_BLOCK, wide, FP8_BLOCK)
    scale = np.maximum(np.abs(blocks).max(axis=(-3, -1)) / _LARGEST_FP8, 1e-12).astype(np.float32)
    codes = (blocks / scale[..., :, None, :, None]).reshape(padded.shape)[..., :rows, :size]
    return PackedArray(codes.astype(ml_dtypes.float8_e4m3fn), scale, None, "fp8", FP8_BLOCK)


def quantize(x: NDArray[Any], mode: str) -> PackedArray:
    """A weight `[..., O, D]` packed in `mode`, one of `MODES`; D a multiple of 32, except for fp8."""
    wide = np.ascontiguousarray(x, np.float32)
    if mode in TABLES:
        return _codes4(wide, TABLES[mode])
    return _codes8(wide) if mode == "int8" else _fp8(wide)
