"""Published quantised folders (FP8, GPTQ, AutoRound, AWQ, compressed-tensors, modelopt): values, whole models, bad files."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from checkpoints import CheckpointError, QuantisedDirectory, open_checkpoint, write_safetensors_directory
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax import LLM
from mtpjax.config import FULL, LINEAR
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.weight_map import export_tensors
from tests.helpers.models import numpy_model, tiny_config
from tests.helpers.quantized_encoders import FORMATS, compressed_config, config

SIZES: dict[str, Any] = {
    "hidden_size": 128, "head_dim": 32, "rotary_dim": 8, "linear_k_dim": 32, "linear_v_dim": 32, "expert_size": 128,
    "shared_expert_size": 128, "vocab_size": 128, "layer_pattern": (LINEAR, FULL),
}  # fmt: skip
LEFT_ALONE = (
    "norm", "conv1d", "gate.weight", "shared_expert_gate", "in_proj_a", "in_proj_b", "embed_tokens", "lm_head", "mtp.fc", "A_log",
    "dt_",
)  # fmt: skip
WHOLE = (
    "fp8", "gptq v1, zeros", "awq", "compressed-tensors, rows", "int8, zeros", "float8 rows", "nvfp4, divided", "modelopt mixed",
)  # fmt: skip


def per_expert(name: str, w: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Fused experts as published quantised checkpoints have them: one tensor a matrix of an expert."""
    if not name.endswith(("gate_up_proj", "down_proj")) or w.ndim != 3:
        yield name, w
        return
    prefix, _, last = name.rpartition(".")
    for e, one in enumerate(w):
        names = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for part, matrix in zip(names, np.split(one, len(names)), strict=True):
            yield f"{prefix}.{e}.{part}.weight", matrix


def save(path: Path, kind: str, weights: dict[str, np.ndarray], cfg: dict, change: Any = None, **settings: Any) -> Path:
    """`path/plain` with the dequantised weights, `path/packed` with the quantised ones."""
    quantisation, encode, _ = FORMATS[kind]
    plain, packed = {}, {}
    for name, w in weights.items():
        if w.ndim != 2 or any(part in name for part in LEFT_ALONE):
            plain[name] = packed[name] = w
            continue
        parts, plain[name] = encode(w)
        packed |= {name.removesuffix("weight") + part: array for part, array in parts.items()}
    if change:
        change(packed)
    for folder, tensors, extra in (
        ("plain", plain, {}),
        ("packed", packed, {"quantization_config": quantisation | settings}),
    ):
        table = [
            (n, w.shape, w.dtype, lambda w=w: np.ascontiguousarray(w).reshape(w.shape)) for n, w in tensors.items()
        ]
        write_safetensors_directory(path / folder, cfg | extra, table)
    return path


def write(path: Path, kind: str, change: Any = None, **settings: Any) -> Path:
    """A whole model."""
    cfg = tiny_config(moe=True, linear_v_heads=6, **SIZES)
    weights = {
        each: w
        for name, _, _, read in export_tensors(numpy_model(cfg, stack=1), 1)
        for each, w in per_expert(name, read().astype(np.float32))
    }
    return save(path, kind, weights, config_to_hf(cfg), change, **settings)


def write_three(path: Path, kind: str, change: Any = None, **settings: Any) -> Path:
    """Three matrices, one of them square; rows of one sign have zero points at the ends of the range."""
    rng = np.random.default_rng(0)
    shapes = {"a": (128, 384), "b": (320, 128), "c": (128, 128)}
    weights = {
        f"model.layers.0.{n}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()
    }
    for w in weights.values():
        w[3::5] = np.abs(w[3::5])
        w[4::5] = -np.abs(w[4::5])
    return save(path, kind, weights, {"model_type": "qwen3_5"}, change, **settings)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_value_is_exact(kind: str, tmp_path: Path) -> None:
    write_three(tmp_path, kind)
    source, plain = open_checkpoint(tmp_path / "packed"), open_checkpoint(tmp_path / "plain")
    assert isinstance(source, QuantisedDirectory)
    assert source.tensors.keys() == plain.tensors.keys()
    layouts = set()
    for name in plain.tensors:
        want = plain.read(name)
        np.testing.assert_array_equal(source.read(name), want, err_msg=name)
        if (kept := source.read_packed(name)) is not None:
            np.testing.assert_array_equal(kept.dequantize(), want, err_msg=name)
            layouts.add(kept.layout)
    assert layouts == set(FORMATS[kind][2].split())


