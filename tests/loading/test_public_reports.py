"""Files and settings that people reported elsewhere, tried on this program; the table is in docs/reports.md."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from checkpoints import CheckpointError, open_checkpoint
from mtpjax import LLM, SamplingParams
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import flatten_params
from scripts.format_checks.key_documents import read_document
from tests.helpers.quantized_folders import FORMATS, UNQUANTIZED, write_model
from tests.helpers.word_checkpoint import CFG, SMALL, write_checkpoint

EOS = "w7"


def without(*parts: str) -> tuple[str, ...]:
    return tuple(part for part in UNQUANTIZED if part not in parts)


def test_the_tokenizers_own_end_of_text_ends_a_text(tmp_path: Path) -> None:
    """QwenLM/Qwen3#927: config.json names <|endoftext|>, tokenizer_config.json <|im_end|>: answers never ended."""
    folder = write_checkpoint(tmp_path / "hf", tokenizer=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": EOS}}))
    llm = LLM(folder, **SMALL)
    assert llm.tokenizer is not None and llm.stop_token_ids == (7, *CFG.stop_token_ids)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "no such token"}))
    assert LLM(folder, **SMALL).stop_token_ids == CFG.stop_token_ids


def test_the_text_of_a_control_token_in_a_prompt_is_that_token(tmp_path: Path) -> None:
    """QwenLM/Qwen3#1743: a user's text may hold control tokens, as with transformers; ids say exactly what is meant."""
    from tokenizers import AddedToken, Tokenizer

    folder = write_checkpoint(tmp_path / "hf", tokenizer=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    llm = LLM(folder, **SMALL)
    assert llm.encode("w3 <|im_end|> w4") == [3, 90, 4]


def test_a_quantised_checkpoint_that_lost_its_mtp_head_decodes_without(tmp_path: Path) -> None:
    """vllm-project/vllm#35548: its config promises a head; uninitialised memory was used as one."""
    write_model(tmp_path, FORMATS["nvfp4"])
    document = read_document(tmp_path / "packed")
    document.tensors = [tensor for tensor in document.tensors if not tensor.name.startswith("mtp.")]
    (folder := tmp_path / "without").mkdir()
    document.write(folder)
    assert json.loads((folder / "config.json").read_text())["mtp_num_hidden_layers"] == 1
    with pytest.warns(UserWarning, match="no MTP head"):
        llm = LLM(folder, **SMALL)
    assert llm.num_speculative_tokens == 0 and len(llm.generate([[1, 2]], SamplingParams(max_tokens=3))[0].token_ids)


@pytest.mark.parametrize(
    ("name", "quantized", "part"),
    [
        ("gptq", without("gate.weight"), "mlp.gate"),  # vllm#25029: KeyError 'layers.35.mlp.gate.g_idx'
        ("nvfp4", without("mtp.fc"), "mtp.fc"),  # vllm#35031: the head's fc in NVFP4
        ("awq", without("shared_expert_gate"), "mlp.experts.0"),  # sglang#19644: KeyError experts.w2_weight
    ],
)
def test_a_matrix_that_others_leave_unquantised(
    name: str, quantized: tuple[str, ...], part: str, tmp_path: Path
) -> None:
    write_model(tmp_path, FORMATS[name], quantized)
    source = open_checkpoint(tmp_path / "packed")
    stored = (tmp_path / "packed").glob("*.safetensors")
    assert any(part.encode() in file.read_bytes()[:2_000_000] for file in stored)
    want = flatten_params(load_checkpoint(open_checkpoint(tmp_path / "plain"), dtype="float32").params)
    for path, leaf in flatten_params(load_checkpoint(source, dtype="float32").params).items():
        assert np.array_equal(leaf[...], want[path][...]), path


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    """unslothai/unsloth#1191, huggingface/transformers#30513: a LoRA folder was given as a model."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter .*merge_and_unload"):
        open_checkpoint(tmp_path)
    whole = write_checkpoint(tmp_path / "hf")
    shutil.copy(tmp_path / "adapter_config.json", whole)
    with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_config.json\).*move these files away"):
        open_checkpoint(whole)


def test_a_merged_folder_without_tokenizer_json(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#10169, sgl-project/sglang#18299: vocab.json and merges.txt without tokenizer.json."""
    folder = write_checkpoint(tmp_path / "hf")
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    llm = LLM(folder, **SMALL)
    with pytest.raises(ValueError, match=r"no tokenizer.json; copy that of the base model"):
        llm.generate("a text")
    assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0].token_ids) == 2


def test_drafts_at_temperature_1_leave_a_long_text_as_it_is(tmp_path: Path) -> None:
    """vllm-project/vllm#47087: with MTP, long texts at T = 1, top_p = 0.95 fell into loops."""
    folder = write_checkpoint(tmp_path / "hf")
    params = SamplingParams(max_tokens=400, temperature=1.0, top_p=0.95, seed=3, ignore_eos=True)
    sizes = SMALL | {"max_model_len": 420}
    texts = [
        LLM(folder, num_speculative_tokens=k, **sizes).generate([[5, 6, 7]], params)[0].token_ids for k in (0, 2, 3)
    ]
    assert len(texts[0]) == 400 and texts[1] == texts[0] and texts[2] == texts[0]
