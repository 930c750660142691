"""How published checkpoints hold quantised matrices: which tensors stand for one weight, and how they become a `PackedArray`.

Each `Format` takes the tensors of one weight `[O, D]` apart: block FP8 (Qwen's own), GPTQ, AWQ, compressed-tensors and NVFP4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.gguf_blocks import E2M1_TABLE, SIGNED4_TABLE
from checkpoints.packed import FP8_BLOCK, PackedArray, pack4

GROUPS = (16, 32, 64, 128)
_AWQ_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where element i of eight lies among the nibbles of an AWQ word
_ZERO = 8  # of symmetric four bits

Arrays = Mapping[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]


class Unsupported(ValueError):
    """Says which setting or tensor is not understood."""


@dataclass(frozen=True)
class Format:
    """One way to hold a weight: its tensors are named `WEIGHT` with ".weight" replaced by one of `parts`.

    Attributes:
        parts: needed suffixes; the first one tells that a matrix is held so, if it has that dtype (safetensors' name).
        optional: suffixes that may be there and are read.
        ignored: suffixes of tensors that the weight does not need (scales of activations).
        shape: `[O, D]` from the shapes of the parts.
        decode: the weight from the parts.
    """

    parts: tuple[str, ...]
    dtype: str
    optional: tuple[str, ...]
    ignored: tuple[str, ...]
    shape: Callable[[Shapes], tuple[int, int]]
    decode: Callable[[Arrays], PackedArray]


def nibbles(words: NDArray[Any]) -> NDArray[np.uint8]:
    """Eight four-bit values a 32-bit word, the lowest first: `[..., n]` -> `[..., 8 n]`."""
    parts = (words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    return parts.astype(np.uint8).reshape(*words.shape[:-1], -1)


def four_bits(q: NDArray[np.uint8], scale: NDArray[Any], zero: NDArray[Any] | None) -> PackedArray:
    """`(q - zero) * scale` with q `[O, D]` and a scale and zero (None: 8) for each group, `[O, D / group]`; exactly.

    Products of a float16 or bfloat16 scale and a four-bit number are exact in float32, and so is the sum of two of them.
    """
    group = q.shape[-1] // scale.shape[-1]
    codes = pack4(q)
    if zero is None or (zero == _ZERO).all():
        kept = scale if scale.dtype == np.float16 else scale.astype(np.float32)
        return PackedArray(codes, np.ascontiguousarray(kept), None, "codes4", group, SIGNED4_TABLE)
    wide = np.ascontiguousarray(scale, np.float32)
    return PackedArray(codes, wide, -wide * zero.astype(np.float32), "codes4", group, tuple(range(16)))


def _fp8(arrays: Arrays) -> PackedArray:
    scale = arrays["weight_scale_inv"].astype(np.float32)  # a factor, whatever its name says
    return PackedArray(arrays["weight"], scale, None, "fp8", FP8_BLOCK)


def _gptq(first_zero: int) -> Callable[[Arrays], PackedArray]:
    """`first_zero`: what is added to stored zeros: 1 in version 1 of the format, 0 in version 2."""

    def decode(arrays: Arrays) -> PackedArray:
        q = nibbles(np.ascontiguousarray(arrays["qweight"].T))
        scale = arrays["scales"].T
        group = q.shape[-1] // scale.shape[-1]
        order = arrays.get("g_idx")
        if order is not None and (order != np.arange(q.shape[-1]) // group).any():
            raise Unsupported("'g_idx' reorders columns (desc_act), which is not supported yet")
        return four_bits(q, scale, nibbles(arrays["qzeros"]).T + first_zero)

    return decode


def _awq(arrays: Arrays) -> PackedArray:
    def ordered(words: NDArray[Any]) -> NDArray[np.uint8]:
        return nibbles(words).reshape(len(words), -1, 8)[..., _AWQ_ORDER].reshape(len(words), -1)

    return four_bits(np.ascontiguousarray(ordered(arrays["qweight"]).T), arrays["scales"].T, ordered(arrays["qzeros"]).T)


def _compressed(arrays: Arrays) -> PackedArray:
    return four_bits(nibbles(arrays["weight_packed"]), arrays["weight_scale"], None)


def _nvfp4(arrays: Arrays) -> PackedArray:
    pairs = arrays["weight"]
    q = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)
    scale = arrays["weight_scale"].astype(np.float32) * np.float32(arrays["weight_scale_2"].reshape(())) * np.float32(0.5)
    return PackedArray(pack4(q), scale, None, "codes4", q.shape[-1] // scale.shape[-1], E2M1_TABLE)


def _by_columns(part: str) -> Callable[[Shapes], tuple[int, int]]:
    return lambda shapes: (shapes[part][0], 8 * shapes[part][1])


def _transposed(shapes: Shapes) -> tuple[int, int]:
    rows, groups = shapes["qweight"], shapes["scales"]
    return groups[1], rows[0] * (8 if rows[1] == groups[1] else 1)


_ACTIVATIONS = ("input_scale", "k_scale", "v_scale")


def _expect(settings: Mapping[str, Any], **wanted: tuple[Any, ...]) -> None:
    for key, values in wanted.items():
        if settings.get(key) not in values:
            expected = " or ".join(repr(v) for v in values)
            raise Unsupported(f"{key} is {settings.get(key)!r}, expected {expected}; anything else is not supported yet")


def format_of(settings: Mapping[str, Any]) -> Format:
    """The format that a checkpoint's `quantization_config` describes.

    Raises:
        Unsupported: another method, or settings of it that are not read; names the key, what was found and expected.
    """
    method = settings.get("quant_method")
    if method == "fp8":
        _expect(settings, weight_block_size=([FP8_BLOCK, FP8_BLOCK],))
        return Format(("weight", "weight_scale_inv"), "F8_E4M3", (), _ACTIVATIONS, lambda s: s["weight"], _fp8)  # type: ignore[arg-type, return-value]
    if method in ("gptq", "auto-round"):
        _expect(settings, bits=(4,), desc_act=(False, None))
        if method == "auto-round":
            _expect(settings, packing_format=("auto_round:auto_gptq",))
        first = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        return Format(("qweight", "qzeros", "scales"), "I32", ("g_idx",), (), _transposed, _gptq(first))
    if method == "awq":
        _expect(settings, bits=(4,), version=("gemm", "GEMM", None))
        return Format(("qweight", "qzeros", "scales"), "I32", (), (), _transposed, _awq)
    if method == "compressed-tensors":
        _expect(settings, format=("pack-quantized",))
        for group in (settings.get("config_groups") or {}).values():
            _expect(group.get("weights") or {}, num_bits=(4,), type=("int",), symmetric=(True,))
        parts = ("weight_packed", "weight_scale")
        return Format(parts, "I32", (), ("weight_shape", "weight_g_idx"), _by_columns("weight_packed"), _compressed)
    if method == "modelopt":
        _expect(settings, quant_algo=("NVFP4",))
        three = ("weight", "weight_scale", "weight_scale_2")
        return Format(three, "U8", (), _ACTIVATIONS, lambda s: (s["weight"][0], 2 * s["weight"][1]), _nvfp4)
    raise Unsupported(
        "this quant_method is not supported yet; expected fp8, gptq, auto-round, awq, compressed-tensors or modelopt"
    )
