"""Checkpoint folders in every published quantised format, each beside a folder of the same values unquantised."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints import write_safetensors_directory
from mtpjax.config import FULL, LINEAR
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from tests.helpers import quantized_encoders as encoders
from tests.helpers.models import numpy_model, tiny_config
from tests.helpers.quantized_encoders import BF16, E8M0, GROUP, Encoder, encode_by_shape

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], None]  # damages the tensors of a folder before they are written


class PublishedFormat(NamedTuple):
    """A `quantization_config`, an encoder of a matrix, and the layouts of `read_packed` (none: float32 only)."""

    config: dict[str, Any]
    encode: Encoder
    layouts: tuple[str, ...]


def config_group(format_name: str, **weights: Any) -> dict[str, Any]:
    """Return a group of compressed-tensors that names its own format."""
    default: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return {"format": format_name, "targets": ["Linear"], "weights": default | {"group_size": GROUP} | weights}


def compressed_config(*groups: dict[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of compressed-tensors with up to three groups."""
    return {
        "quant_method": "compressed-tensors",
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "config_groups": dict(zip("abc", groups, strict=False)),
    }


_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "checkpoint_format": "gptq"}
_AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "data_type": "int"}
_CHANNEL = {"strategy": "channel", "group_size": None}
_PACK, _PACK_ZEROS = config_group("pack-quantized"), config_group("pack-quantized", symmetric=False)
_PACK_8_ZEROS = config_group("pack-quantized", num_bits=8, symmetric=False)
_FLOAT8 = partial(config_group, num_bits=8, type="float", group_size=None)
_BLOCKS = _FLOAT8("float-quantized", strategy="block", block_structure=[128, 128])
_NVFP4 = config_group("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)
_MODELOPT_MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4", "group_size": 16}},
}

_encode_fp8_qwen = partial(encoders.encode_fp8, scale_suffix="weight_scale_inv")
_encode_gptq_zeros = partial(encoders.encode_gptq, symmetric=False)
_encode_gptq_8bit = partial(encoders.encode_gptq, bits=8)
_encode_pack_zeros = partial(encoders.encode_pack_quantized, symmetric=False)
_encode_pack_zeros_float32 = partial(_encode_pack_zeros, dtype=np.float32)
_encode_nvfp4_compressed = partial(encoders.encode_nvfp4, compressed_tensors=True)


def _encode_gptq_groups_of_192(w: np.ndarray) -> encoders.Encoded:
    return encoders.encode_gptq(w, group=192 if w.shape[1] == 384 else 32)


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm}


