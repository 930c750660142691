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

from checkpoints.packed_array import PackedArray, indexed

Bytes = NDArray[np.uint8]
IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
SIGNED4_TABLE = tuple(range(-8, 8))
PLAIN4_TABLE = tuple(range(16))
E2M1_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of a 4-bit float


@dataclass(frozen=True)
class BlockType:
    """One tensor type: `elements` in `size` bytes; `dtype` if it is plain, else `repack` of blocks `[..., N, size]`.

    `points`: the list of points that it needs (see `gguf_points`).
    """

    name: str
    elements: int
    size: int
    dtype: np.dtype[Any] | None = None
    repack: Callable[[Bytes], PackedArray] | None = None
    points: str | None = None


def half(raw: Bytes) -> NDArray[Any]:
    """float16 values of bytes `[..., 2 n]`."""
    return np.ascontiguousarray(raw).view("<f2")


def joined(parts: NDArray[Any]) -> NDArray[Any]:
    """`[..., N, per block]` -> `[..., N * per block]`."""
    return np.ascontiguousarray(parts).reshape(*parts.shape[:-2], -1)


def _q8_0(raw: Bytes) -> PackedArray:
    return PackedArray(joined(raw[..., 2:].view(np.int8)), joined(half(raw[..., :2])), None, "codes8", 32)


def _nibbles(table: tuple[int, ...]) -> Callable[[Bytes], PackedArray]:
    """Q4_0 and IQ4_NL: the bytes of the file are the codes."""
    return lambda raw: PackedArray(joined(raw[..., 2:]), joined(half(raw[..., :2])), None, "codes4", 32, table)


def _q4_1(raw: Bytes) -> PackedArray:
    return PackedArray(
        joined(raw[..., 4:]), joined(half(raw[..., :2])), joined(half(raw[..., 2:4])), "codes4", 32, PLAIN4_TABLE
    )


def _five_bits(raw: Bytes) -> NDArray[np.uint8]:
    """4 bytes of fifth bits, one an element, and 16 of nibbles, the low ones first: codes 0...31, `[..., N * 32]`."""
    fifth = np.unpackbits(raw[..., :4], axis=-1, bitorder="little")
    return joined(np.concatenate([raw[..., 4:] & 15, raw[..., 4:] >> 4], axis=-1) | fifth << 4)


def _q5_0(raw: Bytes) -> PackedArray:
    return indexed(_five_bits(raw[..., 2:]), "codes5", -16, scale=joined(half(raw[..., :2])), offset=None, group=32)


def _q5_1(raw: Bytes) -> PackedArray:
    scale, offset = joined(half(raw[..., :2])), joined(half(raw[..., 2:4]))
    return indexed(_five_bits(raw[..., 4:]), "codes5", 0, scale=scale, offset=offset, group=32)


