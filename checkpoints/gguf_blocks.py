"""The block formats of GGUF, read exactly: file bytes -> `PackedArray`, whose values are those of ggml's dequantiser.

Layouts: ggml-common.h of llama.cpp. All little-endian; a row is a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.packed import PackedArray

Bytes = NDArray[np.uint8]
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
SIGNED4_TABLE = tuple(range(-8, 8))
PLAIN4_TABLE = tuple(range(16))


@dataclass(frozen=True)
class BlockType:
    """One tensor type: `elements` in `size` bytes; `dtype` if it is plain, else `repack` of blocks `[..., N, size]`."""

    name: str
    elements: int
    size: int
    dtype: np.dtype[Any] | None = None
    repack: Callable[[Bytes], PackedArray] | None = None


def _half(raw: Bytes) -> NDArray[Any]:
    """float16 values of bytes `[..., 2 n]`."""
    return np.ascontiguousarray(raw).view("<f2")


def _rows(parts: NDArray[Any]) -> NDArray[Any]:
    """`[..., N, per block]` -> `[..., N * per block]`."""
    return np.ascontiguousarray(parts).reshape(*parts.shape[:-2], -1)


def pack4(indices: NDArray[Any]) -> NDArray[np.uint8]:
    """Indices 0...15 `[..., D]` -> `[..., D/2]` in the nibble order of `PackedArray`."""
    halves = indices.reshape(*indices.shape[:-1], -1, 2, 16).astype(np.uint8)
    packed: NDArray[np.uint8] = (halves[..., 0, :] | halves[..., 1, :] << 4).astype(np.uint8)
    return packed.reshape(*indices.shape[:-1], -1)


def _q8_0(raw: Bytes) -> PackedArray:
    return PackedArray(_rows(raw[..., 2:].view(np.int8)), _rows(_half(raw[..., :2])), None, "codes8", 32)


def _nibbles(table: tuple[int, ...]) -> Callable[[Bytes], PackedArray]:
    """Q4_0 and IQ4_NL: the bytes of the file are the codes."""
    return lambda raw: PackedArray(_rows(raw[..., 2:]), _rows(_half(raw[..., :2])), None, "codes4", 32, table)


def _q4_1(raw: Bytes) -> PackedArray:
    return PackedArray(_rows(raw[..., 4:]), _rows(_half(raw[..., :2])), _rows(_half(raw[..., 2:4])), "codes4", 32, PLAIN4_TABLE)


def _five_bits(raw: Bytes) -> NDArray[np.int8]:
    """4 bytes of fifth bits, one an element, and 16 of nibbles, the low ones first: codes 0...31, `[..., N, 32]`."""
    fifth = np.unpackbits(raw[..., :4], axis=-1, bitorder="little")
    return (np.concatenate([raw[..., 4:] & 15, raw[..., 4:] >> 4], axis=-1) | fifth << 4).astype(np.int8)


def _q5_0(raw: Bytes) -> PackedArray:
    return PackedArray(_rows(_five_bits(raw[..., 2:]) - np.int8(16)), _rows(_half(raw[..., :2])), None, "codes8", 32)


def _q5_1(raw: Bytes) -> PackedArray:
    scale, offset = _rows(_half(raw[..., :2])), _rows(_half(raw[..., 2:4]))
    return PackedArray(_rows(_five_bits(raw[..., 4:])), scale, offset, "codes8", 32)


def _iq4_xs(raw: Bytes) -> PackedArray:
    d = _half(raw[..., :2]).astype(np.float32)
    high = np.ascontiguousarray(raw[..., 2:4]).view("<u2").astype(np.int32)
    b = np.arange(8)
    low = (raw[..., 4:8][..., b // 2] >> (4 * (b % 2)).astype(np.uint8)) & 15
    s = low.astype(np.int32) + 16 * ((high >> 2 * b) & 3)
    return PackedArray(_rows(raw[..., 8:]), _rows(d * (s - 32).astype(np.float32)), None, "codes4", 32, IQ4_TABLE)


def _scales_and_minima(raw: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the eight sub-blocks of Q4_K and Q5_K: scale and (negative) offset."""
    d, dmin = (_half(raw[..., i : i + 2]).astype(np.float32) for i in (0, 2))
    sc = raw[..., 4:16]
    first, mid, last = sc[..., 0:4], sc[..., 4:8], sc[..., 8:12]
    s = np.concatenate([first & 63, (last & 15) | (first >> 6) << 4], axis=-1)
    m = np.concatenate([mid & 63, (last >> 4) | (mid >> 6) << 4], axis=-1)
    return d * s.astype(np.float32), -(dmin * m.astype(np.float32))