def _formats() -> Iterator[tuple[str, dict[str, Any], Encoder, str]]:
    """Yield name, config, encoder and layouts."""
    yield "fp8", _FP8, _encode_fp8_qwen, "fp8"
    yield "fp8, powers of two", _FP8, partial(_encode_fp8_qwen, dtype=E8M0), "fp8"

    yield "gptq", _GPTQ, encoders.encode_gptq, "codes4"
    yield "gptq v1, zeros", _GPTQ | {"sym": False}, _encode_gptq_zeros, "codes4"
    yield "gptq v2, zeros", _GPTQ | {"checkpoint_format": "gptq_v2"}, partial(_encode_gptq_zeros, version=2), "codes4"
    yield "gptq, rows", _GPTQ | {"group_size": -1, "desc_act": True}, partial(_encode_gptq_zeros, group=0), "codes4"
    yield "gptq, groups of three times 64", _GPTQ, _encode_gptq_groups_of_192, "codes4"
    yield "gptq, 8 bits", _GPTQ | {"bits": 8}, _encode_gptq_8bit, "codes8"
    encoder = partial(_encode_gptq_8bit, symmetric=False, group=0)
    yield "gptq v1, 8 bits, zeros", _GPTQ | {"bits": 8}, encoder, "codes8"
    config = _GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}
    yield (
        "gptq, some 8 bits",
        config,
        partial(encode_by_shape, encoders.encode_gptq, _encode_gptq_8bit),
        "codes4 codes8",
    )

    config = _AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}
    yield "auto-round", config, encoders.encode_auto_round, "codes4"
    config = _AUTO_ROUND | {"packing_format": "auto_round:exllamav2"}
    yield "auto-round, zeros", config, partial(encoders.encode_auto_round, symmetric=False, version=2), "codes4"
    config = _AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}
    yield "auto-round, awq", config, encoders.encode_awq, "codes4"
    yield "awq", {"quant_method": "awq", "bits": 4, "version": "gemm"}, encoders.encode_awq, "codes4"

    yield "compressed-tensors", compressed_config(_PACK), encoders.encode_pack_quantized, "codes4"
    yield "compressed-tensors, zeros", compressed_config(_PACK_ZEROS), _encode_pack_zeros, "codes4"
    config = compressed_config(config_group("pack-quantized", symmetric=False, **_CHANNEL))
    yield "compressed-tensors, rows", config, partial(_encode_pack_zeros, group=0, dtype=BF16), "codes4"
    config = compressed_config(_PACK_ZEROS)
    yield "compressed-tensors, zeros, float32", config, _encode_pack_zeros_float32, "codes5"
    config = compressed_config(_PACK_8_ZEROS)
    yield "compressed-tensors, 8 bits", config, partial(_encode_pack_zeros, bits=8), "codes8"
    encoder = partial(_encode_pack_zeros_float32, bits=8)
    yield "compressed-tensors, 8 bits, zeros, float32", config, encoder, ""
    config = compressed_config(_PACK, _PACK_ZEROS)
    encoder = partial(encode_by_shape, encoders.encode_pack_quantized, _encode_pack_zeros)
    yield "compressed-tensors, with and without zeros", config, encoder, "codes4"

    config = compressed_config(config_group("int-quantized", num_bits=8, **_CHANNEL))
    yield "int8", config, encoders.encode_int8, "codes8"
    config = compressed_config(config_group("naive-quantized", num_bits=8, symmetric=False, **_CHANNEL))
    yield "int8, zeros", config, partial(encoders.encode_int8, symmetric=False), "codes8"

    yield "float8 blocks", compressed_config(_BLOCKS), encoders.encode_fp8, "fp8"
    config = compressed_config(_FLOAT8("naive-quantized", strategy="tensor"))
    yield "float8", config, encoders.encode_fp8_one_scale, "fp8"
    config = compressed_config(_FLOAT8("float-quantized", strategy="channel"))
    yield "float8 rows", config, partial(encoders.encode_fp8, rows=1, columns=0), ""
    encoder = partial(encoders.encode_fp8, rows=1, columns=32, dtype=E8M0)
    yield "mxfp8", compressed_config(_FLOAT8("mxfp8-quantized")), encoder, ""
    config = compressed_config(config_group("mxfp4-pack-quantized", type="float"))
    yield "mxfp4", config, encoders.encode_mxfp4, "codes4"
    yield "nvfp4, divided", compressed_config(_NVFP4), _encode_nvfp4_compressed, "codes4"
    config = compressed_config(_FLOAT8("float-quantized", strategy="tensor"), _NVFP4)
    encoder = partial(encode_by_shape, _encode_nvfp4_compressed, encoders.encode_fp8_one_scale)
    yield "nvfp4 and float8", config, encoder, "codes4 fp8"

    yield "nvfp4", _modelopt("NVFP4"), encoders.encode_nvfp4, "codes4"
    yield "modelopt fp8", _modelopt("FP8"), encoders.encode_fp8_one_scale, "fp8"
    yield "modelopt fp8 blocks", _modelopt("fp8_pb_wo"), encoders.encode_fp8_four_axes, "fp8"
    yield "modelopt int8", _modelopt("W8A16"), encoders.encode_int8_scale_vector, "codes8"
    encoder = partial(encode_by_shape, encoders.encode_nvfp4, encoders.encode_fp8_one_scale)
    yield "modelopt mixed", _MODELOPT_MIXED, encoder, "codes4 fp8"


