"""Metadata of GGUF files that are wrong, of another model, without an effect, or advice about sampling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import CheckpointError, CheckpointWarning, open_checkpoint
from mtpjax import SamplingParams
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.weight_map import check_source
from tests.helpers.gguf_files import GgufContents, assert_same, random_gguf

pytestmark = pytest.mark.fast
MTP = "blk.4."  # behind the four layers


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with an MTP head, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    random_gguf(path)
    return path


@pytest.mark.parametrize("block_count", [5, 4])
def test_metadata_that_promise_a_head_are_not_believed(block_count: int, original: Path, tmp_path: Path) -> None:
    """llama.cpp 26916 and 24737: `nextn_predict_layers` is 1, and no block has a head."""
    contents = GgufContents.read(original)
    contents.drop(MTP)
    contents.set(block_count=block_count, nextn_predict_layers=1)
    contents.write(tmp_path / "m.gguf")
    with pytest.warns(
        CheckpointWarning, match=rf"block_count is {block_count} .* has 4 layers and no tensor of a head"
    ):
        assert_same(tmp_path / "m.gguf", original, without="mtp.")


@pytest.mark.parametrize("block_count", [5, 4])
def test_a_head_that_metadata_do_not_mention_is_found(block_count: int, original: Path, tmp_path: Path) -> None:
    contents = GgufContents.read(original)
    contents.set(block_count=block_count, nextn_predict_layers=None)
    contents.write(tmp_path / "m.gguf")
    with pytest.warns(CheckpointWarning, match="has 4 layers and a head in block 4"):
        assert_same(tmp_path / "m.gguf", original)


def test_a_missing_layer_is_never_taken_for_a_smaller_model(original: Path, tmp_path: Path) -> None:
    contents = GgufContents.read(original)
    contents.drop("blk.3.")
    with pytest.raises(CheckpointError, match=r"gate\.weight' \(blk\.3\.ffn_gate_inp\.weight\) is missing"):
        check_source(open_checkpoint(contents.write(tmp_path / "middle.gguf")))  # type: ignore[arg-type]
    contents.drop(MTP)
    contents.set(nextn_predict_layers=None, block_count=4)
    with pytest.raises(CheckpointError, match=r"gate\.weight' \(blk\.3\.ffn_gate_inp\.weight\) is missing"):
        check_source(open_checkpoint(contents.write(tmp_path / "last.gguf")))  # type: ignore[arg-type]


def test_half_a_head_is_refused_and_the_trunk_loads(original: Path, tmp_path: Path) -> None:
    """Of a block with attention alone, the error lists what is missing and how to do without."""
    contents = GgufContents.read(original)
    contents.drop(MTP + "nextn.")
    source = open_checkpoint(contents.write(tmp_path / "m.gguf"))
    with pytest.raises(
        CheckpointError, match=r"fc\.weight' \(blk.*\) is missing(.|\n)*num_speculative_tokens=0"
    ) as caught:
        check_source(source)  # type: ignore[arg-type]
    assert "3 missing, 0 mis-shaped and 0 unexpected" in str(caught.value)
    assert "16 of the 19 tensors of its MTP head are there" in str(caught.value)  # its norm is the final one
    assert load_checkpoint(source, dtype=np.dtype("float32"), mtp=False).cfg.mtp_layers == 0


def sampling(original: Path, path: Path, **values: Any) -> dict[str, Any]:
    """Return the generation config of a file with this advice under `general.sampling`."""
    contents = GgufContents.read(original)
    contents.metadata |= {f"general.sampling.{name}": value for name, value in values.items()}
    return open_checkpoint(contents.write(path)).generation_config


def test_sampling_advice_is_read(original: Path, tmp_path: Path) -> None:
    """`general.sampling.*`, as the converters of Qwen3.5 write it; -1 is llama.cpp's "all" for top_k."""
    config = sampling(original, tmp_path / "a", temp=0.6, top_k=20, top_p=0.95, min_p=0.01, penalty_repeat=1.05)
    params = SamplingParams.from_generation_config(config)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.6, 20, 0.95, 0.01)
    assert params.repetition_penalty == 1.05
    harmless = {"penalty_last_n": -1, "xtc_probability": 0.0, "mirostat": 0, "xtc_threshold": 0.1, "sequence": "kpt"}
    config = sampling(original, tmp_path / "b", temp=1.0, top_k=-1, **harmless)
    assert SamplingParams.from_generation_config(config).top_k == 0
    with pytest.warns(
        CheckpointWarning, match=r"2 setting\(s\) .* general.sampling.mirostat = 2, .*xtc_probability = 0.5"
    ):
        sampling(original, tmp_path / "c", mirostat=2, xtc_probability=0.5)
    with pytest.warns(CheckpointWarning, match="penalty_last_n = 64"):
        sampling(original, tmp_path / "d", penalty_last_n=64, penalty_repeat=1.1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.type", 7, "rope.scaling.type is 7, expected a text"),
        ("norm_top_k_prob", False, "norm_top_k_prob is False, expected True"),
        ("leading_dense_block_count", 2, "leading_dense_block_count is 2, expected 0"),
        ("attention.recurrent_layers", 4, "attention.recurrent_layers is 4, expected a list"),
    ],
)
def test_metadata_of_another_model_are_refused(
    key: str, value: Any, message: str, original: Path, tmp_path: Path
) -> None:
    contents = GgufContents.read(original)
    contents.metadata[f"{contents.architecture}.{key}"] = value
    with pytest.raises(CheckpointError, match=f"m.gguf: the metadata qwen35moe.{message}"):
        open_checkpoint(contents.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("qwen35moe.rope.dimension_cout", 8), ("something.else", "x"), ("tokenizer.ggml.add_bos_token", True)],
)
def test_metadata_without_an_effect_are_named(key: str, value: Any, original: Path, tmp_path: Path) -> None:
    contents = GgufContents.read(original)
    contents.metadata |= {
        "general.name": "a",
        "general.type": "model",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.base_model.0.repo_url": "b",
        "quantize.imatrix.file": "c",
        "split.count": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "qwen35moe.vocab_size": 128,
        "qwen35moe.rope.scaling.type": "none",
    }
    contents.write(tmp_path / "known.gguf")
    open_checkpoint(tmp_path / "known.gguf")  # without a warning
    contents.metadata[key] = value
    contents.write(tmp_path / "m.gguf")
    with pytest.warns(CheckpointWarning, match=f"1 unknown key.*'{key}'"):
        open_checkpoint(tmp_path / "m.gguf")


def test_the_vision_part_of_a_model_is_told_apart(original: Path, tmp_path: Path) -> None:
    contents = GgufContents("clip", {"clip.has_vision_encoder": True})
    contents.put("v.blk.0.attn_q.weight", np.ones((4, 4)))
    with pytest.raises(CheckpointError, match=r"is the vision part \(mmproj\) of a model.*give the model's other"):
        open_checkpoint(contents.write(tmp_path / "mmproj-BF16.gguf"))