def _pairs(qs: Bytes) -> Bytes:
    """128 bytes -> 256 nibbles: each 32 bytes hold two runs of 32, low nibbles first."""
    runs = qs.reshape(*qs.shape[:-1], 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(*qs.shape[:-1], 256)


def _q4_k(raw: Bytes) -> PackedArray:
    scale, offset = _scales_and_minima(raw)
    return PackedArray(pack4(_rows(_pairs(raw[..., 16:]))), _rows(scale), _rows(offset), "codes4", 32, PLAIN4_TABLE)


def _q5_k(raw: Bytes) -> PackedArray:
    scale, offset = _scales_and_minima(raw)
    fifth = (raw[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    q = _pairs(raw[..., 48:]) | fifth.reshape(*raw.shape[:-1], 256) << 4
    return PackedArray(_rows(q.astype(np.int8)), _rows(scale), _rows(offset), "codes8", 32)


def _q6_k(raw: Bytes) -> PackedArray:
    low = raw[..., :128].reshape(*raw.shape[:-1], 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*raw.shape[:-1], 2, 4, 32)
    high = raw[..., 128:192].reshape(*raw.shape[:-1], 2, 1, 32)
    two_bits = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    q = (low | two_bits << 4).astype(np.int8) - np.int8(32)
    d = _half(raw[..., 208:210]).astype(np.float32)
    scale = d * raw[..., 192:208].view(np.int8).astype(np.float32)
    return PackedArray(_rows(q.reshape(*raw.shape[:-1], 256)), _rows(scale), None, "codes8", 16)


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, np.dtype("<f4")),
    1: BlockType("F16", 1, 2, np.dtype("<f2")),
    30: BlockType("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    8: BlockType("Q8_0", 32, 34, repack=_q8_0),
    2: BlockType("Q4_0", 32, 18, repack=_nibbles(SIGNED4_TABLE)),
    3: BlockType("Q4_1", 32, 20, repack=_q4_1),
    6: BlockType("Q5_0", 32, 22, repack=_q5_0),
    7: BlockType("Q5_1", 32, 24, repack=_q5_1),
    20: BlockType("IQ4_NL", 32, 18, repack=_nibbles(IQ4_TABLE)),
    23: BlockType("IQ4_XS", 256, 136, repack=_iq4_xs),
    12: BlockType("Q4_K", 256, 144, repack=_q4_k),
    13: BlockType("Q5_K", 256, 176, repack=_q5_k),
    14: BlockType("Q6_K", 256, 210, repack=_q6_k),
}


def unpack_rows(kind: BlockType, raw: Bytes) -> NDArray[Any]:
    """File bytes `[R, bytes of a row]` -> values `[R, D]`: float32, or the plain type of the file."""
    if kind.dtype is not None:
        return np.ascontiguousarray(raw).view(kind.dtype)
    return repack_rows(kind, raw).dequantize()


def repack_rows(kind: BlockType, raw: Bytes) -> PackedArray:
    """File bytes `[R, bytes of a row]` of a quantised type, repacked exactly."""
    assert kind.repack is not None
    return kind.repack(raw.reshape(raw.shape[0], -1, kind.size))
