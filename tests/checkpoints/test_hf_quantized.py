"""Published quantised folders (FP8, GPTQ, AutoRound, AWQ, compressed-tensors, modelopt): values and whole models."""

from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints import QuantizedDirectory, SafetensorsDirectory, open_checkpoint
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax import LLM
from mtpjax.loading.load import load_checkpoint
from tests.helpers.quantized_encoders import Encoded
from tests.helpers.quantized_folders import FORMATS, UNQUANTIZED, write_model, write_three_matrices

# One format for each way of decoding: whole models take longer than three matrices.
WHOLE_MODEL_FORMATS = (
    "fp8",
    "gptq v1, zeros",
    "awq",
    "compressed-tensors, rows",
    "int8, zeros",
    "float8 rows",
    "nvfp4, divided",
    "modelopt mixed",
)


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_is_exact(name: str, tmp_path: Path) -> None:
    write_three_matrices(tmp_path, FORMATS[name])
    source, plain = open_checkpoint(tmp_path / "packed"), SafetensorsDirectory(tmp_path / "plain")
    assert isinstance(source, QuantizedDirectory)
    assert source.tensors.keys() == plain.tensors.keys()
    layouts = set()
    for tensor in plain.tensors:
        expected = plain.read(tensor)
        np.testing.assert_array_equal(source.read(tensor), expected, err_msg=tensor)
        if (packed := source.read_packed(tensor)) is not None:
            np.testing.assert_array_equal(packed.dequantize(), expected, err_msg=tensor)
            layouts.add(packed.layout)
    assert layouts == set(FORMATS[name].layouts)


@pytest.mark.parametrize("name", WHOLE_MODEL_FORMATS)
def test_a_quantised_folder_is_the_model_of_its_values(name: str, tmp_path: Path) -> None:
    """Dequantised or packed, the model computes what the plain folder of the same values computes."""
    write_model(tmp_path, FORMATS[name])
    source = QuantizedDirectory(tmp_path / "packed")
    assert source.tensors.keys() == SafetensorsDirectory(tmp_path / "plain").tensors.keys()
    ids = np.random.default_rng(0).integers(0, 90, 20).tolist()
    expected = LLM(tmp_path / "plain", dtype="float32", num_speculative_tokens=2, max_model_len=64).logits(ids)
    for weights in (None, "packed"):
        llm = LLM(
            tmp_path / "packed", dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization=weights
        )
        assert np.abs(llm.logits(ids) - expected).max() <= 1e-4 * np.abs(expected).max()
    model = load_checkpoint(source, dtype=np.dtype("float32"), quantization="packed")
    leaves = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    layouts = [leaf.layout for leaf in leaves if isinstance(leaf, QuantizedTensor)]
    assert len(layouts) >= 10 * bool(FORMATS[name].layouts) and set(layouts) == set(FORMATS[name].layouts)


def assert_packed_computes_as_plain(path: Path) -> None:
    ids = list(range(20))
    expected = LLM(path / "plain", dtype="float32", num_speculative_tokens=2, max_model_len=64).logits(ids)
    logits = LLM(
        path / "packed", dtype="float32", num_speculative_tokens=2, max_model_len=64, quantization="packed"
    ).logits(ids)
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def test_experts_in_fp8_and_another_layout_are_unpacked(tmp_path: Path) -> None:
    """No layout holds both: a layer whose down projections are FP8 and whose others are NVFP4 keeps its values."""
    mixed = FORMATS["modelopt mixed"]

    def encode(w: np.ndarray) -> Encoded:
        return mixed.encode(w) if w[0, 0] > 0 else FORMATS["nvfp4"].encode(w)

    write_model(tmp_path, mixed._replace(encode=encode), expert_size=256)
    assert_packed_computes_as_plain(tmp_path)


def test_rows_that_would_split_a_block_of_scales_are_unpacked(tmp_path: Path) -> None:
    """Gate and up of experts with 64 rows would share a block of FP8 scales; of embeddings, single rows are read."""
    unquantized = tuple(part for part in UNQUANTIZED if part != "embed_tokens")
    write_model(tmp_path, FORMATS["fp8"], unquantized, expert_size=64)
    assert_packed_computes_as_plain(tmp_path)
