"""Encoders of published quantised formats, written from the formats' descriptions; they share nothing with the reader.

`FORMATS`: by name, a `quantization_config`, an encoder of a matrix, and the layouts that matrices are kept in (none: unpacked).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

GROUP = 32
Encoded = tuple[dict[str, np.ndarray], np.ndarray]  # tensors by suffix, and the weight that they stand for
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def packed_words(q: np.ndarray, order: tuple[int, ...] = tuple(range(8)), bits: int = 4) -> np.ndarray:
    """Values along the last axis to int32 words, as many as go in; field n holds value order[n]."""
    fields = 32 // bits
    parts = q.reshape(*q.shape[:-1], -1, fields).astype(np.uint32)
    words = sum(parts[..., value] << np.uint32(bits * n) for n, value in enumerate(order[:fields]))
    return np.asarray(words, np.uint32).view(np.int32)


def ints(
    w: np.ndarray, symmetric: bool, bits: int = 4, group: int = GROUP, dtype: Any = np.float16
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q `[O, D]`, scale and zero `[O, D / group]` (group 0: all of D), and `(q - zero) * scale` rounded once to float32."""
    blocks = w.reshape(len(w), -1, group or w.shape[1])
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = np.minimum(blocks.min(-1), 0), blocks.max(-1)
    scale = np.maximum((high - low) / top, np.abs(blocks).max(-1) / (middle - 0.5) if symmetric else 1e-6).astype(dtype)
    wide = scale.astype(np.float64)
    zero = np.full(scale.shape, float(middle)) if symmetric else np.clip(np.rint(-low / wide), 0, top)
    q = np.clip(np.rint(blocks / wide[..., None] + zero[..., None]), 0, top)
    value = ((q - zero[..., None]) * wide[..., None]).reshape(w.shape)
    return q.reshape(w.shape).astype(np.uint8), scale, zero.astype(np.uint8), value.astype(np.float32)