FORMATS = {
    name: PublishedFormat(config, encode, tuple(layouts.split())) for name, config, encode, layouts in _formats()
}

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "head_dim": 32,
    "rotary_dim": 8,
    "linear_k_dim": 32,
    "linear_v_dim": 32,
    "expert_size": 128,
    "shared_expert_size": 128,
    "vocab_size": 128,
    "layer_pattern": (LINEAR, FULL),
}
# Parts of the names of matrices that published checkpoints leave unquantised.
UNQUANTIZED = (
    "norm",
    "conv1d",
    "gate.weight",
    "shared_expert_gate",
    "in_proj_a",
    "in_proj_b",
    "embed_tokens",
    "lm_head",
    "mtp.fc",
    "A_log",
    "dt_",
)


def write_model(path: Path, fmt: PublishedFormat, unquantized: tuple[str, ...] = UNQUANTIZED, **sizes: Any) -> None:
    """Write a whole model to `path/plain` and `path/packed`; `sizes` replaces entries of `SIZES`."""
    cfg = tiny_config(moe=True, linear_v_heads=6, **SIZES | sizes)
    weights = {
        name: weight
        for fused_name, _, _, read in export_tensors(numpy_model(cfg))
        for name, weight in _split_experts(fused_name, read().astype(np.float32))
    }
    _write_folders(path, fmt, weights, config_to_hf(cfg), unquantized)


def write_three_matrices(path: Path, fmt: PublishedFormat, change: Change | None = None) -> None:
    """Write three matrices, one of them square, to `path/plain` and `path/packed`.

    Some rows have one sign only: their zero points are at the ends of the range.
    """
    rng = np.random.default_rng(0)
    shapes = {"a": (128, 384), "b": (320, 128), "c": (128, 128)}
    weights = {
        f"model.layers.0.{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()
    }
    for w in weights.values():
        w[3::5] = np.abs(w[3::5])
        w[4::5] = -np.abs(w[4::5])
    _write_folders(path, fmt, weights, {"model_type": "qwen3_5"}, UNQUANTIZED, change)


def _split_experts(name: str, w: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Split fused experts as published quantised checkpoints do: one tensor for each matrix of an expert."""
    if not name.endswith(("gate_up_proj", "down_proj")) or w.ndim != 3:
        yield name, w
        return
    prefix, _, last = name.rpartition(".")
    for expert, fused in enumerate(w):
        projections = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for projection, matrix in zip(projections, np.split(fused, len(projections)), strict=True):
            yield f"{prefix}.{expert}.{projection}.weight", matrix


def _write_folders(
    path: Path,
    fmt: PublishedFormat,
    weights: Tensors,
    config: dict[str, Any],
    unquantized: tuple[str, ...],
    change: Change | None = None,
) -> None:
    """Write `path/plain` with the dequantised weights, and `path/packed` with the quantised ones after `change`."""
    plain: Tensors = {}
    packed: Tensors = {}
    for name, w in weights.items():
        if w.ndim != 2 or any(part in name for part in unquantized):
            plain[name] = packed[name] = w
            continue
        tensors, plain[name] = fmt.encode(w)
        packed |= {name.removesuffix("weight") + suffix: array for suffix, array in tensors.items()}
    if change:
        change(packed)
    _write(path / "plain", config, plain)
    _write(path / "packed", config | {"quantization_config": fmt.config}, packed)


def _write(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    def contiguous(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray gives scalars an axis

    entries = [(name, array.shape, array.dtype, partial(contiguous, array)) for name, array in tensors.items()]
    write_safetensors_directory(folder, config, entries)


def write_folder(path: Path, tensors: Tensors, settings: Any = None, **config: Any) -> Path:
    """Write a folder; `settings` is its quantization_config, if there is one."""
    own = {"quantization_config": settings} if settings is not None else {}

    def contiguous(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array).reshape(array.shape)

    entries = [(name, array.shape, array.dtype, partial(contiguous, array)) for name, array in tensors.items()]
    write_safetensors_directory(path, {"model_type": "qwen3_5_moe"} | own | config, entries)
    return path


def matrices(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random matrices with the deviation of weights."""
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def with_names(encode: Encoder, w: np.ndarray, base: str) -> tuple[Tensors, np.ndarray]:
    """Return the tensors of a matrix with names that begin with `base`, and the weight that they stand for."""
    encoded, value = encode(w)
    return {f"{base}.{suffix}": array for suffix, array in encoded.items()}, value
