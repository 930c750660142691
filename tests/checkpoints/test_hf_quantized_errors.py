"""Published quantised folders that are unsupported or damaged: the error names the file, the setting and the remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import CheckpointError, QuantizedDirectory, SafetensorsDirectory
from tests.helpers.quantized_folders import (
    FORMATS,
    Change,
    Tensors,
    compressed_config,
    config_group,
    write_three_matrices,
)

pytestmark = pytest.mark.fast

CT, ZEROS, AUTO_ROUND = "compressed-tensors", "compressed-tensors, zeros", "auto-round"


def drop(suffix: str) -> Change:
    """Remove the first tensor whose name ends with `suffix`."""

    def change(tensors: Tensors) -> None:
        del tensors[next(name for name in tensors if name.endswith(suffix))]

    return change


def edit(suffix: str, function: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Apply `function` to the first tensor whose name ends with `suffix`."""

    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith(suffix))
        tensors[name] = function(tensors[name])

    return change


def add_group_index(suffix: str, selection: slice) -> Change:
    """Add or replace the group index of the matrix `c`: the usual one, at `selection`."""

    def change(tensors: Tensors) -> None:
        tensors[f"model.layers.0.c.{suffix}"] = (np.arange(128) // 32)[selection].astype(np.int32)

    return change


def group_config(format_name: str, **weights: Any) -> dict[str, Any]:
    return compressed_config(config_group(format_name, **weights))


def check_error(path: Path, name: str, message: str, change: Change | None = None, **settings: Any) -> None:
    """Check that opening or reading a folder fails with `message`, after a change of its tensors or settings."""
    fmt = FORMATS[name]
    write_three_matrices(path, fmt._replace(config=fmt.config | settings), change)
    with pytest.raises(CheckpointError, match=message):
        source = QuantizedDirectory(path / "packed")
        for tensor in source.tensors:
            source.read(tensor)


PACK4, PACK8 = (config_group("pack-quantized", num_bits=bits, strategy="channel", group_size=None) for bits in (4, 8))
BLOCKS_OF_64 = group_config("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[64, 64])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fp8", {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\], expected \[128, 128\]"),
        ("gptq", {"bits": 3}, "quant_method 'gptq'.*bits is 3, expected 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', expected 'gptq' or 'gptq_v2'"),
        (AUTO_ROUND, {"packing_format": "auto_round:mx"}, "is 'auto_round:mx', expected 'auto_round:auto_gptq'"),
        (AUTO_ROUND, {"rotation_config": {"hadamard": 32}}, "rotation_config is .*'hadamard'"),
        ("awq", {"version": "gemv"}, "version is 'gemv', expected 'gemm'"),
        (CT, group_config("marlin-24"), "config_groups: a: format is 'marlin-24', expected 'pack-quantized'"),
        (CT, group_config("pack-quantized", num_bits=3), "config_groups: a: num_bits is 3, expected 4 or 8"),
        (CT, group_config("pack-quantized", group_size=64), "do not fit .*one for each 64 elements of a row"),
        (CT, compressed_config(PACK4), "scales do not fit"),
        (CT, {"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}, "config_groups names no weights"),
        (CT, {"config_groups": ["a"]}, "config_groups is \\['a'\\], expected an object"),
        (CT, {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is .*'R1'.*expected {}"),
        (CT, {"sparsity_config": {"format": "sparse"}}, "sparsity_config: format is 'sparse', expected 'dense'"),
        (CT, BLOCKS_OF_64, r"config_groups: a: block_structure is \[64, 64\], expected \[128, 128\]"),
        ("nvfp4", {"quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ', expected 'NVFP4'"),
        ("nvfp4", {"quant_algo": "FP8"}, "a.weight' is U8, expected F8_E4M3, as quantization_config says, or floats"),
        ("modelopt mixed", {"quantized_layers": {"x": {"quant_algo": "W4A8"}}}, "layers: x: quant_algo is 'W4A8'"),
        ("nvfp4", {"quant_method": "bitsandbytes"}, "'bitsandbytes'.*not supported yet; expected fp8, gptq"),
    ],
)
def test_an_unsupported_setting_is_named(name: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    check_error(tmp_path, name, message, **settings)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp8", drop("weight_scale_inv"), r"is quantised, but '.*weight_scale_inv' is missing"),
        ("fp8", edit("weight_scale_inv", lambda x: x[:, :0]), "scales do not fit a weight of .*each 128 x 128"),
        ("fp8", edit(".weight_scale_inv", lambda x: np.full_like(x, np.nan)), "weight_scale_inv' has 3 NaN"),
        ("fp8, powers of two", edit(".weight_scale_inv", lambda x: x * 0 + 255), "0.a.weight': scales hold NaN"),
        ("gptq", add_group_index("g_idx", np.s_[::-1]), "'layers.0.c.weight': 'g_idx' reorders columns"),
        ("gptq", edit("qzeros", lambda x: x[:, :1]), "scales do not fit"),
        ("gptq", edit("qzeros", lambda x: x[:, : x.shape[1] // 2]), "a.qweight' holds 2 bits, expected 4 or 8"),
        ("gptq", edit("scales", lambda x: x.astype(np.int32)), "a.scales' is I32, expected F16 or BF16 or F32"),
        ("gptq", edit("scales", lambda x: x[0]), "a.qweight' or its scales are not matrices"),
        (CT, add_group_index("weight_g_idx", np.s_[::-1]), "'weight_g_idx' reorders columns"),
        (CT, add_group_index("weight_g_idx", np.s_[:64]), "'weight_g_idx' reorders columns"),
        (CT, edit("weight_packed", lambda x: x[None]), r"a.weight_packed' is .* \[1, 128, 48\], expected a matrix"),
        (ZEROS, drop("weight_zero_point"), "is quantised, but '.*weight_zero_point' is missing"),
        (ZEROS, edit("weight_zero_point", lambda x: x[:1]), "scales do not fit .*zeros packed along the rows"),
        ("nvfp4, divided", edit("weight_global_scale", lambda x: x * 0), "scales hold NaN or infinity"),
        ("nvfp4, divided", edit("weight_global_scale", lambda x: x.repeat(2)), "do not fit .*one factor for all"),
    ],
)
def test_a_damaged_tensor_is_named(name: str, change: Change, message: str, tmp_path: Path) -> None:
    check_error(tmp_path, name, message, change)


def test_a_weight_that_fits_two_formats_is_named(tmp_path: Path) -> None:
    """Words with one scale for a row may hold four or eight bits; zero points would tell."""

    def without_zero_points(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_zero_point")]:
            del tensors[name]

    message = "a.weight_packed' fits several of the formats"
    check_error(tmp_path, "compressed-tensors, rows", message, without_zero_points, **compressed_config(PACK4, PACK8))


def test_activation_order_needs_a_group_index(tmp_path: Path) -> None:
    check_error(tmp_path, "gptq", "is quantised, but '.*g_idx' is missing", drop("g_idx"), desc_act=True)


def test_a_plain_group_index_and_tensors_of_activations_are_accepted(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        add_group_index("weight_g_idx", np.s_[:])(tensors)
        for suffix in ("input_global_scale", "k_scale", "output_scale"):
            tensors[f"model.layers.0.c.{suffix}"] = np.ones(1, np.float32)

    write_three_matrices(tmp_path, FORMATS[CT], change)
    source, plain = QuantizedDirectory(tmp_path / "packed"), SafetensorsDirectory(tmp_path / "plain")
    assert source.tensors.keys() == plain.tensors.keys()
    np.testing.assert_array_equal(source.read("layers.0.c.weight"), plain.read("layers.0.c.weight"))