@pytest.mark.parametrize("kind", WHOLE)
def test_a_quantised_folder_is_the_model_of_its_values(kind: str, tmp_path: Path) -> None:
    """Dequantised or packed it computes what the plain folder of the same values computes."""
    write(tmp_path, kind)
    source = open_checkpoint(tmp_path / "packed")
    assert source.tensors.keys() == open_checkpoint(tmp_path / "plain").tensors.keys()
    ids = np.random.default_rng(0).integers(0, 90, 20).tolist()
    want = LLM(tmp_path / "plain", dtype="float32", num_speculative_tokens=2, max_model_len=64).logits(ids)
    for weights in (None, "packed"):
        llm = LLM(tmp_path / "packed", dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization=weights)
        assert np.abs(llm.logits(ids) - want).max() <= 1e-4 * np.abs(want).max()
    model = load_checkpoint(source, dtype=np.dtype("float32"), weights="packed")
    leaves = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    layouts = [leaf.layout for leaf in leaves if isinstance(leaf, QuantizedTensor)]
    assert len(layouts) >= 10 * bool(FORMATS[kind][2]) and set(layouts) == set(FORMATS[kind][2].split())


def test_experts_of_fp8_and_other_types_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layout holds both: a layer whose down projections are FP8 and whose others are NVFP4 keeps its values."""
    monkeypatch.setitem(SIZES, "expert_size", 256)
    mixed, encode, layouts = FORMATS["modelopt mixed"]
    halves = (lambda w: encode(w) if w[0, 0] > 0 else FORMATS["nvfp4"][1](w), layouts)
    monkeypatch.setitem(FORMATS, "by chance", (mixed, *halves))
    write(tmp_path, "by chance")
    ids = list(range(20))
    want = LLM(tmp_path / "plain", dtype="float32", num_speculative_tokens=2, max_model_len=64).logits(ids)
    got = LLM(tmp_path / "packed", dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization="packed").logits(ids)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_what_cannot_share_blocks_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of 64 rows, whose gate and up would share a block of FP8 scales, and embeddings, of which single rows are read."""
    monkeypatch.setitem(SIZES, "expert_size", 64)
    monkeypatch.setattr(
        sys.modules[__name__], "LEFT_ALONE", tuple(part for part in LEFT_ALONE if part != "embed_tokens")
    )
    write(tmp_path, "fp8")
    ids = list(range(20))
    want = LLM(tmp_path / "plain", dtype="float32", num_speculative_tokens=2, max_model_len=64).logits(ids)
    got = LLM(tmp_path / "packed", dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization="packed").logits(ids)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def drop(suffix: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[next(name for name in tensors if name.endswith(suffix))]

    return change


def edit(suffix: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in tensors if name.endswith(suffix))
        tensors[name] = how(tensors[name])

    return change


def order(name: str, which: slice) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"model.layers.0.c.{name}"] = (np.arange(128) // 32)[which].astype(np.int32)

    return change


CT, ZEROS, ROUND = "compressed-tensors", "compressed-tensors, zeros", "auto-round"
BLOCKS = config("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[64, 64])
PACK4, PACK8 = (config("pack-quantized", num_bits=bits, strategy="channel", group_size=None) for bits in (4, 8))


@pytest.mark.parametrize(
    ("kind", "settings", "change", "message"),
    [
        ("fp8", {"weight_block_size": [64, 64]}, None, r"weight_block_size is \[64, 64\], expected \[128, 128\]"),
        ("fp8", {}, drop("weight_scale_inv"), r"is quantised, but '.*weight_scale_inv' is not there"),
        ("fp8", {}, edit("weight_scale_inv", lambda x: x[:, :0]), "scales do not fit a weight of .*one for each 128 x 128"),
        ("fp8", {}, edit(".weight_scale_inv", lambda x: np.full_like(x, np.nan)), "weight_scale_inv' has 3 NaN"),
        ("fp8, powers of two", {}, edit(".weight_scale_inv", lambda x: x * 0 + 255), "'layers.0.a.weight': scales hold NaN"),
        ("gptq", {"bits": 3}, None, "quant_method 'gptq'.*bits is 3, expected 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, None, "checkpoint_format is 'marlin', expected 'gptq' or 'gptq_v2'"),
        ("gptq", {"desc_act": True}, drop("g_idx"), "is quantised, but '.*g_idx' is not there"),
        ("gptq", {}, order("g_idx", np.s_[::-1]), "'layers.0.c.weight': 'g_idx' reorders columns"),
        ("gptq", {}, edit("qzeros", lambda x: x[:, :1]), "scales do not fit"),
        ("gptq", {}, edit("qzeros", lambda x: x[:, : x.shape[1] // 2]), "a.qweight' holds 2 bits, expected 4 or 8"),
        ("gptq", {}, edit("scales", lambda x: x.astype(np.int32)), "a.scales' is I32, expected F16 or BF16 or F32"),
        (ROUND, {"packing_format": "auto_round:mx"}, None, "packing_format is 'auto_round:mx', expected 'auto_round:auto_gptq'"),
        (ROUND, {"rotation_config": {"hadamard": 32}}, None, "rotation_config is .*'hadamard'"),
        ("awq", {"version": "gemv"}, None, "version is 'gemv', expected 'gemm'"),
        (CT, compressed_config(config("marlin-24")), None, "config_groups: a: format is 'marlin-24', expected 'pack-quantized'"),
        (CT, compressed_config(config("pack-quantized", num_bits=3)), None, "config_groups: a: num_bits is 3, expected 4 or 8"),
        (CT, compressed_config(config("pack-quantized", group_size=64)), None, "do not fit .*one for each 64 elements of a row"),
        (CT, compressed_config(PACK4), None, "scales do not fit"),
        ("compressed-tensors, rows", compressed_config(PACK4, PACK8), None, "a.weight_packed' fits several of the formats"),
        (CT, {"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}, None, "config_groups names no weights"),
        (CT, {"config_groups": ["a"]}, None, "quantization_config cannot be understood"),
        (CT, {"transform_config": {"config_groups": {"R1": {}}}}, None, "transform_config is .*'R1'.*expected {}"),
        (CT, {"sparsity_config": {"format": "sparse"}}, None, "sparsity_config: format is 'sparse', expected 'dense'"),
        (CT, {}, order("weight_g_idx", np.s_[::-1]), "'weight_g_idx' reorders columns"),
        (ZEROS, {}, drop("weight_zero_point"), "is quantised, but '.*weight_zero_point' is not there"),
        (ZEROS, {}, edit("weight_zero_point", lambda x: x[:1]), "scales do not fit .*zeros packed along the rows"),
        (CT, compressed_config(BLOCKS), None, r"config_groups: a: block_structure is \[64, 64\], expected \[128, 128\]"),
        (CT, {}, order("weight_g_idx", np.s_[:64]), "'weight_g_idx' reorders columns"),
        (CT, {}, edit("weight_packed", lambda x: x[None]), r"a.weight_packed' is .* shape \[1, 128, 48\], expected a matrix"),
        ("gptq", {}, edit("scales", lambda x: x[0]), "a.qweight' or its scales are no matrices"),
        ("nvfp4, divided", {}, edit("weight_global_scale", lambda x: x * 0), "scales hold NaN or infinity"),
        ("nvfp4, divided", {}, edit("weight_global_scale", lambda x: x.repeat(2)), "do not fit .*one factor for all"),
        ("nvfp4", {"quant_algo": "NVFP4_AWQ"}, None, "quant_algo is 'NVFP4_AWQ', expected 'NVFP4'"),
        ("nvfp4", {"quant_algo": "FP8"}, None, "a.weight' is U8, expected F8_E4M3, as quantization_config says, or floats"),
        ("modelopt mixed", {"quantized_layers": {"x": {"quant_algo": "W4A8"}}}, None, "layers: x: quant_algo is 'W4A8'"),
        ("nvfp4", {"quant_method": "bitsandbytes"}, None, "'bitsandbytes'.*not supported yet; expected fp8, gptq"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(kind: str, settings: dict, change: Any, message: str, tmp_path: Path) -> None:
    write_three(tmp_path, kind, change, **settings)
    with pytest.raises(CheckpointError, match=message):
        source = open_checkpoint(tmp_path / "packed")
        for name in source.tensors:
            source.read(name)


def test_a_plain_order_and_what_activations_need_are_no_hindrance(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        order("weight_g_idx", np.s_[:])(tensors)
        for name in ("input_global_scale", "k_scale", "output_scale"):
            tensors[f"model.layers.0.c.{name}"] = np.ones(1, np.float32)

    write_three(tmp_path, CT, change)
    source, plain = open_checkpoint(tmp_path / "packed"), open_checkpoint(tmp_path / "plain")
    assert source.tensors.keys() == plain.tensors.keys()
    np.testing.assert_array_equal(source.read("layers.0.c.weight"), plain.read("layers.0.c.weight"))
