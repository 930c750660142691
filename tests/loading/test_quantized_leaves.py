"""Packed weights in the program: kept as a GGUF file has them, or quantised while they are read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import TINY, open_checkpoint, write_gguf, write_safetensors_directory
from checkpoints.gguf.file import GgufFile
from checkpoints.packed_array import to_common_layout
from checkpoints.quantize import MODES, quantize
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax import LLM, SamplingParams
from mtpjax.config import FULL, LINEAR
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.quantized_leaves import can_quantize
from mtpjax.loading.weight_map import LoadedModel, export_tensors, flat, random_model
from tests.helpers.models import numpy_model, tiny_config

SIZES: dict[str, Any] = {
    "hidden_size": 64, "head_dim": 32, "rotary_dim": 8, "linear_k_dim": 32, "linear_v_dim": 32, "expert_size": 32,
    "shared_expert_size": 32, "vocab_size": 128, "layer_pattern": (LINEAR, FULL),
}  # fmt: skip
IDS = np.random.default_rng(3).integers(0, 90, 30).tolist()


def dequantised(model: LoadedModel) -> LoadedModel:
    def plain(leaf: Any) -> Any:
        return leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf

    return replace(model, params=jax.tree.map(plain, model.params, is_leaf=lambda x: isinstance(x, QuantizedTensor)))


def packed_leaves(model: LoadedModel) -> int:
    leaves = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    return sum(isinstance(leaf, QuantizedTensor) for leaf in leaves)


@pytest.fixture(scope="module", params=[True, False], ids=["moe", "dense"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "m"
    cfg = tiny_config(moe=request.param, **SIZES)
    write_safetensors_directory(path, config_to_hf(cfg), export_tensors(numpy_model(cfg)))
    return path


def same_text(one: LLM, other: LLM) -> None:
    np.testing.assert_allclose(one.logits(IDS), other.logits(IDS), atol=1e-4)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    (a,), (b,) = (llm.generate([IDS], params) for llm in (one, other))
    assert a.token_ids == b.token_ids and a.metrics.num_accepted_tokens_per_pos == b.metrics.num_accepted_tokens_per_pos


@pytest.mark.parametrize("mode", MODES)
def test_quantised_on_load(folder: Path, mode: str) -> None:
    """The packed model computes what its dequantised weights compute, drafts included; most of its matrices are packed."""
    model = load_checkpoint(open_checkpoint(folder), dtype=jnp.float32, weights=mode)
    assert packed_leaves(model) >= 20
    llm = LLM(folder, num_speculative_tokens=2, max_model_len=64, quantization=mode)
    same_text(llm, LLM(dequantised(model), num_speculative_tokens=2, max_model_len=64))
    plain = LLM(folder, num_speculative_tokens=2, max_model_len=64).logits(IDS)
    assert 0.7 < np.corrcoef(llm.logits(IDS).ravel(), plain.ravel())[0, 1] < 1 - 1e-7  # quantised it is


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "iq4_nl"])
def test_a_gguf_file_stays_packed(kind: str, tmp_path: Path) -> None:
    """Kept packed it computes what it computes dequantised; each tensor's packed values are those that are read."""
    cfg = tiny_config(moe=True, linear_v_heads=6, **SIZES)
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(numpy_model(cfg))]
    write_gguf(tmp_path / "m.gguf", config_to_hf(cfg), tensors, kind)
    source = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(source, GgufFile)
    seen = 0
    for name in source.tensors:
        if (packed := source.read_packed(name)) is not None:
            np.testing.assert_array_equal(packed.dequantize(), source.read(name))
            seen += 1
    assert seen >= 20
    same_text(
        LLM(tmp_path / "m.gguf", num_speculative_tokens=2, max_model_len=64, quantization="packed"),
        LLM(tmp_path / "m.gguf", num_speculative_tokens=2, max_model_len=64),
    )


