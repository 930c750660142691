"""Encoders of published quantised formats, written from the formats' descriptions; they share no code with the reader.

An encoder takes a float32 matrix `[O, D]` and returns its tensors by suffix, and the weight that the tensors stand for.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

GROUP = 32
BF16, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu
Encoded = tuple[dict[str, np.ndarray], np.ndarray]
Encoder = Callable[[np.ndarray], Encoded]
# The values of E2M1 by code (OCP Microscaling v1.0).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def pack_int32(q: np.ndarray, order: tuple[int, ...] = tuple(range(8)), bits: int = 4) -> np.ndarray:
    """Pack the last axis into full int32 words; field n of a word holds value `order[n]`."""
    num_fields = 32 // bits
    fields = q.reshape(*q.shape[:-1], -1, num_fields).astype(np.uint32)
    words = sum(fields[..., value] << np.uint32(bits * n) for n, value in enumerate(order[:num_fields]))
    return np.asarray(words, np.uint32).view(np.int32)


def quantize_ints(
    w: np.ndarray, symmetric: bool, bits: int = 4, group: int = GROUP, dtype: Any = np.float16
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return q `[O, D]`, scale and zero `[O, D / group]`, and `(q - zero) * scale` rounded once to float32.

    `group` 0: one group for each row.
    """
    blocks = w.reshape(len(w), -1, group or w.shape[1])
    q_max, midpoint = 2**bits - 1, 2 ** (bits - 1)
    low, high = np.minimum(blocks.min(-1), 0), blocks.max(-1)
    min_scale = np.abs(blocks).max(-1) / (midpoint - 0.5) if symmetric else 1e-6
    scale = np.maximum((high - low) / q_max, min_scale).astype(dtype)
    scale_float64 = scale.astype(np.float64)
    if symmetric:
        zero = np.full(scale.shape, float(midpoint))
    else:
        zero = np.clip(np.rint(-low / scale_float64), 0, q_max)
    q = np.clip(np.rint(blocks / scale_float64[..., None] + zero[..., None]), 0, q_max)
    value = ((q - zero[..., None]) * scale_float64[..., None]).reshape(w.shape)
    return q.reshape(w.shape).astype(np.uint8), scale, zero.astype(np.uint8), value.astype(np.float32)


