"""Quantised checkpoints as their own libraries make them on a CPU, and the values that these libraries give them back.

Each case of `CASES` takes plain weights and returns a `Packed`. A library is imported when its case is made: one that is not
installed raises ImportError, which `scripts/format_checks/check_formats.py` reports. Only their packing and unpacking is called, with scales
from the library's own round-to-nearest; values are asked for in float32, from the scales that are stored.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
GROUP = 128


class Packed(NamedTuple):
    """`quantization_config`, all tensors of the folder, and what the library makes of the quantised ones, float32."""

    config: dict[str, Any]
    tensors: Tensors
    values: Tensors


@dataclass(frozen=True)
class Case:
    """`make(weights, chosen)`: bfloat16 weights by name, and whether one is a matrix to be quantised."""

    name: str
    library: str  # name of its distribution
    make: Callable[[Tensors, Callable[[str], bool]], Packed]


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _each(
    weights: Tensors,
    chosen: Callable[[str], bool],
    config: dict[str, Any],
    pack: Callable[[torch.Tensor], tuple[Tensors, Any]],
) -> Packed:
    """Every chosen matrix by itself: `pack` gives the tensors by suffix, and the value `[O, D]`."""
    tensors, values = {}, {}
    for name, weight in weights.items():
        if not chosen(name):
            tensors[name] = weight
            continue
        parts, values[name] = pack(weight.float())
        tensors |= {name.removesuffix("weight") + suffix: part.contiguous() for suffix, part in parts.items()}
    return Packed(json.loads(json.dumps(config, default=str)), tensors, values)


# transformers


def fine_grained(weights: Tensors, chosen: Callable[[str], bool], **settings: Any) -> Packed:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = FineGrainedFP8Config(**settings)
    quantizer = SimpleNamespace(quantization_config=config)

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts = Fp8Quantize(quantizer)._quantize_one("weight", weight)
        return parts, Fp8Dequantize(quantizer)._dequantize_one(
            parts["weight"], parts["weight_scale_inv"], torch.float32
        )

    return _each(weights, chosen, config.to_dict(), pack)


# gptqmodel


def gptq(weights: Tensors, chosen: Callable[[str], bool], **settings: Any) -> Packed:
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.quantizer import Quantizer
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    config = QuantizeConfig(**settings)
    old = config.format == "gptq"

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, size = weight.shape
        group = size if config.group_size == -1 else config.group_size
        scales, zeros = [], []
        for block in weight.split(group, dim=1):
            quantizer = Quantizer(config)
            quantizer.configure(perchannel=True)
            quantizer.find_params(block, weight=True)
            scales.append(quantizer.scale)
            zeros.append(quantizer.zero)
        scale, zero = torch.cat(scales, dim=1).half().float(), torch.cat(zeros, dim=1)
        order = torch.arange(size, dtype=torch.int32) // group
        layer = TorchLinear(config.bits, config.group_size, config.sym, False, size, rows, register_buffers=True)
        layer.pack_block(_linear(weight), scale, zero, order)
        if old:
            convert_gptq_v2_to_v1_format_module(layer, config)
        names = ("qweight", "qzeros", "scales", "g_idx")
        parts = {name: getattr(layer, name).clone() for name in names}
        if old:
            convert_gptq_v1_to_v2_format_module(layer, config.bits, torch.int32)
        layer.scales = layer.scales.float()
        layer.post_init()
        return parts, layer.dequantize_weight().float().T

    return _each(weights, chosen, config.to_dict(), pack)


# autoawq


def awq(weights: Tensors, chosen: Callable[[str], bool], **settings: Any) -> Packed:
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    config = AwqConfig(**settings)
    how = SimpleNamespace(group_size=config.q_group_size, zero_point=True, w_bit=config.w_bit)

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        value, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(how, weight)
        layer = WQLinear_GEMM.from_linear(_linear(value), config.w_bit, config.q_group_size, False, scales.T, zeros.T)
        parts = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
        unpacked = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), config.w_bit, config.q_group_size)
        return parts, unpacked.T

    return _each(weights, chosen, config.to_transformers_dict(), pack)


# auto-round


def auto_round(
    weights: Tensors, chosen: Callable[[str], bool], backend: str, sym: bool, bits: int, group: int
) -> Packed:
    from auto_round.data_type.int import quant_tensor_asym, quant_tensor_rtn_sym
    from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing

    kind = dynamic_import_quant_linear_for_packing(backend, bits, group, sym)
    config = {"bits": bits, "group_size": group, "sym": sym, "data_type": "int", "quant_method": "auto-round"}

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, size = weight.shape
        _, scale, zero = (quant_tensor_rtn_sym if sym else quant_tensor_asym)(weight, bits, group)
        scale = scale.reshape(rows, -1)
        zero = zero.reshape(rows, -1) if isinstance(zero, torch.Tensor) else int(zero)
        if "awq" in backend:
            from auto_round.export.export_to_awq.utils import dequantize_gemm

            layer = kind.from_linear(_linear(weight), bits, group, scales=scale.T, zeros=zero.T if not sym else zero)
            value = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), bits, layer.group_size).T
        else:
            layer = kind(bits, group, size, rows, bias=False)
            layer.device = "cpu"
            layer.pack(_linear(weight), scale, zero, None, device="cpu")
            value = None
        parts = {name: part.clone() for name, part in layer.state_dict().items()}
        parts |= {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
        if value is None:
            layer.scales = layer.scales.float()
            layer._buffers.pop("g_idx", None)  # with it, its forward fails where there are more rows than columns
            value = layer(torch.eye(size)).T
        return parts, value

    return _each(weights, chosen, config | {"packing_format": backend}, pack)


# llm-compressor and compressed-tensors


def compressed(weights: Tensors, chosen: Callable[[str], bool], groups: Callable[[], dict[str, Any]]) -> Packed:
    """By llm-compressor's `model_free_ptq`, from a folder to a folder; values by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.utils.match import match_name
    from llmcompressor import model_free_ptq

    ignore = [
        name.removesuffix(".weight")
        for name, weight in weights.items()
        if not chosen(name) and name.endswith(".weight")
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
    for name in filter(chosen, weights):
        base = name.removesuffix(".weight")
        parts = {n.removeprefix(f"{base}."): t for n, t in tensors.items() if n.rpartition(".")[0] == base}
        scheme = next(s for s in schemes if "Linear" in s.targets or any(match_name(base, t) for t in s.targets))
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        if "fp4" in scheme.format:  # its `decompress` gives bfloat16: the same steps in float32
            from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

            rows, size = parts["weight_packed"].shape
            unpacked = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * size, torch.float32)
            scale = compressor._decompress_scale(parts["weight_scale"], torch.float32)
            values[name] = dequantize(
                unpacked, scale, args=scheme.weights, global_scale=parts.get("weight_global_scale")
            )
            continue
        scale = parts["weight_scale"]
        wide = parts | ({"weight_scale": scale.float()} if scale.is_floating_point() else {})
        values[name] = compressor.decompress(wide, scheme)["weight"].float()
    return Packed(config, tensors, values)


