"""FP8, MXFP8, NVFP4 and int8 formats, packed by transformers and by NVIDIA's modelopt."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from scripts.format_checks.packing import GROUP, IsMatrix, Packed, Tensors, linear_layer, pack_each


def fine_grained(weights: Tensors, is_matrix: IsMatrix, **settings: Any) -> Packed:
    """Pack with the FP8 blocks of transformers; `settings` are those of `FineGrainedFP8Config`."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = FineGrainedFP8Config(**settings)
    quantizer = SimpleNamespace(quantization_config=config)

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        packed = Fp8Quantize(quantizer)._quantize_one("weight", weight)
        return packed, Fp8Dequantize(quantizer)._dequantize_one(
            packed["weight"], packed["weight_scale_inv"], torch.float32
        )

    return pack_each(weights, is_matrix, config.to_dict(), pack)


class _LinearLayers(torch.nn.Module):
    """Linear layers at their dotted names. A forward pass feeds noise to each, which calibrates its activations."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            *path, last = name.removesuffix(".weight").split(".")
            at: torch.nn.Module = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, torch.nn.Module())
                at = at.get_submodule(part)
            at.add_module(last, linear_layer(weight))

    def linears(self) -> Iterator[tuple[str, torch.nn.Linear]]:
        return ((name, layer) for name, layer in self.named_modules() if isinstance(layer, torch.nn.Linear))

    def forward(self) -> None:
        for _, layer in self.linears():
            layer(torch.randn(1, 4, layer.in_features, dtype=layer.weight.dtype))


def modelopt(weights: Tensors, is_matrix: IsMatrix, config_names: tuple[str, ...]) -> Packed:
    """Pack with the config of the first name, and the attention with those of the other names."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.model_config import QUANTIZATION_INT8_WO
    from modelopt.torch.export.quant_utils import from_quantized_weight, get_quant_config
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    model = _LinearLayers({name: weight for name, weight in weights.items() if is_matrix(name)})
    first, *others = (copy.deepcopy(getattr(mtq, f"{name}_CFG")) for name in config_names)
    for other in others:
        entries = (e for e in other["quant_cfg"] if e["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"))
        first["quant_cfg"][3:3] = [e | {"quantizer_name": f"*attn{e['quantizer_name']}"} for e in entries]
    mtq.quantize(model, first, lambda m: m())
    config = convert_hf_quant_config_format(get_quant_config(model)) | {"quant_method": "modelopt"}
    shapes = {name: layer.weight.shape for name, layer in model.linears()}
    tensors, values = {n: w for n, w in weights.items() if not is_matrix(n)}, {}
    for name, layer in model.linears():
        _export_quantized_weight(layer, torch.bfloat16)
        stored = {n: t for n, t in layer.state_dict().items() if "quantizer" not in n}
        tensors |= {f"{name}.{n}": t for n, t in stored.items()}
        if "weight_scale" not in stored:  # its configs leave MTP heads out
            continue
        scale = stored["weight_scale"]
        if "weight_scale_2" in stored:
            quantized = NVFP4QTensor(shapes[name], torch.float32, stored["weight"])
            scales = {"scale": scale, "double_scale": stored["weight_scale_2"], "block_sizes": {-1: 16}}
            values[f"{name}.weight"] = quantized.dequantize(torch.float32, **scales)
        elif scale.dtype == torch.uint8:
            quantized = MXFP8QTensor(shapes[name], torch.float32, stored["weight"])
            values[f"{name}.weight"] = quantized.dequantize(torch.float32, scale=scale)
        elif stored["weight"].dtype == torch.int8:
            values[f"{name}.weight"] = from_quantized_weight(
                stored["weight"], scale, QUANTIZATION_INT8_WO, torch.float32
            )
        else:
            quantized = FP8QTensor(shapes[name], torch.float32, stored["weight"])
            blocks = {"block_sizes": {-1: GROUP, -2: GROUP}} if scale.ndim == 4 else {}
            broadcast = scale[:, 0, :, 0] if blocks else scale[:, None] if scale.numel() > 1 else scale
            values[f"{name}.weight"] = quantized.dequantize(torch.float32, scale=broadcast, **blocks)
    return Packed(config, tensors, values)
