"""The block formats of GGUF, repacked exactly: file bytes -> `PackedArray`.

The values are those of ggml's dequantiser. Layouts: ggml-common.h of llama.cpp, whose field names `d`, `dmin`, `qs`,
`qh` and `scales` the functions below use. All numbers are little-endian; a row is a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.code_tables import DOUBLED_E2M1_TABLE, INT4_TABLE, IQ4_NL_TABLE, UINT4_TABLE
from checkpoints.packed_array import PackedArray, from_indices, pack4

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class BlockType:
    """A tensor type of GGUF: blocks of `elements_per_block` elements in `bytes_per_block` bytes.

    Attributes:
        name: ggml's name.
        dtype: the numpy type of a type without blocks, else None.
        repack: blocks `[..., N, bytes_per_block]` -> the weight `[..., N * elements_per_block]`; None if there is a
            `dtype`.
        codebook: the class of `gguf.quants` whose grid the type needs (`checkpoints/gguf/codebooks.py`), or None.
    """

    name: str
    elements_per_block: int
    bytes_per_block: int
    dtype: np.dtype[Any] | None = None
    repack: Callable[[Bytes], PackedArray] | None = None
    codebook: str | None = None


def as_float16(raw: Bytes) -> NDArray[Any]:
    """View bytes `[..., 2 n]` as float16 `[..., n]`."""
    return np.ascontiguousarray(raw).view("<f2")


def merge_blocks(blocks: NDArray[Any]) -> NDArray[Any]:
    """Merge the block axis with the axis inside a block: `[..., N, n]` -> `[..., N * n]`."""
    return np.ascontiguousarray(blocks).reshape(*blocks.shape[:-2], -1)


def _repack_q8_0(raw: Bytes) -> PackedArray:
    d, qs = as_float16(raw[..., :2]), raw[..., 2:].view(np.int8)
    return PackedArray(merge_blocks(qs), merge_blocks(d), None, "codes8", 32)


def _repack_nibbles(table: tuple[int, ...]) -> Callable[[Bytes], PackedArray]:
    """Return the repacker of Q4_0 and IQ4_NL, whose bytes are already in the order of `pack4`."""

    def repack(raw: Bytes) -> PackedArray:
        d, qs = as_float16(raw[..., :2]), raw[..., 2:]
        return PackedArray(merge_blocks(qs), merge_blocks(d), None, "codes4", 32, table)

    return repack


def _repack_q4_1(raw: Bytes) -> PackedArray:
    d, m, qs = as_float16(raw[..., :2]), as_float16(raw[..., 2:4]), raw[..., 4:]
    return PackedArray(merge_blocks(qs), merge_blocks(d), merge_blocks(m), "codes4", 32, UINT4_TABLE)


def _unpack_5bit(raw: Bytes) -> NDArray[np.uint8]:
    """Unpack the codes 0...31 of Q5_0 and Q5_1, `[..., N * 32]`.

    A block has 4 bytes of fifth bits and 16 bytes of nibbles, all low nibbles before the high ones.
    """
    qh = np.unpackbits(raw[..., :4], axis=-1, bitorder="little")
    qs = np.concatenate([raw[..., 4:] & 15, raw[..., 4:] >> 4], axis=-1)
    return merge_blocks(qs | qh << 4)


def _repack_q5_0(raw: Bytes) -> PackedArray:
    d = merge_blocks(as_float16(raw[..., :2]))
    return from_indices(_unpack_5bit(raw[..., 2:]), "codes5", -16, scale=d, offset=None, group=32)


def _repack_q5_1(raw: Bytes) -> PackedArray:
    d, m = merge_blocks(as_float16(raw[..., :2])), merge_blocks(as_float16(raw[..., 2:4]))
    return from_indices(_unpack_5bit(raw[..., 4:]), "codes5", 0, scale=d, offset=m, group=32)


def _repack_iq4_xs(raw: Bytes) -> PackedArray:
    d, qs = merge_blocks(as_float16(raw[..., :2])), merge_blocks(raw[..., 8:])
    scales_h = np.ascontiguousarray(raw[..., 2:4]).view("<u2").astype(np.int32)
    sub_block = np.arange(8)
    scales_l = (raw[..., 4:8][..., sub_block // 2] >> (4 * (sub_block % 2)).astype(np.uint8)) & 15
    scales = scales_l.astype(np.int32) + 16 * ((scales_h >> 2 * sub_block) & 3) - 32
    return PackedArray(qs, merge_blocks(scales.astype(np.int8)), None, "codes4", 32, IQ4_NL_TABLE, super_scale=d)


def _k_scales(raw: Bytes) -> dict[str, Any]:
    """Return scales and offsets of Q4_K and Q5_K as fields of `PackedArray`.

    The eight sub-blocks of a block have six-bit scales and minima, times `d` and `dmin`. The minimum is subtracted.
    """
    d, dmin = merge_blocks(as_float16(raw[..., :2])), merge_blocks(as_float16(raw[..., 2:4]))
    first, second, third = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return {
        "scale": merge_blocks(scales.astype(np.int8)),
        "offset": merge_blocks(mins.astype(np.int8)),
        "group": 32,
        "super_scale": d,
        "super_offset": -dmin,
    }


def _unpack_nibble_runs(qs: Bytes) -> Bytes:
    """128 bytes -> 256 nibbles: every 32 bytes hold two runs of 32 elements, low nibbles first."""
    runs = qs.reshape(*qs.shape[:-1], 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(*qs.shape[:-1], 256)


def _unpack_2bit_runs(qs: Bytes) -> Bytes:
    """64 bytes -> 256 two-bit codes: every 32 bytes hold four runs of 32 elements, lowest bits first."""
    runs: Bytes = qs.reshape(*qs.shape[:-1], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (runs & np.uint8(3)).reshape(*qs.shape[:-1], 256)


def _unpack_1bit_runs(qh: Bytes) -> Bytes:
    """32 bytes -> 256 bits: bit n of all bytes is run n of 32 elements."""
    runs: Bytes = qh[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]
    return (runs & np.uint8(1)).reshape(*qh.shape[:-1], 256)


def _repack_q2_k(raw: Bytes) -> PackedArray:
    scales, d, dmin = raw[..., :16], as_float16(raw[..., 80:82]), as_float16(raw[..., 82:84])
    return from_indices(
        merge_blocks(_unpack_2bit_runs(raw[..., 16:80])),
        "codes4",
        0,
        scale=merge_blocks((scales & 15).view(np.int8)),
        offset=merge_blocks((scales >> 4).view(np.int8)),
        group=16,
        super_scale=merge_blocks(d),
        super_offset=merge_blocks(-dmin),
    )


def _repack_q3_k(raw: Bytes) -> PackedArray:
    # ggml subtracts 4 from a code if its high bit is 0. Here 4 is added to a code whose high bit is 1; then the
    # codes 4...11 stand for -4...3, in a table that begins with -8.
    codes = _unpack_2bit_runs(raw[..., 32:96]) + 4 * _unpack_1bit_runs(raw[..., :32]) + 4
    low, high = raw[..., 96:104], raw[..., 104:108]
    low = np.concatenate([low & 15, low >> 4], axis=-1)
    high = np.concatenate([(high >> n) & 3 for n in (0, 2, 4, 6)], axis=-1)
    scales, d = (low | high << 4).astype(np.int8) - np.int8(32), as_float16(raw[..., 108:110])
    return from_indices(
        merge_blocks(codes),
        "codes4",
        -8,
        scale=merge_blocks(scales),
        offset=None,
        group=16,
        super_scale=merge_blocks(d),
    )


def _repack_mxfp4(raw: Bytes) -> PackedArray:
    """Repack MXFP4: E2M1 codes and an E8M0 scale e, which is 2**(e - 127).

    The table holds doubled values, hence half the scale, 2**(e - 128), in bfloat16: its bits are (e - 1) << 7, and
    for e < 2 those of a subnormal number.
    """
    e = raw[..., :1].astype(np.uint16)
    half_scale_bits = np.where(e < 2, np.uint16(0x20) << e, e - np.uint16(1) << np.uint16(7)).astype(np.uint16)
    scale = merge_blocks(half_scale_bits).view(ml_dtypes.bfloat16)
    return PackedArray(merge_blocks(raw[..., 1:]), scale, None, "codes4", 32, DOUBLED_E2M1_TABLE)


def _half_e4m3_values() -> NDArray[np.float16]:
    """Return half the value of every E4M3 scale byte as ggml decodes it: without a sign, and 0x7F, its NaN, as zero."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[0x7F] = 0
    return (values / 2).astype(np.float16)


