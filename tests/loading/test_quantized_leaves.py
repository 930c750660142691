"""Packed weights in the parameter tree: kept as a GGUF file has them, or quantised while they are read."""

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
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.models import PACKABLE_SIZES, numpy_model, tiny_config

IDS = np.random.default_rng(3).integers(0, 90, 30).tolist()


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def dequantized(model: LoadedModel) -> LoadedModel:
    """Return the model with its packed weights as plain arrays of the same values."""
    params = jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, model.params, is_leaf=is_packed)
    return replace(model, params=params)


def count_packed_leaves(model: LoadedModel) -> int:
    return sum(map(is_packed, jax.tree.leaves(model.params, is_leaf=is_packed)))


def count_bytes(quantization: str | None) -> int:
    """Return the size of the embedded model in memory."""
    model = load_checkpoint(open_checkpoint(TINY), dtype=jnp.float32, quantization=quantization)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))


@pytest.fixture(scope="module", params=[True, False], ids=["moe", "dense"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "m"
    cfg = tiny_config(moe=request.param, **PACKABLE_SIZES)
    write_safetensors_directory(path, config_to_hf(cfg), export_tensors(numpy_model(cfg)))
    return path


def assert_same_text(first: LLM, second: LLM) -> None:
    np.testing.assert_allclose(first.logits(IDS), second.logits(IDS), atol=1e-4)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    (a,), (b,) = (llm.generate([IDS], params) for llm in (first, second))
    assert a.token_ids == b.token_ids and a.metrics.num_accepted_tokens_per_pos == b.metrics.num_accepted_tokens_per_pos


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_quantized_on_load(folder: Path, mode: str) -> None:
    """The packed model computes what its dequantised weights do, drafts included; most matrices are packed."""
    model = load_checkpoint(open_checkpoint(folder), dtype=jnp.float32, quantization=mode)
    assert count_packed_leaves(model) >= 20
    llm = LLM(folder, dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization=mode)
    assert_same_text(llm, LLM(dequantized(model), num_speculative_tokens=2, max_model_len=64))
    plain = LLM(folder, dtype="float32", num_speculative_tokens=2, max_model_len=64).logits(IDS)
    assert (
        0.7 < np.corrcoef(llm.logits(IDS).ravel(), plain.ravel())[0, 1] < 1 - 1e-7
    )  # near the unquantised model, but not equal to it


@pytest.mark.slow
@pytest.mark.parametrize("tensor_type", ["q8_0", "q4_0", "iq4_nl"])
def test_a_gguf_file_stays_packed(tensor_type: str, tmp_path: Path) -> None:
    """The packed model computes what the dequantised one does; packed tensors have the values that `read` returns."""
    cfg = tiny_config(moe=True, linear_v_heads=6, **PACKABLE_SIZES)
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(numpy_model(cfg))]
    write_gguf(tmp_path / "m.gguf", config_to_hf(cfg), tensors, tensor_type)
    source = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(source, GgufFile)
    num_packed = 0
    for name in source.tensors:
        if (packed := source.read_packed(name)) is not None:
            np.testing.assert_array_equal(packed.dequantize(), source.read(name))
            num_packed += 1
    assert num_packed >= 20
    assert_same_text(
        LLM(tmp_path / "m.gguf", dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization="packed"),
        LLM(tmp_path / "m.gguf", dtype="float32", num_speculative_tokens=2, max_model_len=64),
    )


def test_weights_of_several_layouts_get_a_common_one() -> None:
    """Without a change of value: four and eight bits, groups of 16 and 32, with and without offsets."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 64)).astype(np.float32)
    four_bits, eight_bits = quantize(x, "iq4nl"), quantize(x, "int8")
    fine = replace(eight_bits, group=16, scale=eight_bits.scale.repeat(2, axis=-1).astype(np.float32))
    with_offset = replace(four_bits, offset=rng.normal(size=four_bits.scale.shape).astype(np.float32))
    weights = [four_bits, fine, with_offset]
    for before, after in zip(weights, to_common_layout(weights), strict=True):
        assert (after.layout, after.group) == ("codes8", 16)
        np.testing.assert_array_equal(after.dequantize(), before.dequantize())


@pytest.mark.parametrize(("mode", "bits"), [("int4", 4.5), ("iq4nl", 4.5), ("int8", 8.5), ("fp8", 8.0)])
def test_bytes_and_error_of_each_mode(mode: str, bits: float) -> None:
    """Bits per element include scales; the relative error on normal weights is that of the width."""
    x = np.random.default_rng(1).normal(size=(256, 512)).astype(np.float32)
    packed = quantize(x, mode)
    assert 8 * (packed.codes.nbytes + packed.scale.nbytes) / x.size == pytest.approx(bits, abs=0.01)
    error = np.sqrt(np.mean((packed.dequantize() - x) ** 2))
    assert error < {"int4": 0.10, "iq4nl": 0.08, "int8": 0.008, "fp8": 0.03}[mode]


@pytest.mark.slow
def test_the_embedded_model_in_four_bits() -> None:
    """The text does not depend on the draft length; the weights take less than 17 % of the bytes."""
    prompt = ["Once upon a time there was a fox, and"]
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3)
    llms = [LLM(num_speculative_tokens=k, quantization="iq4nl", max_model_len=128) for k in (0, 3)]
    first, second = (llm.generate(prompt, params)[0].token_ids for llm in llms)
    assert first == second
    assert count_bytes("iq4nl") < 0.17 * count_bytes(None)


def test_an_impossible_quantization_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantization is 'int3'; expected None or one of 'packed', 'int4'"):
        LLM(folder, quantization="int3")
    with pytest.raises(ValueError, match="quantization='packed' is for GGUF files and quantised folders"):
        LLM(folder, quantization="packed")
