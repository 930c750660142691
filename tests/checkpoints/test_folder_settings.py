"""Settings of quantised folders: where they are, what they leave out, and what the tensors say in spite of them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import CheckpointError, CheckpointWarning, QuantizedDirectory, SafetensorsDirectory, open_checkpoint
from tests.helpers import quantized_encoders as encoders
from tests.helpers.fuzz_files import run
from tests.helpers.quantized_encoders import BF16, Encoder
from tests.helpers.quantized_folders import FORMATS, PublishedFormat, Tensors, matrices, with_names, write_folder

pytestmark = pytest.mark.fast
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
encode_fp8_inv = partial(encoders.encode_fp8, scale_suffix="weight_scale_inv")


def mixed_modelopt() -> dict[str, Any]:
    layers = {"mtp.layers.0.mlp.experts": {"quant_algo": "FP8_BLOCK_SCALES"}, "a": {"quant_algo": "NVFP4"}}
    return {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "kv_cache_quant_algo": "FP8"}


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json", "both"])
def test_modelopt_settings_may_be_in_a_file_of_their_own(place: str, tmp_path: Path) -> None:
    """sglang 38121: FP8_BLOCK_SCALES in MIXED_PRECISION, with `weight_scale_inv`; settings in older files."""
    a, a_value = with_names(encoders.encode_nvfp4, matrices(64, 64), "model.layers.0.a")
    b, b_value = with_names(encode_fp8_inv, matrices(256, 128), "mtp.layers.0.b")
    own = {"quant_method": "modelopt"} | mixed_modelopt() if place != "hf_quant_config.json" else None
    path = write_folder(tmp_path / "m", a | b, own)
    if place != "config.json":
        settings = mixed_modelopt() if place != "both" else {"quant_algo": "W8A16"}
        content = {"producer": {"name": "modelopt"}, "quantization": settings | {"group_size": None}}
        (path / "hf_quant_config.json").write_text(json.dumps(content))
    source = open_checkpoint(path)
    assert isinstance(source, QuantizedDirectory)
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), a_value)
    np.testing.assert_array_equal(source.read("mtp.layers.0.b.weight"), b_value)


def test_a_cache_alone_does_not_make_a_folder_quantised(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m", {"model.layers.0.a.weight": matrices(4, 4)})
    (path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}})
    )
    assert type(open_checkpoint(path)) is SafetensorsDirectory


@pytest.mark.parametrize("encode", [encoders.encode_nvfp4, partial(encoders.encode_fp8, rows=1, columns=0)])
def test_a_quantised_lm_head_is_read(encode: Encoder, tmp_path: Path) -> None:
    """vllm 45102, omlx 2659: NVFP4 or FP8 with a scale for each row, under the plain name."""
    config = {"quant_method": "modelopt"} | mixed_modelopt()
    tensors, value = with_names(encode, matrices(512, 128), "lm_head")
    source = open_checkpoint(write_folder(tmp_path / "m", tensors, config))
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
        open_checkpoint(write_folder(tmp_path / "m", tensors, quantization))


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
        open_checkpoint(write_folder(tmp_path / "m", tensors(), **config))


def test_null_settings_are_absent_and_unknown_ones_are_named(tmp_path: Path) -> None:
    name = "gptq v1, zeros"
    fmt: PublishedFormat = FORMATS[name]
    tensors, value = with_names(fmt.encode, matrices(64, 64), "model.layers.0.a")
    nulls = {"checkpoint_format": None, "rotation_config": None, "desc_act": None, "some_new_key": None}
    source = open_checkpoint(write_folder(tmp_path / "m", tensors, fmt.config | nulls))
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)  # type: ignore[union-attr]
    with pytest.warns(
        CheckpointWarning, match=r"quantization_config has 1 unknown key.*'desc_atc' \(did you mean 'desc_act'"
    ):
        open_checkpoint(write_folder(tmp_path / "n", tensors, fmt.config | {"desc_atc": True}))
    plain = write_folder(tmp_path / "p", {"model.layers.0.a.weight": value}, {"quant_method": None})
    assert type(open_checkpoint(plain)) is SafetensorsDirectory


@pytest.mark.parametrize("file", ["model.safetensors-00001-of-00001.safetensors", "model-00001-of-00001.safetensors"])
def test_any_name_of_the_only_file_is_read(file: str, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "m", {"model.layers.0.a.weight": matrices(4, 4)})
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
    source = open_checkpoint(write_folder(tmp_path / "m", tensors, config))
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)  # type: ignore[union-attr]


def test_zero_points_of_symmetric_formats_must_be_zero(tmp_path: Path) -> None:
    for name in ("float8 blocks", "compressed-tensors"):
        tensors, value = with_names(FORMATS[name].encode, matrices(128, 128), "model.layers.0.a")
        scale = tensors["model.layers.0.a.weight_scale"]
        for number, zero in enumerate((0, 1)):
            tensors["model.layers.0.a.weight_zero_point"] = np.full(scale.shape, zero, np.int8)
            source = open_checkpoint(write_folder(tmp_path / f"{name}{number}", tensors, FORMATS[name].config))
            assert isinstance(source, QuantizedDirectory)
            if not zero:
                np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)
                continue
            with pytest.raises(CheckpointError, match="'weight_zero_point' is not zero, expected a symmetric weight"):
                source.read("layers.0.a.weight")


# The settings that the libraries write beside those that matter here.
TYPICAL: dict[str, dict[str, Any]] = {
    "fp8": {"activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]},
    "gptq": {"sym": True, "lm_head": False, "pack_dtype": "int32", "meta": {"damp_percent": 0.05}, "dynamic": {}},
    "awq": {"zero_point": True, "group_size": 32, "modules_to_not_convert": None, "do_fuse": False},
    "auto-round": {"sym": True, "iters": 200, "autoround_version": "0.9", "block_name_to_quantize": "model.layers"},
    "compressed-tensors": {
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    },
    "nvfp4": {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.37.0"},
        "kv_cache_scheme": {"num_bits": 8},
    },
}


@pytest.mark.parametrize("name", TYPICAL)
def test_typical_settings_raise_no_warning(name: str, tmp_path: Path) -> None:
    tensors, value = with_names(FORMATS[name].encode, matrices(128, 128), "model.layers.0.a")
    source = open_checkpoint(write_folder(tmp_path / "m", tensors, FORMATS[name].config | TYPICAL[name]))
    np.testing.assert_array_equal(source.read("layers.0.a.weight"), value)  # type: ignore[union-attr]


def test_random_changes_are_right_or_named(tmp_path: Path) -> None:
    """`python -m tests.helpers.fuzz_files` runs many more."""
    counts = run(160, 0, tmp_path)
    assert {"loaded", "loaded with a warning", "refused"} <= counts.keys() and counts["refused"] > 40