def preset(name: str) -> dict[str, Any]:
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    return {"group_0": preset_name_to_scheme(name, ["Linear"])}


def integers(**args: Any) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return {"group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **args))}


def mixed() -> dict[str, Any]:
    """Experts and MLPs in NVFP4, the others in FP8 blocks."""
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    return {
        "group_0": preset_name_to_scheme("NVFP4A16", ["re:.*mlp.*"]),
        "group_1": preset_name_to_scheme("FP8_BLOCK", ["re:.*attn.*"]),
    }


# modelopt


class _Holder(torch.nn.Module):
    """Linear layers by their dotted names, each called on noise so that its activations are seen."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            *path, last = name.removesuffix(".weight").split(".")
            at: torch.nn.Module = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, torch.nn.Module())
                at = at._modules[part]  # type: ignore[assignment]
            at.add_module(last, _linear(weight))

    def fused_linears(self) -> Iterator[tuple[str, torch.nn.Linear]]:
        return ((name, layer) for name, layer in self.named_modules() if isinstance(layer, torch.nn.Linear))

    def forward(self) -> None:
        for _, layer in self.fused_linears():
            layer(torch.randn(1, 4, layer.in_features, dtype=layer.weight.dtype))


def modelopt(weights: Tensors, chosen: Callable[[str], bool], *names: str) -> Packed:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.model_config import QUANTIZATION_INT8_WO
    from modelopt.torch.export.quant_utils import from_quantized_weight, get_quant_config
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    model = _Holder({name: weight for name, weight in weights.items() if chosen(name)})
    first, *others = (copy.deepcopy(getattr(mtq, f"{name}_CFG")) for name in names)
    for other in others:  # the attention in another type
        entries = (e for e in other["quant_cfg"] if e["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"))
        first["quant_cfg"][3:3] = [e | {"quantizer_name": f"*attn{e['quantizer_name']}"} for e in entries]
    mtq.quantize(model, first, lambda m: m())
    config = convert_hf_quant_config_format(get_quant_config(model)) | {"quant_method": "modelopt"}
    shapes = {name: layer.weight.shape for name, layer in model.fused_linears()}
    tensors, values = {n: w for n, w in weights.items() if not chosen(n)}, {}
    for name, layer in model.fused_linears():
        _export_quantized_weight(layer, torch.bfloat16)
        parts = {n: p for n, p in layer.state_dict().items() if "quantizer" not in n}
        tensors |= {f"{name}.{n}": p for n, p in parts.items()}
        if "weight_scale" not in parts:  # its configs leave MTP heads out
            continue
        scale = parts["weight_scale"]
        if "weight_scale_2" in parts:
            held = NVFP4QTensor(shapes[name], torch.float32, parts["weight"])
            whole = {"scale": scale, "double_scale": parts["weight_scale_2"], "block_sizes": {-1: 16}}
            values[f"{name}.weight"] = held.dequantize(torch.float32, **whole)
        elif scale.dtype == torch.uint8:
            held = MXFP8QTensor(shapes[name], torch.float32, parts["weight"])
            values[f"{name}.weight"] = held.dequantize(torch.float32, scale=scale)
        elif parts["weight"].dtype == torch.int8:
            values[f"{name}.weight"] = from_quantized_weight(
                parts["weight"], scale, QUANTIZATION_INT8_WO, torch.float32
            )
        else:
            held = FP8QTensor(shapes[name], torch.float32, parts["weight"])
            blocks = {"block_sizes": {-1: GROUP, -2: GROUP}} if scale.ndim == 4 else {}
            wide = scale[:, 0, :, 0] if blocks else scale[:, None] if scale.numel() > 1 else scale
            values[f"{name}.weight"] = held.dequantize(torch.float32, scale=wide, **blocks)
    return Packed(config, tensors, values)


def _cases() -> Iterator[Case]:
    for name, settings in {
        "fp8": {},
        "fp8 ue8m0": {"scale_fmt": "ue8m0"},
        "fp8 tensor": {"weight_block_size": None},
    }.items():
        yield Case(name, "transformers", partial(fine_grained, **settings))
    for bits in (4, 8):
        for group in (GROUP, -1):
            for sym, version in ((True, "gptq"), (False, "gptq"), (False, "gptq_v2")):
                title = f"int{bits} {'sym' if sym else 'asym'} group {group} {version}"
                make = partial(gptq, bits=bits, group_size=group, sym=sym, format=version, desc_act=False)
                yield Case(title, "gptqmodel", make)
    yield Case("int4 asym gemm", "autoawq", awq)
    for sym, bits, group, backend in (
        (True, 4, GROUP, "auto_gptq"), (True, 8, 32, "auto_gptq"), (False, 4, GROUP, "auto_gptq"), (False, 4, GROUP, "exllamav2"),
        (False, 8, -1, "tritonv2"), (False, 4, GROUP, "gptqmodel"), (True, 4, -1, "auto_gptq"), (True, 4, GROUP, "auto_awq"),
        (False, 4, GROUP, "auto_awq"),
    ):  # fmt: skip
        title = f"int{bits} {'sym' if sym else 'asym'} group {group} {backend}"
        how = {"backend": f"auto_round:{backend}", "sym": sym, "bits": bits, "group": group}
        yield Case(title, "auto-round", partial(auto_round, **how))
    for name in (
        "W4A16",
        "W4A16_ASYM",
        "W8A16",
        "W8A8",
        "NVFP4A16",
        "MXFP4A16",
        "FP8_BLOCK",
        "FP8_DYNAMIC",
        "MXFP8A16",
    ):
        yield Case(name, "compressed-tensors", partial(compressed, groups=partial(preset, name)))
    for title, args in {
        "int4 asym channel": {"num_bits": 4, "symmetric": False, "strategy": "channel"},
        "int4 group 32": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "int8 asym group 128": {"num_bits": 8, "symmetric": False, "strategy": "group", "group_size": 128},
        "int8 channel": {"num_bits": 8, "strategy": "channel"},
    }.items():
        yield Case(title, "compressed-tensors", partial(compressed, groups=partial(integers, **args)))
    yield Case("NVFP4A16 and FP8_BLOCK", "compressed-tensors", partial(compressed, groups=mixed))
    for title, names in {
        "NVFP4": ("NVFP4_DEFAULT",), "W4A16_NVFP4": ("W4A16_NVFP4",), "FP8": ("FP8_DEFAULT",), "MXFP8": ("MXFP8_DEFAULT",),
        "FP8_PER_CHANNEL_PER_TOKEN": ("FP8_PER_CHANNEL_PER_TOKEN",), "FP8_PB_WO": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY",),
        "W8A16": ("INT8_WEIGHT_ONLY",), "MIXED_PRECISION, NVFP4 and FP8": ("NVFP4_DEFAULT", "FP8_DEFAULT"),
    }.items():  # fmt: skip
        yield Case(title, "nvidia-modelopt", lambda w, c, names=names: modelopt(w, c, *names))


CASES = tuple(_cases())