_HALF_E4M3 = _half_e4m3_values()


def _repack_nvfp4(raw: Bytes) -> PackedArray:
    """Repack NVFP4: four E4M3 scales, then for each of them eight bytes of E2M1 codes, low nibbles before high ones.

    The table holds doubled values, hence half the scales.
    """
    qs = raw[..., 4:].reshape(*raw.shape[:-1], 4, 8)
    codes = np.concatenate([qs & 15, qs >> 4], axis=-1).reshape(*raw.shape[:-1], 64)
    scale = merge_blocks(_HALF_E4M3[raw[..., :4]])
    return PackedArray(pack4(merge_blocks(codes)), scale, None, "codes4", 16, DOUBLED_E2M1_TABLE)


def _repack_q4_k(raw: Bytes) -> PackedArray:
    return from_indices(merge_blocks(_unpack_nibble_runs(raw[..., 16:])), "codes4", 0, **_k_scales(raw))


def _repack_q5_k(raw: Bytes) -> PackedArray:
    codes = _unpack_nibble_runs(raw[..., 48:]) | _unpack_1bit_runs(raw[..., 16:48]) << 4
    return from_indices(merge_blocks(codes), "codes5", 0, **_k_scales(raw))


def _repack_q6_k(raw: Bytes) -> PackedArray:
    ql = raw[..., :128].reshape(*raw.shape[:-1], 2, 1, 64)
    ql = np.concatenate([ql & 15, ql >> 4], axis=-2).reshape(*raw.shape[:-1], 2, 4, 32)
    qh = raw[..., 128:192].reshape(*raw.shape[:-1], 2, 1, 32)
    qh = (qh >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & np.uint8(3)
    codes = merge_blocks((ql | qh << 4).reshape(*raw.shape[:-1], 256))
    scales, d = merge_blocks(raw[..., 192:208].view(np.int8)), merge_blocks(as_float16(raw[..., 208:210]))
    return from_indices(codes, "codes6", -32, scale=scales, offset=None, group=16, super_scale=d)


# By type number: `enum ggml_type` in ggml.h.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, np.dtype("<f4")),
    1: BlockType("F16", 1, 2, np.dtype("<f2")),
    30: BlockType("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    8: BlockType("Q8_0", 32, 34, repack=_repack_q8_0),
    2: BlockType("Q4_0", 32, 18, repack=_repack_nibbles(INT4_TABLE)),
    3: BlockType("Q4_1", 32, 20, repack=_repack_q4_1),
    6: BlockType("Q5_0", 32, 22, repack=_repack_q5_0),
    7: BlockType("Q5_1", 32, 24, repack=_repack_q5_1),
    20: BlockType("IQ4_NL", 32, 18, repack=_repack_nibbles(IQ4_NL_TABLE)),
    23: BlockType("IQ4_XS", 256, 136, repack=_repack_iq4_xs),
    39: BlockType("MXFP4", 32, 17, repack=_repack_mxfp4),
    40: BlockType("NVFP4", 64, 36, repack=_repack_nvfp4),
    10: BlockType("Q2_K", 256, 84, repack=_repack_q2_k),
    11: BlockType("Q3_K", 256, 110, repack=_repack_q3_k),
    12: BlockType("Q4_K", 256, 144, repack=_repack_q4_k),
    13: BlockType("Q5_K", 256, 176, repack=_repack_q5_k),
    14: BlockType("Q6_K", 256, 210, repack=_repack_q6_k),
}


def repack_rows(block_type: BlockType, raw: Bytes) -> PackedArray:
    """Repack file bytes `[R, bytes of a row]` of a quantised type exactly, as a weight `[R, D]`."""
    assert block_type.repack is not None
    return block_type.repack(raw.reshape(raw.shape[0], -1, block_type.bytes_per_block))


def dequantize_rows(block_type: BlockType, raw: Bytes) -> NDArray[Any]:
    """Return the values `[R, D]` of file bytes `[R, bytes of a row]`: float32, or the plain type of the file."""
    if block_type.dtype is not None:
        return np.ascontiguousarray(raw).view(block_type.dtype)
    return repack_rows(block_type, raw).dequantize()
