"""Published quantised folders (block FP8, GPTQ, AWQ, compressed-tensors, NVFP4): exact values, whole models, bad files.

The encoders here are written from the formats' descriptions and share nothing with the reader.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import numpy_model, tiny_config

from checkpoints import CheckpointError, QuantisedDirectory, open_checkpoint, write_safetensors_directory
from kernels_pallas.quantized import QuantizedTensor
from mtpjax import LLM
from mtpjax.config import FULL, LINEAR
from mtpjax.loading import load_checkpoint
from mtpjax.weights import export_tensors

SIZES: dict[str, Any] = {
    "hidden_size": 128, "head_dim": 32, "rotary_dim": 8, "linear_k_dim": 32, "linear_v_dim": 32, "expert_size": 128,
    "shared_expert_size": 128, "vocab_size": 128, "pattern": (LINEAR, FULL),
}  # fmt: skip
LEFT_ALONE = (
    "norm", "conv1d", "gate.weight", "shared_expert_gate", "in_proj_a", "in_proj_b", "embed_tokens", "lm_head", "mtp.fc", "A_log",
    "dt_",
)  # fmt: skip
GROUP = 32
Encoded = tuple[dict[str, np.ndarray], np.ndarray]  # tensors by suffix, and the weight that they stand for


def packed_words(q: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """Eight values along the last axis to an int32; nibble n holds value order[n]."""
    eight = q.reshape(*q.shape[:-1], -1, 8).astype(np.uint32)
    words = sum(eight[..., value] << np.uint32(4 * nibble) for nibble, value in enumerate(order))
    return np.asarray(words, np.uint32).view(np.int32)


def ints(w: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q `[O, D]`, scale and zero `[O, D / GROUP]`, and `(q - zero) * scale`."""
    blocks = w.reshape(len(w), -1, GROUP)
    low, high = blocks.min(-1), blocks.max(-1)
    scale = (np.maximum((high - low) / 15, np.abs(blocks).max(-1) / 7.5 if symmetric else 1e-6)).astype(np.float16)
    wide = scale.astype(np.float32)
    zero = np.full(scale.shape, 8.0) if symmetric else np.clip(np.rint(-low / wide), 1, 15)
    q = np.clip(np.rint(blocks / wide[..., None] + zero[..., None]), 0, 15)
    value = ((q - zero[..., None]) * wide[..., None].astype(np.float64)).reshape(w.shape)
    return q.reshape(w.shape).astype(np.uint8), scale, zero.astype(np.uint8), value.astype(np.float32)


def fp8(w: np.ndarray) -> Encoded:
    high, wide = -(-w.shape[0] // 128), -(-w.shape[1] // 128)
    scale = np.empty((high, wide), ml_dtypes.bfloat16)
    codes, value = np.empty(w.shape, ml_dtypes.float8_e4m3fn), np.empty(w.shape, np.float32)
    for i in range(high):
        for j in range(wide):
            at = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            scale[i, j] = np.abs(w[at]).max() / 400
            codes[at] = (w[at] / np.float32(scale[i, j])).astype(codes.dtype)
            value[at] = codes[at].astype(np.float32) * np.float32(scale[i, j])
    return {"weight": codes, "weight_scale_inv": scale}, value


def gptq(w: np.ndarray, symmetric: bool = True, first: int = 1) -> Encoded:
    q, scale, zero, value = ints(w, symmetric)
    parts = {"qweight": packed_words(q).T, "qzeros": packed_words(zero.T - first), "scales": scale.T}
    return parts | {"g_idx": (np.arange(w.shape[1]) // GROUP).astype(np.int32)}, value


def awq(w: np.ndarray) -> Encoded:
    q, scale, zero, value = ints(w, False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": packed_words(q.T, order), "qzeros": packed_words(zero.T, order), "scales": scale.T}, value


def compressed(w: np.ndarray) -> Encoded:
    q, scale, _, value = ints(w, True)
    return {"weight_packed": packed_words(q), "weight_scale": scale, "weight_shape": np.array(w.shape, np.int64)}, value


def nvfp4(w: np.ndarray) -> Encoded:
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    whole = np.float32(np.abs(w).max() / (6 * 448))
    blocks = w.reshape(len(w), -1, 16)
    scale = (np.abs(blocks).max(-1) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    wide = (scale.astype(np.float32) * whole)[..., None]
    q = np.abs(blocks[..., None] - table * wide[..., None]).argmin(-1).reshape(w.shape).astype(np.uint8)
    value = table[q].reshape(blocks.shape) * wide
    parts = {"weight": q[:, ::2] | q[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": np.array(whole)}
    return parts | {"input_scale": np.array(np.float32(1))}, value.reshape(w.shape)


FORMATS: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], Encoded], str]] = {
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8, "fp8"),
    "gptq": ({"quant_method": "gptq", "bits": 4, "desc_act": False}, gptq, "codes4"),
    "gptq v2, zeros": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, False, 0), "codes4"
    ),
    "auto-round": ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}, gptq, "codes4"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq, "codes4"),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True}}},
        },
        compressed, "codes4",
    ),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4, "codes4"),
}  # fmt: skip


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