def test_weights_of_several_forms_become_one() -> None:
    """Exactly: four and eight bits, groups of 16 and 32, with and without offsets."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 64)).astype(np.float32)
    four, eight = quantize(x, "iq4nl"), quantize(x, "int8")
    fine = replace(eight, group=16, scale=eight.scale.repeat(2, axis=-1).astype(np.float32))
    moved = replace(four, offset=rng.normal(size=four.scale.shape).astype(np.float32))
    for before, after in zip((four, fine, moved), to_common_layout([four, fine, moved]), strict=True):
        assert (after.layout, after.group) == ("codes8", 16)
        np.testing.assert_array_equal(after.dequantize(), before.dequantize())


@pytest.mark.parametrize(("mode", "bits"), [("int4", 4.5), ("iq4nl", 4.5), ("int8", 8.5), ("fp8", 8.0)])
def test_bytes_and_error_of_each_mode(mode: str, bits: float) -> None:
    """Bits an element with scales; the error on normal weights is that of the width."""
    x = np.random.default_rng(1).normal(size=(256, 512)).astype(np.float32)
    packed = quantize(x, mode)
    assert 8 * (packed.codes.nbytes + packed.scale.nbytes) / x.size == pytest.approx(bits, abs=0.01)
    error = np.sqrt(np.mean((packed.dequantize() - x) ** 2))
    assert error < {"int4": 0.10, "iq4nl": 0.08, "int8": 0.008, "fp8": 0.03}[mode]


@pytest.mark.slow
def test_the_embedded_model_in_four_bits() -> None:
    """Text does not depend on the draft length there either; three quarters of the bytes are gone."""
    prompt = ["Once upon a time there was a fox, and"]
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3)
    llms = [LLM(num_speculative_tokens=k, quantization="iq4nl", max_model_len=128) for k in (0, 3)]
    first, second = (llm.generate(prompt, params)[0].token_ids for llm in llms)
    assert first == second
    size, plain = (
        sum(
            leaf.nbytes
            for leaf in jax.tree.leaves(load_checkpoint(open_checkpoint(TINY), dtype=jnp.float32, weights=w).params)
        )
        for w in ("iq4nl", None)
    )
    assert size < 0.17 * plain


def test_what_cannot_be_is_said(folder: Path) -> None:
    with pytest.raises(ValueError, match="weights is 'int3'; expected None or one of 'packed', 'int4'"):
        LLM(folder, quantization="int3")
    with pytest.raises(ValueError, match="weights='packed' is for GGUF files and quantised folders"):
        LLM(folder, quantization="packed")


@pytest.mark.parametrize("weights", ["int4", "int8", "iq4nl", "fp8"])
def test_random_packed_weights_have_the_form_and_spread_of_loaded_ones(weights):
    """As `load_model` would pack them: same leaves packed, same layout, shapes and dtypes; deviation as asked, none repeated."""
    cfg = tiny_config(moe=True, num_superblocks=1, **SIZES)
    model = random_model(cfg, weights=weights, scale=0.02)
    leaves = flat(model.params)
    packed = {path: leaf[...] for path, leaf in leaves.items() if isinstance(leaf[...], QuantizedTensor)}
    assert packed.keys() == {path for path, leaf in leaves.items() if can_quantize(path, leaf[...].shape, weights)}
    assert any(path[-1] == "gate_up" for path in packed)
    for path, leaf in packed.items():
        want = quantize(np.ones(leaf.shape, np.float32), weights)
        assert (leaf.layout, leaf.group, leaf.table) == (want.layout, want.group, want.table)
        assert (leaf.codes.shape, leaf.codes.dtype) == (want.codes.shape, want.codes.dtype)
        assert leaf.scale.shape == want.scale.shape
        values = np.asarray(leaf.dequantize())
        assert values.size < 1000 or abs(values.std() / 0.02 - 1) < 0.15, path
        matrices = values.reshape(-1, *values.shape[-2:])
        assert len(matrices) == 1 or (matrices[0] != matrices[1]).any()
    LLM(model, num_speculative_tokens=1, max_model_len=64, max_num_seqs=1).generate(
        [[1, 2, 3]], SamplingParams(max_tokens=3)
    )


def test_random_packed_weights_need_a_form():
    with pytest.raises(ValueError, match="'packed', which is for GGUF files"):
        random_model(tiny_config(moe=True, num_superblocks=1, **SIZES), weights="packed")


@pytest.mark.parametrize("weights", MODES)
def test_vectors_the_router_and_the_gates_are_never_packed(weights):
    """With 32 heads the gates of DeltaNet would make whole groups."""
    cfg = tiny_config(moe=True, num_superblocks=1, **{**SIZES, "linear_v_heads": 32, "linear_k_heads": 16})
    leaves = flat(random_model(cfg, weights=weights).params)
    names = {path[-1] for path, leaf in leaves.items() if isinstance(leaf[...], QuantizedTensor)}
    assert ("gate_up" in names) and not names & {
        "a_log",
        "dt_bias",
        "conv",
        "in_a",
        "in_b",
        "norm",
        "input_norm",
        "router",
        "shared_gate",
    }
