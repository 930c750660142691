"""Quantised folders in forms that other tools than the formats' own write: fused experts, other names and places."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    CheckpointError,
    QuantizedDirectory,
    open_checkpoint,
)
from checkpoints.packed_array import PackedArray
from tests.helpers import quantized_encoders as encoders
from tests.helpers.quantized_encoders import Encoder
from tests.helpers.quantized_folders import (
    FORMATS,
    Tensors,
    compressed_config,
    config_group,
    matrices,
    with_names,
    write_folder,
)

pytestmark = pytest.mark.fast

EXPERTS, HIDDEN = 3, 128
MOE = "model.language_model.layers.0.mlp.experts."
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NVFP4_COMPRESSED = FORMATS["nvfp4, divided"].config
NVFP4_MODELOPT = FORMATS["nvfp4"].config
encode_divided = partial(encoders.encode_nvfp4, compressed_tensors=True)
encode_fp8_inv = partial(encoders.encode_fp8, scale_suffix="weight_scale_inv")


def encode_stack(encode: Encoder, w: np.ndarray, halves: bool) -> encoders.Encoded:
    """Encode every expert by itself, or with `halves` the two halves of its rows; return stacked tensors."""
    parts = [[encode(part) for part in (np.split(expert, 2) if halves else [expert])] for expert in w]
    tensors: Tensors = {}
    for suffix in parts[0][0][0]:
        of_parts = [[tensors[suffix] for tensors, _ in expert] for expert in parts]
        if np.size(of_parts[0][0]) == 1:
            tensors[suffix] = np.array([[np.asarray(x).reshape(()) for x in expert] for expert in of_parts])
        else:
            tensors[suffix] = np.stack([np.concatenate(expert) for expert in of_parts])
    return tensors, np.stack([np.concatenate([value for _, value in expert]) for expert in parts])


# name: quantization_config, encoder, endings of the tensors by suffix, whether gate and up have factors of their own,
# rows of an expert's gate, layout.
FUSED: dict[str, tuple[dict[str, Any], Encoder, dict[str, str], bool, int, str | None]] = {
    "nvfp4 of compressed-tensors": (
        NVFP4_COMPRESSED,
        encode_divided,
        {"weight_packed": "_packed", "weight_scale": "_scale", "weight_global_scale": "_global_scale"},
        False,
        64,
        "codes4",
    ),
    "nvfp4 of compressed-tensors, a divisor for each half": (
        NVFP4_COMPRESSED,
        encode_divided,
        {"weight_packed": "_packed", "weight_scale": "_scale", "weight_global_scale": "_global_scale"},
        True,
        64,
        "codes4",
    ),
    "nvfp4 of modelopt": (
        NVFP4_MODELOPT,
        encoders.encode_nvfp4,
        {"weight": "", "weight_scale": "_scale", "weight_scale_2": "_scale_2", "input_scale": ".input_scale"},
        True,
        64,
        "codes4",
    ),
    "fp8": (FP8, encode_fp8_inv, {"weight": "", "weight_scale_inv": "_scale_inv"}, False, 128, "fp8"),
    "fp8, scale": (FP8, encoders.encode_fp8, {"weight": "", "weight_scale": "_scale"}, False, 64, "fp8"),
    "fp8, weight_scale": (
        FP8,
        encoders.encode_fp8,
        {"weight": ".weight", "weight_scale": ".weight_scale"},
        False,
        64,
        "fp8",
    ),
    "fp8, a scale for each row": (
        FORMATS["float8 rows"].config,
        FORMATS["float8 rows"].encode,
        {"weight": "", "weight_scale": "_scale"},
        False,
        64,
        None,
    ),
    "fp8, a number for each half": (
        FORMATS["modelopt fp8"].config,
        encoders.encode_fp8_one_scale,
        {"weight": "", "weight_scale": "_scale", "input_scale": "_input_scale"},
        True,
        128,
        "fp8",
    ),
    "fp8, a number for each half of 64 rows": (
        FORMATS["modelopt fp8"].config,
        encoders.encode_fp8_one_scale,
        {"weight": "", "weight_scale": "_scale", "input_scale": "_input_scale"},
        True,
        64,
        None,
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_experts_are_read_expert_by_expert(name: str, tmp_path: Path) -> None:
    """unsloth 6224, sglang 18965, atlas 200: all experts of a layer in one tensor, with one scale tensor beside it."""
    config, encode, endings, halves, rows, layout = FUSED[name]
    tensors: Tensors = {}
    expected: dict[str, np.ndarray] = {}
    for last, shape in (("gate_up_proj", (EXPERTS, 2 * rows, HIDDEN)), ("down_proj", (EXPERTS, HIDDEN, rows))):
        encoded, value = encode_stack(encode, matrices(*shape), halves and last == "gate_up_proj")
        for suffix, array in encoded.items():
            one_for_expert = array.shape == (EXPERTS, 1) and last == "down_proj"
            array = np.ones((), np.float32) if suffix == "input_scale" else array[:, 0] if one_for_expert else array
            tensors[MOE + last + endings[suffix]] = array
        expected[f"layers.0.mlp.experts.{last}"] = value
    source = open_checkpoint(write_folder(tmp_path / "m", tensors, config))
    assert isinstance(source, QuantizedDirectory) and source.tensors.keys() == expected.keys()
    for tensor, value in expected.items():
        assert source.tensors[tensor].name == MOE + tensor.rpartition(".")[2]
        np.testing.assert_array_equal(source.read(tensor), value)
        packed = source.read_packed(tensor)
        is_split = halves and layout is None and "down" in tensor  # only gate and up have two numbers
        assert (packed and packed.layout) == ("fp8" if is_split else layout)
        if isinstance(packed, PackedArray):
            np.testing.assert_array_equal(packed.dequantize(), value)


def test_a_stack_with_a_wrong_scale_is_named(tmp_path: Path) -> None:
    tensors, _ = encode_stack(encode_fp8_inv, matrices(EXPERTS, 256, HIDDEN), False)
    named = {MOE + "gate_up_proj": tensors["weight"], MOE + "gate_up_proj_scale_inv": tensors["weight_scale_inv"][:2]}
    with pytest.raises(
        CheckpointError, match=r"gate_up_proj' is a stack of 3 experts, but 'weight_scale_inv' has shape"
    ):
        open_checkpoint(write_folder(tmp_path / "m", named, FP8))
    named[MOE + "gate_up_proj_scale_inv"] = tensors["weight_scale_inv"].repeat(2, 1)
    with pytest.raises(CheckpointError, match="scales do not fit a weight of 256 x 128"):
        open_checkpoint(write_folder(tmp_path / "n", named, FP8))


@pytest.mark.parametrize("encode", [encoders.encode_fp8, encoders.encode_fp8_one_scale, encode_fp8_inv])
def test_fp8_scales_have_two_names(encode: Encoder, tmp_path: Path) -> None:
    """atlas 200, AutoFP8: `weight_scale`, by blocks or one number, where Qwen writes `weight_scale_inv`."""
    tensors, value = with_names(encode, matrices(160, 128), "model.layers.0.a")
    source = open_checkpoint(write_folder(tmp_path / "m", tensors, FP8))
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)  # type: ignore[union-attr]
    del tensors[next(name for name in tensors if "scale" in name and "input" not in name)]
    with pytest.raises(CheckpointError, match="weight_scale_inv' is missing, and so is 'layers.0.a.weight_scale'"):
        open_checkpoint(write_folder(tmp_path / "n", tensors, FP8))


@pytest.mark.parametrize("shape", [(), (1,), (96,), (96, 1), (96, 1, 1)])
def test_convolutions_and_small_projections_may_be_fp8(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Model-Optimizer 2302: the whole gated-delta path in FP8."""
    base = "model.layers.0.linear_attn"
    encode = encoders.encode_fp8_one_scale if np.prod(shape) == 1 else partial(encoders.encode_fp8, rows=1, columns=0)
    encoded, value = encode(matrices(96, 4))
    tensors = {
        f"{base}.conv1d.weight": encoded["weight"][:, None],
        f"{base}.conv1d.weight_scale": encoded["weight_scale"].reshape(shape),
    }
    small, small_value = with_names(encoders.encode_fp8_one_scale, matrices(6, 96), f"{base}.in_proj_a")
    source = open_checkpoint(write_folder(tmp_path / "m", tensors | small, FORMATS["modelopt fp8"].config))
    assert isinstance(source, QuantizedDirectory)
    np.testing.assert_array_equal(source.read("layers.0.linear_attn.conv1d.weight"), value[:, None])
    assert source.read_packed("layers.0.linear_attn.conv1d.weight") is None
    np.testing.assert_array_equal(source.read("layers.0.linear_attn.in_proj_a.weight"), small_value)