def write(path: Path, kind: str, change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None, **settings: Any) -> Path:
    """`path/plain` with the dequantised weights, `path/packed` with the quantised ones."""
    cfg = tiny_config(moe=True, linear_v_heads=6, **SIZES)
    config, encode, _ = FORMATS[kind]
    plain, packed = {}, {}
    for name, _, _, read in export_tensors(numpy_model(cfg, stack=1), 1):
        for each, w in per_expert(name, read().astype(np.float32)):
            if w.ndim != 2 or any(part in each for part in LEFT_ALONE):
                plain[each] = packed[each] = w
                continue
            parts, plain[each] = encode(w)
            packed |= {each.removesuffix("weight") + part: array for part, array in parts.items()}
    change(packed)
    for folder, tensors, extra in (("plain", plain, {}), ("packed", packed, {"quantization_config": config | settings})):
        table = [(n, w.shape, w.dtype, lambda w=w: np.ascontiguousarray(w).reshape(w.shape)) for n, w in tensors.items()]
        write_safetensors_directory(path / folder, cfg.to_hf() | extra, table)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_folder_is_the_model_of_its_values(kind: str, tmp_path: Path) -> None:
    """Every weight bit for bit; dequantised or packed it computes what the plain folder of the same values computes."""
    write(tmp_path, kind)
    source, plain = open_checkpoint(tmp_path / "packed"), open_checkpoint(tmp_path / "plain")
    assert isinstance(source, QuantisedDirectory)
    assert source.tensors.keys() == plain.tensors.keys()
    packed = 0
    for name in plain.tensors:
        want = plain.read(name)
        np.testing.assert_array_equal(source.read(name), want, err_msg=name)
        if (kept := source.read_packed(name)) is not None:
            np.testing.assert_array_equal(kept.dequantize(), want, err_msg=name)
            packed += 1
    assert packed >= 30
    ids = np.random.default_rng(0).integers(0, 90, 20).tolist()
    want = LLM(tmp_path / "plain", draft=2, max_len=64).logits(ids)
    for weights in (None, "packed"):
        llm = LLM(tmp_path / "packed", draft=2, max_len=64, weights=weights)
        assert np.abs(llm.logits(ids) - want).max() <= 1e-4 * np.abs(want).max()
    model = load_checkpoint(source, dtype=np.dtype("float32"), weights="packed")
    leaves = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    layouts = [leaf.layout for leaf in leaves if isinstance(leaf, QuantizedTensor)]
    assert len(layouts) >= 10 and set(layouts) == {FORMATS[kind][2]}


def test_experts_that_share_no_blocks_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of 64 rows: gate and up would share a block of FP8 scales, so they are kept unpacked, with the same values."""
    monkeypatch.setitem(SIZES, "expert_size", 64)
    write(tmp_path, "fp8")
    ids = list(range(20))
    want = LLM(tmp_path / "plain", draft=2, max_len=64).logits(ids)
    got = LLM(tmp_path / "packed", draft=2, max_len=64, weights="packed").logits(ids)
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


@pytest.mark.parametrize(
    ("kind", "settings", "change", "message"),
    [
        ("fp8", {"weight_block_size": [64, 64]}, None, r"weight_block_size is \[64, 64\], expected \[128, 128\]"),
        ("fp8", {}, drop("weight_scale_inv"), r"is quantised, but '.*weight_scale_inv' is not there"),
        ("fp8", {}, edit("weight_scale_inv", lambda x: x[:, :0]), "scales do not fit a weight of .*one for each of 128 x 128"),
        ("gptq", {"bits": 8}, None, "quant_method 'gptq'.*bits is 8, expected 4"),
        ("gptq", {"desc_act": True}, None, "desc_act is True, expected False"),
        ("gptq", {}, edit("g_idx", lambda x: x[::-1].copy()), "'g_idx' reorders columns"),
        ("gptq", {}, edit("qzeros", lambda x: x[:, :1]), "scales do not fit"),
        ("awq", {"version": "gemv"}, None, "version is 'gemv', expected 'gemm'"),
        ("compressed-tensors", {"format": "naive-quantized"}, None, "format is 'naive-quantized', expected 'pack-quantized'"),
        ("nvfp4", {"quant_algo": "FP8"}, None, "quant_algo is 'FP8', expected 'NVFP4'"),
        ("nvfp4", {"quant_method": "bitsandbytes"}, None, "'bitsandbytes'.*not supported yet; expected fp8, gptq"),
        ("fp8", {}, edit(".weight_scale_inv", lambda x: np.full_like(x, np.nan)), "NaN"),
    ],
)
def test_what_is_not_read_is_named(kind: str, settings: dict, change: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path, kind, change or (lambda tensors: None), **settings)
    with pytest.raises(CheckpointError, match=message):
        LLM(tmp_path / "packed", draft=1, max_len=64)