def gptq(w: np.ndarray, symmetric: bool = True, version: int = 1, bits: int = 4, group: int = GROUP) -> Encoded:
    q, scale, zero, value = ints(w, symmetric, bits, group)
    zeros = packed_words(zero.T, bits=bits)
    if version == 1:  # one less in every field of a word, borrowed from the next field where there is none
        one = sum(1 << n for n in range(0, 32, bits))
        zeros = ((zeros.astype(np.int64) - one) % 2**32).astype(np.uint32).view(np.int32)
    parts = {"qweight": packed_words(q, bits=bits).T, "qzeros": zeros, "scales": scale.T}
    return parts | {"g_idx": (np.arange(w.shape[1]) // (group or w.shape[1])).astype(np.int32)}, value


def auto_round(w: np.ndarray, **how: Any) -> Encoded:
    parts, value = gptq(w, **how)
    del parts["g_idx"]
    return parts, value


def awq(w: np.ndarray, group: int = GROUP) -> Encoded:
    q, scale, zero, value = ints(w, False, group=group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": packed_words(q.T, order), "qzeros": packed_words(zero.T, order), "scales": scale.T}, value


def compressed(
    w: np.ndarray, symmetric: bool = True, bits: int = 4, group: int = GROUP, dtype: Any = np.float16
) -> Encoded:
    q, scale, zero, value = ints(w, symmetric, bits, group, dtype)
    parts = {
        "weight_packed": packed_words(q, bits=bits),
        "weight_scale": scale,
        "weight_shape": np.array(w.shape, np.int64),
    }
    return parts | ({} if symmetric else {"weight_zero_point": packed_words(zero.T, bits=bits).T}), value


def int8(w: np.ndarray, symmetric: bool = True, dtype: Any = ml_dtypes.bfloat16) -> Encoded:
    """Bytes as they are, a scale for each row."""
    q, scale, zero, value = ints(w, symmetric, 8, 0, dtype)
    parts = {"weight": (q.astype(np.int16) - 128).astype(np.int8), "weight_scale": scale}
    return parts | ({} if symmetric else {"weight_zero_point": (zero.astype(np.int16) - 128).astype(np.int8)}), value


BF16, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu


def fp8(w: np.ndarray, rows: int = 128, columns: int = 128, name: str = "weight_scale", dtype: Any = BF16) -> Encoded:
    """A scale for each `rows` x `columns`; 0: all of them. float8_e8m0fnu scales are stored as bytes."""
    rows, columns = rows or w.shape[0], columns or w.shape[1]
    high, wide = -(-w.shape[0] // rows), -(-w.shape[1] // columns)
    scale = np.empty((high, wide), dtype)
    codes, value = np.empty(w.shape, ml_dtypes.float8_e4m3fn), np.empty(w.shape, np.float32)
    for i in range(high):
        for j in range(wide):
            at = np.s_[rows * i : rows * i + rows, columns * j : columns * j + columns]
            scale[i, j] = max(np.abs(w[at]).max(), 1e-6) / 300
            codes[at] = np.clip(w[at] / np.float32(scale[i, j]), -448, 448).astype(codes.dtype)
            value[at] = codes[at].astype(np.float32) * np.float32(scale[i, j])
    return {"weight": codes, name: scale.view(np.uint8) if dtype == E8M0 else scale}, value


def fp8_tensor(w: np.ndarray) -> Encoded:
    parts, value = fp8(w, 0, 0, dtype=np.float32)
    return parts | {"weight_scale": parts["weight_scale"].reshape(()), "input_scale": np.array(np.float32(1))}, value


def fp8_four_axes(w: np.ndarray) -> Encoded:
    parts, value = fp8(w, dtype=np.float32)
    return parts | {"weight_scale": parts["weight_scale"][:, None, :, None]}, value


def int8_one_axis(w: np.ndarray) -> Encoded:
    parts, value = int8(w, dtype=np.float32)
    return parts | {"weight_scale": parts["weight_scale"].reshape(-1)}, value


def fp4(w: np.ndarray, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of E2M1 codes nearest to w, and their value, with float32 scales `[O, G]`."""
    blocks = w.reshape(*wide.shape, -1)
    q = np.abs(blocks[..., None] - E2M1 * wide[..., None, None]).argmin(-1).astype(np.uint8)
    flat = q.reshape(w.shape)
    return flat[:, ::2] | flat[:, 1::2] << 4, (E2M1[q] * wide[..., None]).reshape(w.shape)


def nvfp4(w: np.ndarray, divided: bool = False) -> Encoded:
    """A float8 scale for 16 elements, times a factor for all; `divided`: by a divisor, under other names."""
    whole = np.float32(np.abs(w).max() / (6 * 448))
    divisor = np.float32(1) / whole
    scale = (np.abs(w.reshape(len(w), -1, 16)).max(-1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    pairs, value = fp4(w, scale.astype(np.float32) / divisor if divided else scale.astype(np.float32) * whole)
    if divided:
        return {"weight_packed": pairs, "weight_scale": scale, "weight_global_scale": divisor.reshape(1)}, value
    parts = {"weight": pairs, "weight_scale": scale, "weight_scale_2": np.array(whole)}
    return parts | {"input_scale": np.array(np.float32(1))}, value


def mxfp4(w: np.ndarray) -> Encoded:
    scale = (np.abs(w.reshape(len(w), -1, 32)).max(-1) / 4).astype(ml_dtypes.float8_e8m0fnu)
    pairs, value = fp4(w, scale.astype(np.float32))
    return {"weight_packed": pairs, "weight_scale": scale.view(np.uint8)}, value


def by_shape(square: Callable[[np.ndarray], Encoded], other: Callable[[np.ndarray], Encoded], w: np.ndarray) -> Encoded:
    """One format for square matrices, another one for the others."""
    return square(w) if w.shape[0] == w.shape[1] else other(w)


def config(kind: str, **weights: Any) -> dict[str, Any]:
    """A group of compressed-tensors that is of a format by itself."""
    known: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return {"format": kind, "targets": ["Linear"], "weights": known | weights}


def compressed_config(*groups: dict[str, Any]) -> dict[str, Any]:
    whole = groups[0]["format"] if len(groups) == 1 else "mixed-precision"
    return {
        "quant_method": "compressed-tensors",
        "format": whole,
        "config_groups": dict(zip("abc", groups, strict=False)),
    }


_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "checkpoint_format": "gptq"}
_ROUND = {"quant_method": "auto-round", "bits": 4, "data_type": "int"}
_PACK, _CHANNEL = "pack-quantized", {"strategy": "channel", "group_size": None}
_FLOAT8 = {"num_bits": 8, "type": "float", "group_size": None}
_NVFP4 = config("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
_MIXED = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}}

FORMATS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Encoded], str]] = {
    "fp8": (_FP8, partial(fp8, name="weight_scale_inv"), "fp8"),
    "fp8, powers of two": (_FP8, partial(fp8, name="weight_scale_inv", dtype=E8M0), "fp8"),
    "gptq": (_GPTQ, gptq, "codes4"),
    "gptq v1, zeros": (_GPTQ | {"sym": False}, partial(gptq, symmetric=False), "codes4"),
    "gptq v2, zeros": (_GPTQ | {"checkpoint_format": "gptq_v2"}, partial(gptq, symmetric=False, version=2), "codes4"),
    "gptq, rows": (_GPTQ | {"group_size": -1, "desc_act": True}, partial(gptq, symmetric=False, group=0), "codes4"),
    "gptq, groups of three times 64": (_GPTQ, lambda w: gptq(w, group=192 if w.shape[1] == 384 else 32), "codes4"),
    "gptq, 8 bits": (_GPTQ | {"bits": 8}, partial(gptq, bits=8), "codes8"),
    "gptq v1, 8 bits, zeros": (_GPTQ | {"bits": 8}, partial(gptq, bits=8, symmetric=False, group=0), "codes8"),
    "gptq, some 8 bits": (
        _GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, partial(by_shape, gptq, partial(gptq, bits=8)), "codes4 codes8"
    ),
    "auto-round": (_ROUND | {"packing_format": "auto_round:auto_gptq"}, auto_round, "codes4"),
    "auto-round, zeros": (
        _ROUND | {"packing_format": "auto_round:exllamav2"}, partial(auto_round, symmetric=False, version=2), "codes4"
    ),
    "auto-round, awq": (_ROUND | {"packing_format": "auto_round:auto_awq"}, awq, "codes4"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq, "codes4"),
    "compressed-tensors": (compressed_config(config(_PACK)), compressed, "codes4"),
    "compressed-tensors, zeros": (
        compressed_config(config(_PACK, symmetric=False)), partial(compressed, symmetric=False), "codes4"
    ),
    "compressed-tensors, rows": (
        compressed_config(config(_PACK, symmetric=False, **_CHANNEL)),
        partial(compressed, symmetric=False, group=0, dtype=ml_dtypes.bfloat16), "codes4",
    ),
    "compressed-tensors, zeros, float32": (
        compressed_config(config(_PACK, symmetric=False)), partial(compressed, symmetric=False, dtype=np.float32), "codes5"
    ),
    "compressed-tensors, 8 bits": (
        compressed_config(config(_PACK, num_bits=8, symmetric=False)), partial(compressed, bits=8, symmetric=False), "codes8"
    ),
    "compressed-tensors, 8 bits, zeros, float32": (
        compressed_config(config(_PACK, num_bits=8, symmetric=False)),
        partial(compressed, bits=8, symmetric=False, dtype=np.float32), "",
    ),
    "compressed-tensors, with and without zeros": (
        compressed_config(config(_PACK), config(_PACK, symmetric=False)),
        partial(by_shape, compressed, partial(compressed, symmetric=False)), "codes4",
    ),
    "int8": (compressed_config(config("int-quantized", num_bits=8, **_CHANNEL)), int8, "codes8"),
    "int8, zeros": (
        compressed_config(config("naive-quantized", num_bits=8, symmetric=False, **_CHANNEL)),
        partial(int8, symmetric=False), "codes8",
    ),
    "float8 blocks": (
        compressed_config(config("float-quantized", **_FLOAT8, strategy="block", block_structure=[128, 128])), fp8, "fp8"
    ),
    "float8": (compressed_config(config("naive-quantized", **_FLOAT8, strategy="tensor")), fp8_tensor, "fp8"),
    "float8 rows": (
        compressed_config(config("float-quantized", **_FLOAT8, strategy="channel")), partial(fp8, rows=1, columns=0), ""
    ),
    "mxfp8": (compressed_config(config("mxfp8-quantized", **_FLOAT8)), partial(fp8, rows=1, columns=32, dtype=E8M0), ""),
    "mxfp4": (compressed_config(config("mxfp4-pack-quantized", type="float")), mxfp4, "codes4"),
    "nvfp4, divided": (compressed_config(_NVFP4), partial(nvfp4, divided=True), "codes4"),
    "nvfp4 and float8": (
        compressed_config(config("float-quantized", **_FLOAT8, strategy="tensor"), _NVFP4),
        partial(by_shape, partial(nvfp4, divided=True), fp8_tensor), "codes4 fp8",
    ),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4, "codes4"),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor, "fp8"),
    "modelopt fp8 blocks": ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, fp8_four_axes, "fp8"),
    "modelopt int8": ({"quant_method": "modelopt", "quant_algo": "W8A16"}, int8_one_axis, "codes8"),
    "modelopt mixed": (
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": _MIXED},
        partial(by_shape, nvfp4, fp8_tensor), "codes4 fp8",
    ),
}  # fmt: skip
