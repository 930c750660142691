"""The formats of quantised matrices in published checkpoints, chosen by their `quantization_config`.

A `WeightFormat` says which tensors stand for one weight `[O, D]` and how to decode them. Methods: FP8 (Qwen's own),
GPTQ, AutoRound, AWQ, compressed-tensors and modelopt. Settings have the names of these libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from checkpoints.hf_quantized import decode, shapes
from checkpoints.hf_quantized.decode import Arrays, Decoded
from checkpoints.hf_quantized.errors import UnsupportedQuantizationError
from checkpoints.hf_quantized.shapes import Shapes
from checkpoints.packed_array import FP8_BLOCK

Dtypes = tuple[str, ...]  # safetensors' names
FLOATS = ("F16", "BF16", "F32")
# Tensors that describe activations. They stay unread: activations are not quantised here.
ACTIVATION_SUFFIXES = (
    "input_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "activation_scale",
    "q_scale",
    "k_scale",
    "v_scale",
)


@dataclass(frozen=True)
class WeightFormat:
    """One way to store a weight as several tensors, named like the weight with another suffix than "weight".

    Attributes:
        required: needed suffixes and their dtypes. The first suffix, with one of its dtypes, identifies the format.
        shape: derives the shape `(O, D)` from the shapes of the tensors; raises ScaleShapeError if they do not fit.
        decode: decodes the weight from the tensors.
        optional: suffixes that are read if they exist, and their dtypes.
        ignored: further suffixes that the weight does not need.
    """

    required: Mapping[str, Dtypes]
    shape: Callable[[Shapes], tuple[int, int]]
    decode: Callable[[Arrays], Decoded]
    optional: Mapping[str, Dtypes] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def key_suffix(self) -> str:
        """The suffix that identifies the format."""
        return next(iter(self.required))

    @property
    def ignored_suffixes(self) -> tuple[str, ...]:
        """All suffixes of tensors that the weight does not need."""
        return (*ACTIVATION_SUFFIXES, *self.ignored)


def _fp8(scale_suffix: str = "weight_scale") -> WeightFormat:
    required = {"weight": ("F8_E4M3",), scale_suffix: (*FLOATS, "F8_E8M0", "U8")}
    shape = partial(shapes.fp8_shape, scale_suffix=scale_suffix)
    zero = {"weight_zero_point": (*FLOATS, "F8_E4M3", "I8")}  # zeros, if they are there at all
    return WeightFormat(required, shape, partial(decode.decode_fp8, scale_suffix=scale_suffix), optional=zero)


def _int8(group: int | None, is_symmetric: bool = True, ignored: tuple[str, ...] = ()) -> WeightFormat:
    required: dict[str, Dtypes] = {"weight": ("I8",), "weight_scale": FLOATS}
    zero: dict[str, Dtypes] = {"weight_zero_point": ("I8",)}
    shape, decoder = partial(shapes.int8_shape, group=group), decode.decode_int8
    if is_symmetric:
        return WeightFormat(required, shape, decoder, optional=zero, ignored=ignored)
    return WeightFormat(required | zero, shape, decoder, ignored=ignored)


def _expect(settings: Mapping[str, Any], prefix: str = "", **expected: tuple[Any, ...]) -> None:
    """Check that every setting named by a keyword has one of its values; `prefix` says where the settings are."""
    for key, values in expected.items():
        if settings.get(key) not in values:
            choices = " or ".join(repr(v) for v in values if v is not None or len(values) == 1)
            raise UnsupportedQuantizationError(
                f"{prefix}{key} is {settings.get(key)!r}, expected {choices}; anything else is not supported yet"
            )


def _gptq(settings: Mapping[str, Any], first_zero: int) -> WeightFormat:
    """GPTQ. The shapes of each weight tell its bits: `dynamic` and `extra_config` may give some weights more."""
    _expect(settings, bits=(4, 8))
    required = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}
    group_index = {"g_idx": ("I32", "I64")}
    decoder = partial(decode.decode_gptq, first_zero=first_zero)
    if settings.get("desc_act"):  # columns may be reordered: the index must exist, and `decode_gptq` checks it
        return WeightFormat(required | group_index, shapes.gptq_or_awq_shape, decoder)
    return WeightFormat(required, shapes.gptq_or_awq_shape, decoder, optional=group_index)


def _awq(settings: Mapping[str, Any]) -> WeightFormat:
    _expect(settings, bits=(4,), version=("gemm", "GEMM", None))
    required = {"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS}
    return WeightFormat(required, partial(shapes.gptq_or_awq_shape, words_along_rows=True), decode.decode_awq)


# AutoRound's packing formats in GPTQ's layout -> `first_zero` of `decode_gptq`.
_AUTO_ROUND_FIRST_ZERO = {
    "auto_round:auto_gptq": 1,
    "auto_round:gptqmodel": 0,
    "auto_round:exllamav2": 0,
    "auto_round:tritonv2": 0,
    "auto_round": 0,
}


def _auto_round(settings: Mapping[str, Any]) -> WeightFormat:
    _expect(settings, data_type=("int", None), packing_format=(*_AUTO_ROUND_FIRST_ZERO, "auto_round:auto_awq"))
    packing = settings["packing_format"]
    return _awq(settings) if packing == "auto_round:auto_awq" else _gptq(settings, _AUTO_ROUND_FIRST_ZERO[packing])


_NO_TRANSFORM: tuple[Any, ...] = (None, {}, {"config_groups": {}})


def _compressed_tensors(settings: Mapping[str, Any]) -> tuple[WeightFormat, ...]:
    """One format for each of `config_groups`. Formats with zero points come first: others would overlook them."""
    _expect(settings, transform_config=_NO_TRANSFORM)
    sparsity = settings.get("sparsity_config") or {}
    _expect(sparsity, "sparsity_config: ", format=("dense", None))
    formats = [
        _compressed_tensors_group(f"config_groups: {name}: ", group, group.get("format") or settings.get("format"))
        for name, group in (settings.get("config_groups") or {}).items()
        if group.get("weights")
    ]
    if not formats:
        raise UnsupportedQuantizationError("config_groups names no weights, expected at least one group with 'weights'")
    return tuple(sorted(formats, key=lambda weight_format: -len(weight_format.required)))


_COMPRESSED_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
_WHOLE_ROW = ("channel", "tensor")  # strategies whose scales cover at least a row


def _compressed_tensors_group(prefix: str, group: Mapping[str, Any], format_name: Any) -> WeightFormat:
    weights = group["weights"]
    if format_name == "naive-quantized":
        format_name = f"{weights.get('type')}-quantized"
    _expect({"format": format_name}, prefix, format=_COMPRESSED_FORMATS)
    if format_name in ("pack-quantized", "int-quantized"):
        return _compressed_tensors_int(prefix, weights, is_packed=format_name == "pack-quantized")
    _expect(weights, prefix, type=("float",), symmetric=(True, None))
    if format_name in ("float-quantized", "mxfp8-quantized"):
        strategy = weights.get("strategy")
        _expect(weights, prefix, num_bits=(8,), strategy=("block", "group", *_WHOLE_ROW, None))
        _expect(weights, prefix, block_structure=([FP8_BLOCK, FP8_BLOCK],) if strategy == "block" else (None,))
        return _fp8()
    group_size = 16 if format_name == "nvfp4-pack-quantized" else 32
    _expect(weights, prefix, num_bits=(4,), group_size=(group_size,), strategy=("tensor_group", "group", None))
    shape = partial(shapes.fp4_shape, weight_suffix="weight_packed", group=group_size)
    if format_name == "mxfp4-pack-quantized":
        required: dict[str, Dtypes] = {"weight_packed": ("U8",), "weight_scale": ("U8", "F8_E8M0")}
        return WeightFormat(required, shape, decode.decode_mxfp4)
    required = {"weight_packed": ("U8",), "weight_scale": ("F8_E4M3",), "weight_global_scale": FLOATS}
    return WeightFormat(required, shape, decode.decode_nvfp4_compressed)


def _compressed_tensors_int(prefix: str, weights: Mapping[str, Any], is_packed: bool) -> WeightFormat:
    """Integers of compressed-tensors: four or eight bits in int32 words (`is_packed`), or int8."""
    _expect(weights, prefix, type=("int",), num_bits=(4, 8) if is_packed else (8,))
    _expect(weights, prefix, strategy=("group", *_WHOLE_ROW, None))
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if not isinstance(group_size, int | None) or isinstance(group_size, bool):
        raise UnsupportedQuantizationError(f"{prefix}group_size is {group_size!r}, expected a whole number")
    group = 0 if strategy in _WHOLE_ROW or group_size == -1 else group_size
    is_symmetric = weights.get("symmetric", True)
    _expect(weights, prefix, symmetric=(True, False, None))
    if not is_packed:
        return _int8(group, is_symmetric, ("weight_shape",))
    bits = weights["num_bits"]
    required: dict[str, Dtypes] = {"weight_packed": ("I32",), "weight_scale": FLOATS}
    optional: dict[str, Dtypes] = {"weight_g_idx": ("I32", "I64")}
    # Some symmetric checkpoints have zero points, too: packed ones like others, or bytes, which must be zero.
    if is_symmetric:
        optional["weight_zero_point"] = ("I32", "I8")
    else:
        required["weight_zero_point"] = ("I32",)
    return WeightFormat(
        required=required,
        shape=partial(shapes.packed_int32_shape, bits=bits, group=group),
        decode=partial(decode.decode_packed_int32, bits=bits),
        optional=optional,
        ignored=("weight_shape",),
    )


def _modelopt_nvfp4() -> WeightFormat:
    required = {"weight": ("U8",), "weight_scale": ("F8_E4M3",), "weight_scale_2": FLOATS}
    shape = partial(shapes.fp4_shape, weight_suffix="weight", group=16)
    return WeightFormat(required, shape, decode.decode_nvfp4_modelopt)


def _modelopt_int8() -> WeightFormat:
    return _int8(group=0)


def _fp8_either_name() -> tuple[WeightFormat, ...]:
    """FP8 whose scales are called `weight_scale_inv`, as DeepSeek and Qwen call them, or `weight_scale`.

    Both are factors.
    """
    return _fp8("weight_scale_inv"), _fp8()


# modelopt's `quant_algo` -> formats.
_MODELOPT: dict[str, Callable[[], tuple[WeightFormat, ...]]] = {
    "NVFP4": lambda: (_modelopt_nvfp4(),),
    "W4A16_NVFP4": lambda: (_modelopt_nvfp4(),),
    "FP8": _fp8_either_name,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_either_name,
    "FP8_PB_WO": _fp8_either_name,
    "FP8_BLOCK_SCALES": _fp8_either_name,
    "MXFP8": _fp8_either_name,
    "W8A16": lambda: (_modelopt_int8(),),
}


def _modelopt(settings: Mapping[str, Any]) -> tuple[WeightFormat, ...]:
    algorithm = str(settings.get("quant_algo")).upper()  # modelopt 0.47 writes "fp8_pb_wo"
    _expect({"quant_algo": algorithm}, quant_algo=(*_MODELOPT, "MIXED_PRECISION"))
    if algorithm != "MIXED_PRECISION":
        return _MODELOPT[algorithm]()
    for layer, layer_settings in (settings.get("quantized_layers") or {}).items():
        layer_algorithm = str(layer_settings.get("quant_algo")).upper()
        _expect({"quant_algo": layer_algorithm}, f"quantized_layers: {layer}: ", quant_algo=tuple(_MODELOPT))
    return _modelopt_nvfp4(), *_fp8_either_name(), _modelopt_int8()


def formats_from_config(settings: Mapping[str, Any]) -> tuple[WeightFormat, ...]:
    """Return the formats that the `quantization_config` of a checkpoint describes.

    If a weight's tensors fit several formats, the first one is meant.

    Raises:
        UnsupportedQuantizationError: another method, or settings that are not supported. The message names the key,
            the found and the expected values.
    """
    method = settings.get("quant_method")
    _expect(settings, rotation_config=(None, {}))  # rotated weights need rotated inputs
    if method == "fp8":
        _expect(settings, weight_block_size=([FP8_BLOCK, FP8_BLOCK], None))
        return _fp8_either_name()
    if method == "gptq":
        _expect(settings, checkpoint_format=("gptq", "gptq_v2", None))
        return (_gptq(settings, 0 if settings.get("checkpoint_format") == "gptq_v2" else 1),)
    if method == "auto-round":
        return (_auto_round(settings),)
    if method == "awq":
        return (_awq(settings),)
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    if method == "modelopt":
        return _modelopt(settings)
    raise UnsupportedQuantizationError(
        "this quant_method is not supported yet; expected fp8, gptq, auto-round, awq, compressed-tensors or modelopt"
    )
