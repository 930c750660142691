"""Integer formats packed by gptqmodel, AutoAWQ and auto-round, with scales from the library's own round-to-nearest.

Values are computed in float32 from the stored scales.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from scripts.format_checks.packing import IsMatrix, Packed, Tensors, linear_layer, pack_each


def gptq(weights: Tensors, is_matrix: IsMatrix, **settings: Any) -> Packed:
    """Pack with gptqmodel's torch layer; `settings` are those of its `QuantizeConfig`."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.quantizer import Quantizer
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    config = QuantizeConfig(**settings)
    version_1 = config.format == "gptq"

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
        group_ids = torch.arange(size, dtype=torch.int32) // group
        layer = TorchLinear(config.bits, config.group_size, config.sym, False, size, rows, register_buffers=True)
        layer.pack_block(linear_layer(weight), scale, zero, group_ids)
        if version_1:
            convert_gptq_v2_to_v1_format_module(layer, config)
        names = ("qweight", "qzeros", "scales", "g_idx")
        packed = {name: getattr(layer, name).clone() for name in names}
        if version_1:
            convert_gptq_v1_to_v2_format_module(layer, config.bits, torch.int32)
        layer.scales = layer.scales.float()
        layer.post_init()
        return packed, layer.dequantize_weight().float().T

    return pack_each(weights, is_matrix, config.to_dict(), pack)


def awq(weights: Tensors, is_matrix: IsMatrix, **settings: Any) -> Packed:
    """Pack with AutoAWQ's GEMM layer; `settings` are those of its `AwqConfig`."""
    from awq.models._config import AwqConfig
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    config = AwqConfig(**settings)
    quantizer = SimpleNamespace(group_size=config.q_group_size, zero_point=True, w_bit=config.w_bit)

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        value, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(quantizer, weight)
        layer = WQLinear_GEMM.from_linear(
            linear_layer(value), config.w_bit, config.q_group_size, False, scales.T, zeros.T
        )
        packed = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
        unpacked = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), config.w_bit, config.q_group_size)
        return packed, unpacked.T

    return pack_each(weights, is_matrix, config.to_transformers_dict(), pack)


def auto_round(weights: Tensors, is_matrix: IsMatrix, backend: str, sym: bool, bits: int, group: int) -> Packed:
    """Pack with the layer that auto-round picks for a backend."""
    from auto_round.data_type.int import quant_tensor_asym, quant_tensor_rtn_sym
    from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing

    layer_class = dynamic_import_quant_linear_for_packing(backend, bits, group, sym)
    config = {"bits": bits, "group_size": group, "sym": sym, "data_type": "int", "quant_method": "auto-round"}

    def pack(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, size = weight.shape
        _, scale, zero = (quant_tensor_rtn_sym if sym else quant_tensor_asym)(weight, bits, group)
        scale = scale.reshape(rows, -1)
        zero_point: Any = zero.reshape(rows, -1) if isinstance(zero, torch.Tensor) else int(zero)
        if "awq" in backend:
            from auto_round.export.export_to_awq.utils import dequantize_gemm

            layer = layer_class.from_linear(
                linear_layer(weight), bits, group, scales=scale.T, zeros=zero_point if sym else zero_point.T
            )
            value = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), bits, layer.group_size).T
        else:
            layer = layer_class(bits, group, size, rows, bias=False)
            layer.device = "cpu"
            layer.pack(linear_layer(weight), scale, zero_point, None, device="cpu")
            value = None
        packed = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        packed |= {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}
        if value is None:
            layer.scales = layer.scales.float()
            layer._buffers.pop("g_idx", None)  # its forward pass fails with it if there are more rows than columns
            value = layer(torch.eye(size)).T
        return packed, value

    return pack_each(weights, is_matrix, config | {"packing_format": backend}, pack)
