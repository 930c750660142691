"""Quantised folders in forms that other tools than the formats' own write: fused experts, other names and places."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import (
    CheckpointError,
    CheckpointWarning,
    QuantizedDirectory,
    SafetensorsDirectory,
    open_checkpoint,
    write_safetensors_directory,
)
from checkpoints.packed_array import PackedArray
from tests.helpers import quantized_encoders as encoders
from tests.helpers.quantized_encoders import BF16, Encoder
from tests.helpers.quantized_folders import FORMATS, PublishedFormat, Tensors, compressed_config, config_group

pytestmark = pytest.mark.fast

EXPERTS, HIDDEN = 3, 128
MOE = "model.language_model.layers.0.mlp.experts."
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NVFP4_COMPRESSED = FORMATS["nvfp4, divided"].config
NVFP4_MODELOPT = FORMATS["nvfp4"].config
encode_divided = partial(encoders.encode_nvfp4, compressed_tensors=True)
encode_fp8_inv = partial(encoders.encode_fp8, scale_suffix="weight_scale_inv")


def write(path: Path, tensors: Tensors, settings: Any = None, **config: Any) -> Path:
    """Write a folder; `settings` is its quantization_config, if there is one."""
    own = {"quantization_config": settings} if settings is not None else {}

    def contiguous(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array).reshape(array.shape)

    entries = [(name, array.shape, array.dtype, partial(contiguous, array)) for name, array in tensors.items()]
    write_safetensors_directory(path, {"model_type": "qwen3_5_moe"} | own | config, entries)
    return path


def matrices(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


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
    source = open_checkpoint(write(tmp_path / "m", tensors, config))
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
        open_checkpoint(write(tmp_path / "m", named, FP8))
    named[MOE + "gate_up_proj_scale_inv"] = tensors["weight_scale_inv"].repeat(2, 1)
    with pytest.raises(CheckpointError, match="scales do not fit a weight of 256 x 128"):
        open_checkpoint(write(tmp_path / "n", named, FP8))


def with_names(encode: Encoder, w: np.ndarray, base: str) -> tuple[Tensors, np.ndarray]:
    encoded, value = encode(w)
    return {f"{base}.{suffix}": array for suffix, array in encoded.items()}, value


@pytest.mark.parametrize("encode", [encoders.encode_fp8, encoders.encode_fp8_one_scale, encode_fp8_inv])
def test_fp8_scales_have_two_names(encode: Encoder, tmp_path: Path) -> None:
    """atlas 200, AutoFP8: `weight_scale`, by blocks or one number, where Qwen writes `weight_scale_inv`."""
    tensors, value = with_names(encode, matrices(160, 128), "model.layers.0.a")
    source = open_checkpoint(write(tmp_path / "m", tensors, FP8))
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)  # type: ignore[union-attr]
    del tensors[next(name for name in tensors if "scale" in name and "input" not in name)]
    with pytest.raises(CheckpointError, match="weight_scale_inv' is missing, and so is 'layers.0.a.weight_scale'"):
        open_checkpoint(write(tmp_path / "n", tensors, FP8))


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
    source = open_checkpoint(write(tmp_path / "m", tensors | small, FORMATS["modelopt fp8"].config))
    assert isinstance(source, QuantizedDirectory)
    np.testing.assert_array_equal(source.read("layers.0.linear_attn.conv1d.weight"), value[:, None])
    assert source.read_packed("layers.0.linear_attn.conv1d.weight") is None
    np.testing.assert_array_equal(source.read("layers.0.linear_attn.in_proj_a.weight"), small_value)


def mixed_modelopt() -> dict[str, Any]:
    layers = {"mtp.layers.0.mlp.experts": {"quant_algo": "FP8_BLOCK_SCALES"}, "a": {"quant_algo": "NVFP4"}}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "kv_cache_quant_algo": "FP8"}


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json", "both"])
def test_modelopt_settings_may_be_in_a_file_of_their_own(place: str, tmp_path: Path) -> None:
    """sglang 38121: FP8_BLOCK_SCALES in MIXED_PRECISION, with `weight_scale_inv`; settings in older files."""
    a, a_value = with_names(encoders.encode_nvfp4, matrices(64, 64), "model.layers.0.a")
    b, b_value = with_names(encode_fp8_inv, matrices(256, 128), "mtp.layers.0.b")
    own = {"quant_method": "modelopt"} | mixed_modelopt() if place != "hf_quant_config.json" else None
    path = write(tmp_path / "m", a | b, own)
    if place != "config.json":
        settings = mixed_modelopt() if place != "both" else {"quant_algo": "W8A16"}
        content = {"producer": {"name": "modelopt"}, "quantization": settings | {"group_size": None}}
        (path / "hf_quant_config.json").write_text(json.dumps(content))
    source = open_checkpoint(path)
    assert isinstance(source, QuantizedDirectory)
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), a_value)
    np.testing.assert_array_equal(source.read("mtp.layers.0.b.weight"), b_value)


def test_a_cache_alone_does_not_make_a_folder_quantised(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"model.layers.0.a.weight": matrices(4, 4)})
    (path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}})
    )
    assert type(open_checkpoint(path)) is SafetensorsDirectory


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
    source = open_checkpoint(write(tmp_path / "m", tensors, config))
    for name, value in values.items():
        np.testing.assert_array_equal(source.read(name), value, err_msg=name)  # type: ignore[union-attr]


@pytest.mark.parametrize("encode", [encoders.encode_nvfp4, partial(encoders.encode_fp8, rows=1, columns=0)])
def test_a_quantised_lm_head_is_read(encode: Encoder, tmp_path: Path) -> None:
    """vllm 45102, omlx 2659: NVFP4 or FP8 with a scale for each row, under the plain name."""
    config = {"quant_method": "modelopt"} | mixed_modelopt()
    tensors, value = with_names(encode, matrices(512, 128), "lm_head")
    source = open_checkpoint(write(tmp_path / "m", tensors, config))
    assert source.tensors.keys() == {"lm_head.weight"}  # type: ignore[union-attr]
    np.testing.assert_array_equal(source.read("lm_head.weight"), value)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float8_e4m3fn", "int32", "uint32"])
@pytest.mark.parametrize("quantization", [None, FP8], ids=["plain", "fp8"])
def test_bytes_that_no_format_claims_are_refused(dtype: str, quantization: Any, tmp_path: Path) -> None:
    """TensorRT-Model-Connect 1115: raw codes taken for weights."""
    import ml_dtypes  # noqa: F401 - knows float8_e4m3fn

    tensors = {"model.layers.0.a.codes": np.ones((4, 4)).astype(dtype), "model.norm.weight": np.ones(4, np.float32)}
    with pytest.raises(
        CheckpointError, match=r"1 tensor\(s\) hold single bytes or packed words.*'model.layers.0.a.codes'"
    ):
        open_checkpoint(write(tmp_path / "m", tensors, quantization))


def mlx_convolution() -> Tensors:
    return {"language_model.model.layers.0.linear_attn.conv1d.weight": np.ones((96, 4, 1), BF16)}


def mlx_words() -> Tensors:
    return {"language_model.model.layers.0.a.weight": np.ones((4, 4), np.uint32)}


@pytest.mark.parametrize(
    ("tensors", "config", "sign"),
    [
        (mlx_convolution, {}, r"conv1d.weight' has shape \[96, 4, 1\]"),
        (mlx_words, {"quantization": {"group_size": 64, "bits": 4}}, "'quantization' with 'bits'"),
        (mlx_words, {"quantization_config": {"group_size": 64, "bits": 4}}, "'quantization_config' with 'bits'"),
        (mlx_convolution, {"model_type": "qwen3_5_mtp"}, "model_type 'qwen3_5_mtp'"),
    ],
)
def test_a_folder_for_mlx_is_recognised(
    tensors: Callable[[], Tensors], config: dict[str, Any], sign: str, tmp_path: Path
) -> None:
    """mlx-lm 1197 and many others: norms that have 1 added or not, which nothing in the file tells."""
    with pytest.raises(CheckpointError, match=f"was converted for MLX .*{sign}.*use the original files"):
        open_checkpoint(write(tmp_path / "m", tensors(), **config))


def test_null_settings_are_absent_and_unknown_ones_are_named(tmp_path: Path) -> None:
    name = "gptq v1, zeros"
    fmt: PublishedFormat = FORMATS[name]
    tensors, value = with_names(fmt.encode, matrices(64, 64), "model.layers.0.a")
    nulls = {"checkpoint_format": None, "rotation_config": None, "desc_act": None, "some_new_key": None}
    source = open_checkpoint(write(tmp_path / "m", tensors, fmt.config | nulls))
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)  # type: ignore[union-attr]
    with pytest.warns(
        CheckpointWarning, match=r"quantization_config has 1 unknown key.*'desc_atc' \(did you mean 'desc_act'"
    ):
        open_checkpoint(write(tmp_path / "n", tensors, fmt.config | {"desc_atc": True}))
    plain = write(tmp_path / "p", {"model.layers.0.a.weight": value}, {"quant_method": None})
    assert type(open_checkpoint(plain)) is SafetensorsDirectory


@pytest.mark.parametrize("file", ["model.safetensors-00001-of-00001.safetensors", "model-00001-of-00001.safetensors"])
def test_any_name_of_the_only_file_is_read(file: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"model.layers.0.a.weight": matrices(4, 4)})
    (path / "model.safetensors").rename(path / file)
    index = {"metadata": {}, "weight_map": {"model.layers.0.a.weight": file}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(path).tensors.keys() == {"layers.0.a.weight"}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["compressed-tensors, zeros", "int8, zeros"])
@pytest.mark.parametrize("symmetric", [True, None])
def test_zero_points_count_whatever_the_settings_say(name: str, symmetric: bool | None, tmp_path: Path) -> None:
    """Settings that call a weight symmetric although its zero points are there: the tensors are right."""
    config = json.loads(json.dumps(FORMATS[name].config))
    config["config_groups"]["a"]["weights"]["symmetric"] = symmetric
    tensors, value = with_names(FORMATS[name].encode, matrices(64, 64), "model.layers.0.a")
    source = open_checkpoint(write(tmp_path / "m", tensors, config))
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)  # type: ignore[union-attr]


def test_zero_points_of_symmetric_formats_must_be_zero(tmp_path: Path) -> None:
    for name in ("float8 blocks", "compressed-tensors"):
        tensors, value = with_names(FORMATS[name].encode, matrices(128, 128), "model.layers.0.a")
        scale = tensors["model.layers.0.a.weight_scale"]
        for number, zero in enumerate((0, 1)):
            tensors["model.layers.0.a.weight_zero_point"] = np.full(scale.shape, zero, np.int8)
            source = open_checkpoint(write(tmp_path / f"{name}{number}", tensors, FORMATS[name].config))
            assert isinstance(source, QuantizedDirectory)
            if not zero:
                np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)
                continue
            with pytest.raises(CheckpointError, match="'weight_zero_point' is not zero, expected a symmetric weight"):
                source.read("layers.0.a.weight")