def _iq4_xs(raw: Bytes) -> PackedArray:
    high = np.ascontiguousarray(raw[..., 2:4]).view("<u2").astype(np.int32)
    b = np.arange(8)
    low = (raw[..., 4:8][..., b // 2] >> (4 * (b % 2)).astype(np.uint8)) & 15
    s = low.astype(np.int32) + 16 * ((high >> 2 * b) & 3) - 32
    d = joined(half(raw[..., :2]))
    return PackedArray(joined(raw[..., 8:]), joined(s.astype(np.int8)), None, "codes4", 32, IQ4_TABLE, super_scale=d)


def _k_scales(raw: Bytes) -> dict[str, Any]:
    """Scales of the eight sub-blocks of Q4_K and Q5_K, and what is subtracted: six bits each, times a number a block."""
    sc = raw[..., 4:16]
    first, mid, last = sc[..., 0:4], sc[..., 4:8], sc[..., 8:12]
    s = np.concatenate([first & 63, (last & 15) | (first >> 6) << 4], axis=-1)
    m = np.concatenate([mid & 63, (last >> 4) | (mid >> 6) << 4], axis=-1)
    d, dmin = joined(half(raw[..., :2])), joined(half(raw[..., 2:4]))
    scales = {"scale": joined(s.astype(np.int8)), "offset": joined(m.astype(np.int8)), "group": 32}
    return scales | {"super_scale": d, "super_offset": -dmin}


def _pairs(qs: Bytes) -> Bytes:
    """128 bytes -> 256 nibbles: each 32 bytes hold two runs of 32, low nibbles first."""
    runs = qs.reshape(*qs.shape[:-1], 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(*qs.shape[:-1], 256)


def _quarters(qs: Bytes) -> Bytes:
    """64 bytes -> 256 pairs of bits: each 32 bytes hold four runs of 32, the lowest bits first."""
    runs: Bytes = qs.reshape(*qs.shape[:-1], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (runs & np.uint8(3)).reshape(*qs.shape[:-1], 256)


def _q2_k(raw: Bytes) -> PackedArray:
    both, d, dmin = raw[..., :16], half(raw[..., 80:82]), half(raw[..., 82:84])
    scales = {"scale": joined((both & 15).view(np.int8)), "offset": joined((both >> 4).view(np.int8)), "group": 16}
    scales |= {"super_scale": joined(d), "super_offset": joined(-dmin)}
    return indexed(joined(_quarters(raw[..., 16:80])), "codes4", 0, **scales)


def _q3_k(raw: Bytes) -> PackedArray:
    high = ((raw[..., None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1).reshape(*raw.shape[:-1], 256)
    q = _quarters(raw[..., 32:96]) + 4 * high + 4  # the third bit is that of q + 4
    low, top = raw[..., 96:104], raw[..., 104:108]
    low = np.concatenate([low & 15, low >> 4], axis=-1)
    top = np.concatenate([(top >> n) & 3 for n in (0, 2, 4, 6)], axis=-1)
    scale, d = (low | top << 4).astype(np.int8) - np.int8(32), half(raw[..., 108:110])
    return indexed(joined(q), "codes4", -8, scale=joined(scale), offset=None, group=16, super_scale=joined(d))


def _mxfp4(raw: Bytes) -> PackedArray:
    """Twice the values of a 4-bit float, times half a power of two, which a bfloat16 holds."""
    e = raw[..., :1].astype(np.uint16)
    half_power = np.where(e < 2, np.uint16(0x20) << e, e - np.uint16(1) << np.uint16(7)).astype(np.uint16)
    scale = joined(half_power).view(ml_dtypes.bfloat16)
    return PackedArray(joined(raw[..., 1:]), scale, None, "codes4", 32, E2M1_TABLE)


def _q4_k(raw: Bytes) -> PackedArray:
    return indexed(joined(_pairs(raw[..., 16:])), "codes4", 0, **_k_scales(raw))


def _q5_k(raw: Bytes) -> PackedArray:
    fifth = (raw[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return indexed(
        joined(_pairs(raw[..., 48:]) | fifth.reshape(*raw.shape[:-1], 256) << 4), "codes5", 0, **_k_scales(raw)
    )


def _q6_k(raw: Bytes) -> PackedArray:
    low = raw[..., :128].reshape(*raw.shape[:-1], 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*raw.shape[:-1], 2, 4, 32)
    high = raw[..., 128:192].reshape(*raw.shape[:-1], 2, 1, 32)
    q = low | ((high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3) << 4
    scale, d = joined(raw[..., 192:208].view(np.int8)), joined(half(raw[..., 208:210]))
    q = joined(q.reshape(*raw.shape[:-1], 256))
    return indexed(q, "codes6", -32, scale=scale, offset=None, group=16, super_scale=d)


BLOCKS: dict[int, BlockType] = {
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
    39: BlockType("MXFP4", 32, 17, repack=_mxfp4),
    10: BlockType("Q2_K", 256, 84, repack=_q2_k),
    11: BlockType("Q3_K", 256, 110, repack=_q3_k),
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