def encode_gptq(w: np.ndarray, symmetric: bool = True, version: int = 1, bits: int = 4, group: int = GROUP) -> Encoded:
    q, scale, zero, value = quantize_ints(w, symmetric, bits, group)
    zeros = pack_int32(zero.T, bits=bits)
    if version == 1:  # one less in every field of a word; a field of zero borrows from the next one
        one = sum(1 << n for n in range(0, 32, bits))
        zeros = ((zeros.astype(np.int64) - one) % 2**32).astype(np.uint32).view(np.int32)
    tensors = {"qweight": pack_int32(q, bits=bits).T, "qzeros": zeros, "scales": scale.T}
    return tensors | {"g_idx": (np.arange(w.shape[1]) // (group or w.shape[1])).astype(np.int32)}, value


def encode_auto_round(w: np.ndarray, **options: Any) -> Encoded:
    """Encode as GPTQ without g_idx; `options` are those of `encode_gptq`."""
    tensors, value = encode_gptq(w, **options)
    del tensors["g_idx"]
    return tensors, value


def encode_awq(w: np.ndarray, group: int = GROUP) -> Encoded:
    q, scale, zero, value = quantize_ints(w, False, group=group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack_int32(q.T, order), "qzeros": pack_int32(zero.T, order), "scales": scale.T}, value


def encode_pack_quantized(
    w: np.ndarray, symmetric: bool = True, bits: int = 4, group: int = GROUP, dtype: Any = np.float16
) -> Encoded:
    q, scale, zero, value = quantize_ints(w, symmetric, bits, group, dtype)
    tensors = {
        "weight_packed": pack_int32(q, bits=bits),
        "weight_scale": scale,
        "weight_shape": np.array(w.shape, np.int64),
    }
    return tensors | ({} if symmetric else {"weight_zero_point": pack_int32(zero.T, bits=bits).T}), value


def encode_int8(w: np.ndarray, symmetric: bool = True, dtype: Any = BF16) -> Encoded:
    """Encode as unpacked bytes with a scale for each row."""
    q, scale, zero, value = quantize_ints(w, symmetric, 8, 0, dtype)
    tensors = {"weight": (q.astype(np.int16) - 128).astype(np.int8), "weight_scale": scale}
    return tensors | ({} if symmetric else {"weight_zero_point": (zero.astype(np.int16) - 128).astype(np.int8)}), value


def encode_int8_scale_vector(w: np.ndarray) -> Encoded:
    """Encode as int8 with scales of one axis."""
    tensors, value = encode_int8(w, dtype=np.float32)
    return tensors | {"weight_scale": tensors["weight_scale"].reshape(-1)}, value


def encode_fp8(
    w: np.ndarray, rows: int = 128, columns: int = 128, scale_suffix: str = "weight_scale", dtype: Any = BF16
) -> Encoded:
    """Encode with a scale for each `rows` x `columns`; 0 means all. Scales of float8_e8m0fnu are stored as uint8."""
    rows, columns = rows or w.shape[0], columns or w.shape[1]
    grid = -(-w.shape[0] // rows), -(-w.shape[1] // columns)
    scale = np.empty(grid, dtype)
    codes, value = np.empty(w.shape, ml_dtypes.float8_e4m3fn), np.empty(w.shape, np.float32)
    for i, j in np.ndindex(grid):
        block = np.s_[rows * i : rows * i + rows, columns * j : columns * j + columns]
        scale[i, j] = max(np.abs(w[block]).max(), 1e-6) / 300
        codes[block] = np.clip(w[block] / np.float32(scale[i, j]), -448, 448).astype(codes.dtype)
        value[block] = codes[block].astype(np.float32) * np.float32(scale[i, j])
    return {"weight": codes, scale_suffix: scale.view(np.uint8) if dtype == E8M0 else scale}, value


def encode_fp8_one_scale(w: np.ndarray) -> Encoded:
    """Encode as FP8 with one scale for the weight, and a scale of activations."""
    tensors, value = encode_fp8(w, 0, 0, dtype=np.float32)
    input_scale = np.array(np.float32(1))
    return tensors | {"weight_scale": tensors["weight_scale"].reshape(()), "input_scale": input_scale}, value


def encode_fp8_four_axes(w: np.ndarray) -> Encoded:
    """Encode as FP8 with scales `[blocks, 1, blocks, 1]`."""
    tensors, value = encode_fp8(w, dtype=np.float32)
    return tensors | {"weight_scale": tensors["weight_scale"][:, None, :, None]}, value


def encode_fp4(w: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of the E2M1 codes nearest to `w`, and their value, for float32 scales `[O, G]`."""
    blocks = w.reshape(*scale.shape, -1)
    q = np.abs(blocks[..., None] - E2M1 * scale[..., None, None]).argmin(-1).astype(np.uint8)
    codes = q.reshape(w.shape)
    return codes[:, ::2] | codes[:, 1::2] << 4, (E2M1[q] * scale[..., None]).reshape(w.shape)


def encode_nvfp4(w: np.ndarray, compressed_tensors: bool = False) -> Encoded:
    """Encode with a float8 scale for 16 elements and a factor for the weight.

    `compressed_tensors`: that library stores the reciprocal of the factor, and uses other names than modelopt.
    """
    factor = np.float32(np.abs(w).max() / (6 * 448))
    divisor = np.float32(1) / factor
    scale = (np.abs(w.reshape(len(w), -1, 16)).max(-1) / 6 / factor).astype(ml_dtypes.float8_e4m3fn)
    if compressed_tensors:
        codes, value = encode_fp4(w, scale.astype(np.float32) / divisor)
        return {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": divisor.reshape(1)}, value
    codes, value = encode_fp4(w, scale.astype(np.float32) * factor)
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": np.array(factor)}
    return tensors | {"input_scale": np.array(np.float32(1))}, value


def encode_mxfp4(w: np.ndarray) -> Encoded:
    scale = (np.abs(w.reshape(len(w), -1, 32)).max(-1) / 4).astype(E8M0)
    codes, value = encode_fp4(w, scale.astype(np.float32))
    return {"weight_packed": codes, "weight_scale": scale.view(np.uint8)}, value


def encode_by_shape(square: Encoder, other: Encoder, w: np.ndarray) -> Encoded:
    """Encode square matrices with one encoder, all others with another one."""
    return square(w) if w.shape[0] == w.shape[1] else other(w)
