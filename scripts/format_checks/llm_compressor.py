"""Formats of compressed-tensors, packed by llm-compressor."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from scripts.format_checks.packing import IsMatrix, Packed, Tensors


def compressed(weights: Tensors, is_matrix: IsMatrix, groups: Callable[[], dict[str, Any]]) -> Packed:
    """Pack with llm-compressor's `model_free_ptq`, from a folder to a folder; compressed-tensors gives the values.

    Args:
        groups: returns the `config_groups`; a function, because it imports the library.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.utils.match import match_name
    from llmcompressor import model_free_ptq

    ignore = [
        name.removesuffix(".weight")
        for name, weight in weights.items()
        if not is_matrix(name) and name.endswith(".weight")
    ]
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder, "plain"), Path(folder, "packed")
        plain.mkdir()
        save_file(weights, plain / "model.safetensors")
        (plain / "config.json").write_text("{}")
        model_free_ptq(plain, packed, config=QuantizationConfig(config_groups=groups(), ignore=ignore), device="cpu")
        config = json.loads((packed / "config.json").read_text())["quantization_config"]
        tensors = load_file(packed / "model.safetensors")
    schemes = QuantizationConfig.model_validate(config).config_groups.values()
    values = {}
    for name in filter(is_matrix, weights):
        base = name.removesuffix(".weight")
        stored = {n.removeprefix(f"{base}."): t for n, t in tensors.items() if n.rpartition(".")[0] == base}
        scheme = next(s for s in schemes if "Linear" in s.targets or any(match_name(base, t) for t in s.targets))
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        if "fp4" in scheme.format:  # its `decompress` returns bfloat16; these are its steps in float32
            from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

            rows, size = stored["weight_packed"].shape
            unpacked = unpack_fp4_from_uint8(stored["weight_packed"], rows, 2 * size, torch.float32)
            scale = compressor._decompress_scale(stored["weight_scale"], torch.float32)
            values[name] = dequantize(
                unpacked, scale, args=scheme.weights, global_scale=stored.get("weight_global_scale")
            )
            continue
        scale = stored["weight_scale"]
        float32_scale = stored | ({"weight_scale": scale.float()} if scale.is_floating_point() else {})
        values[name] = compressor.decompress(float32_scale, scheme)["weight"].float()
    return Packed(config, tensors, values)


def preset(name: str) -> dict[str, Any]:
    """Return the groups of a preset scheme for all linear layers."""
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    return {"group_0": preset_name_to_scheme(name, ["Linear"])}


def integers(**args: Any) -> dict[str, Any]:
    """Return the groups of an integer format; `args` are those of `QuantizationArgs`."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return {"group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **args))}


def mixed() -> dict[str, Any]:
    """Return groups with experts and MLPs in NVFP4 and the attention in FP8 blocks."""
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    return {
        "group_0": preset_name_to_scheme("NVFP4A16", ["re:.*mlp.*"]),
        "group_1": preset_name_to_scheme("FP8_BLOCK", ["re:.*attn.*"]),
    }
