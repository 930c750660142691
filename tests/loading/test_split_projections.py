"""Fused projections of Qwen3-Next: the right rows, packed or not, in every kind of folder; misfits are named."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import CheckpointError, QuantizedDirectory, SafetensorsDirectory, write_safetensors_directory
from mtpjax.config import ModelConfig
from mtpjax.loading.load import load_model
from mtpjax.loading.orbax_save import save_orbax
from mtpjax.loading.split_projections import SplitProjections, split_projections
from tests.helpers.golden_forms import write_form
from tests.helpers.models import tiny_config
from tests.helpers.quantized_folders import FORMATS

pytestmark = pytest.mark.fast
LAYER = "layers.0.linear_attn"
PARTS = ("qkv", "z", "b", "a")


def make_config(dim: int = 32, value_heads: int = 6) -> ModelConfig:
    return tiny_config(
        moe=True, hidden_size=128, linear_k_heads=2, linear_v_heads=value_heads, linear_k_dim=dim, linear_v_dim=dim
    )


def parts_by_head(fused: np.ndarray, ba: np.ndarray, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Split the tensors head by head, in the order of transformers' `fix_query_key_value_ordering`."""
    repeat = cfg.linear_v_heads // cfg.linear_k_heads
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*"qkvz", "b", "a")}
    for group in np.split(fused, cfg.linear_k_heads):
        sizes = [cfg.linear_k_dim] * 2 + [repeat * cfg.linear_v_dim] * 2
        for name, rows in zip("qkvz", np.split(group, np.cumsum(sizes)[:-1]), strict=True):
            found[name].append(rows)
    for group in np.split(ba, cfg.linear_k_heads):
        found["b"].append(group[:repeat])
        found["a"].append(group[repeat:])
    whole = {name: np.concatenate(pieces) for name, pieces in found.items()}
    return whole | {"qkv": np.concatenate([whole["q"], whole["k"], whole["v"]])}


def write_projections(folder: Path, cfg: ModelConfig, name: str | None) -> dict[str, np.ndarray]:
    """Write the two fused tensors of a layer, one of them quantised in a format, and return the true parts."""
    rng = np.random.default_rng(0)
    fused = rng.normal(0, 0.1, (cfg.conv_channels + cfg.value_size, cfg.hidden_size)).astype(np.float32)
    ba = rng.normal(0, 0.1, (2 * cfg.linear_v_heads, cfg.hidden_size)).astype(np.float32)
    tensors: dict[str, np.ndarray] = {"weight": fused}
    config: dict[str, Any] = {}
    if name is not None:
        tensors, fused = FORMATS[name].encode(fused)
        config = {"quantization_config": FORMATS[name].config}
    entries = [(f"model.{LAYER}.in_proj_qkvz.{suffix}", a) for suffix, a in tensors.items()]
    entries.append((f"model.{LAYER}.in_proj_ba.weight", ba))
    write_safetensors_directory(
        folder,
        {"model_type": "qwen3_next"} | config,
        [(name, a.shape, a.dtype, partial(_contiguous, a)) for name, a in entries],
    )
    return parts_by_head(fused, ba, cfg)


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray gives scalars an axis


@pytest.mark.parametrize("value_heads", [2, 4, 6])
def test_parts_are_the_rows_of_their_heads(value_heads: int, tmp_path: Path) -> None:
    cfg = make_config(value_heads=value_heads)
    want = write_projections(tmp_path, cfg, None)
    source = split_projections(SafetensorsDirectory(tmp_path), cfg)
    assert isinstance(source, SplitProjections)
    assert set(source.tensors) == {f"{LAYER}.in_proj_{part}.weight" for part in PARTS}
    for part in PARTS:
        name = f"{LAYER}.in_proj_{part}.weight"
        np.testing.assert_array_equal(source.read(name), want[part])
        assert source.tensors[name].shape == want[part].shape
        assert source.tensors[name].name == f"model.{name}"
        assert source.read_packed(name) is None
        out = np.empty(want[part].shape, np.float64)
        source.read_into(name, out)
        np.testing.assert_array_equal(out, want[part])


@pytest.mark.parametrize(
    ("name", "dim"),
    [("gptq", 32), ("awq", 32), ("gptq v1, zeros", 32), ("compressed-tensors, zeros, float32", 32), ("int8", 32)]
    + [("nvfp4", 32), ("mxfp4", 32), ("fp8", 128)],
)
def test_packed_parts_have_the_values_of_the_whole(name: str, dim: int, tmp_path: Path) -> None:
    cfg = make_config(dim)
    want = write_projections(tmp_path, cfg, name)
    source = split_projections(QuantizedDirectory(tmp_path), cfg)
    assert isinstance(source, SplitProjections)
    for part in ("qkv", "z"):
        tensor = f"{LAYER}.in_proj_{part}.weight"
        packed = source.read_packed(tensor)
        assert packed is not None and packed.layout in FORMATS[name].layouts
        np.testing.assert_array_equal(packed.dequantize(), want[part])
        np.testing.assert_array_equal(source.read(tensor), want[part])
        assert packed.nbytes < 4 * want[part].size


def test_torn_blocks_of_fp8_are_read_unpacked(tmp_path: Path) -> None:
    cfg = make_config(32)
    want = write_projections(tmp_path, cfg, "fp8")
    source = split_projections(QuantizedDirectory(tmp_path), cfg)
    assert isinstance(source, SplitProjections)
    assert source.read_packed(f"{LAYER}.in_proj_z.weight") is None
    np.testing.assert_array_equal(source.read(f"{LAYER}.in_proj_z.weight"), want["z"])


def test_a_source_without_fused_projections_is_left_alone(tmp_path: Path) -> None:
    source = SafetensorsDirectory(write_form(tmp_path, "tied_own_head"))
    assert split_projections(source, make_config()) is source


def test_misfits_are_named(tmp_path: Path) -> None:
    cfg = make_config()
    write_projections(tmp_path, cfg, None)
    source = SafetensorsDirectory(tmp_path)
    with pytest.raises(CheckpointError, match=r"in_proj_qkvz.weight' has shape \[512, 128\], expected \[640, 128\]"):
        split_projections(source, replace(cfg, linear_v_heads=8))
    tensors: dict[str, Any] = dict(source.tensors)
    name = f"{LAYER}.in_proj_z.weight"
    source.tensors = tensors | {name: replace(tensors[f"{LAYER}.in_proj_ba.weight"], name=name)}
    with pytest.raises(CheckpointError, match="has 'model.*qkvz.weight' and also .*in_proj_z.weight', expected one"):
        split_projections(source, cfg)


def test_not_a_number_in_a_part_is_named(tmp_path: Path) -> None:
    folder = write_form(tmp_path, "next")
    name = "layers.0.linear_attn.in_proj_qkvz.weight"
    source = SafetensorsDirectory(folder)
    with open(source.tensors[name].file, "r+b") as file:
        file.seek(source.tensors[name].offset)
        file.write(np.float32("nan").tobytes())
    with pytest.raises(CheckpointError, match="layers.0.linear_attn.in_proj_qkvz.weight' has 1 NaN"):
        load_model(SafetensorsDirectory(folder))


def test_an_orbax_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has fused projections as Qwen3-Next .*converted to GGUF"):
        save_orbax(tmp_path / "orbax", SafetensorsDirectory(write_form(tmp_path / "hf", "next")))