def test_experts_in_nvfp4_beside_blocks_and_rows_of_fp8(tmp_path: Path) -> None:
    """FreeToken 296: `format: mixed-precision`, with three kinds of `weight_scale` in one folder."""
    float8 = partial(config_group, "float-quantized", num_bits=8, type="float", group_size=None)
    config = compressed_config(
        config_group("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
        float8(strategy="block", block_structure=[128, 128]),
        float8(strategy="channel"),
    )
    assert config["format"] == "mixed-precision"
    encoders_by_name: dict[str, Encoder] = {
        "experts.0.up_proj": encode_divided,
        "q_proj": encoders.encode_fp8,
        "o_proj": partial(encoders.encode_fp8, rows=1, columns=0),
    }
    tensors: Tensors = {}
    values: dict[str, np.ndarray] = {}
    for name, encode in encoders_by_name.items():
        encoded, values[f"layers.0.{name}.weight"] = with_names(encode, matrices(2048, 256), f"model.layers.0.{name}")
        tensors |= encoded
    assert tensors["model.layers.0.q_proj.weight_scale"].shape == (16, 2)
    source = open_checkpoint(write_folder(tmp_path / "m", tensors, config))
    for name, value in values.items():
        np.testing.assert_array_equal(source.read(name), value, err_msg=name)  # type: ignore[union-attr]
