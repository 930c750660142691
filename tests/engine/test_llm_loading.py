"""Which checkpoints and arguments `LLM` takes, and in which words it refuses others."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import CheckpointError, open_checkpoint
from kernels_pallas.platform import override_platform, platform
from mtpjax import LLM, SamplingParams
from mtpjax.cli.convert import main as convert
from mtpjax.config import ConfigError
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import flatten_params
from mtpjax.loading.open_model import open_model
from tests.helpers.word_checkpoint import CFG, MODEL, SMALL, TENSORS, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of 90 words."""
    return write_checkpoint(tmp_path_factory.mktemp("api") / "hf", tokenizer=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_speculative_tokens=2, **SMALL)


def test_hf_and_orbax_folders_are_the_same_model(llm: LLM, folder: Path, tmp_path: Path) -> None:
    assert convert([str(folder), str(tmp_path / "orbax")]) == 0
    other = LLM(tmp_path / "orbax", num_speculative_tokens=2, **SMALL)
    assert np.array_equal(llm.logits([5, 6, 7]), other.logits([5, 6, 7]))
    assert (other.cfg, other.stop_token_ids) == (llm.cfg, llm.stop_token_ids)
    assert other.tokenizer is not None and other.tokenizer.encode("w3 w4") == [3, 4]


@pytest.mark.parametrize("mtp", ["mtp.", "model.mtp.", "language_model.mtp."])
@pytest.mark.parametrize("prefix", ["", "model.", "language_model.", "model.language_model.", "language_model.model."])
def test_every_prefix_is_the_same_model(prefix: str, mtp: str, tmp_path: Path) -> None:
    tensors = {
        name.replace("model.", prefix, 1) if name.startswith("model.") else name.replace("mtp.", mtp, 1): array
        for name, array in TENSORS.items()
    }
    loaded = load_checkpoint(open_checkpoint(write_checkpoint(tmp_path / "hf", tensors)), dtype=jnp.float32)
    assert loaded.cfg == CFG
    want, got = flatten_params(MODEL.params), flatten_params(loaded.params)
    assert got.keys() == want.keys()
    assert all(np.array_equal(leaf[...], want[path][...]) for path, leaf in got.items())


@pytest.mark.parametrize("config_says", [1, 0])
def test_without_an_mtp_head_it_warns_once_and_decodes_without_drafts(
    config_says: int, llm: LLM, tmp_path: Path
) -> None:
    tensors = {name: array for name, array in TENSORS.items() if not name.startswith("mtp.")}
    path = write_checkpoint(tmp_path / "hf", tensors, tokenizer=True, mtp_num_hidden_layers=config_says)
    with pytest.warns(UserWarning, match="hf: the checkpoint has no MTP head.*without drafts") as caught:
        plain = LLM(path, num_speculative_tokens=2, **SMALL)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLM(path, num_speculative_tokens=0, **SMALL)
    params = SamplingParams(max_tokens=6, temperature=0.7, seed=3, ignore_eos=True)
    (want,), (got,) = llm.generate([[5, 6, 7]], params), plain.generate([[5, 6, 7]], params)
    assert got.token_ids == want.token_ids
    metrics = got.metrics
    assert (metrics.num_steps, metrics.num_drafts, metrics.num_draft_tokens) == (6, 0, 0)
    assert (metrics.num_accepted_tokens_per_pos, metrics.mean_acceptance_length) == ((), 1.0)
    assert want.metrics.num_draft_tokens > 0 and plain.num_speculative_tokens == 0


def test_the_head_is_found_by_its_tensors_whatever_the_config_says(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "hf", mtp_num_hidden_layers=0)
    assert LLM(path, num_speculative_tokens=1, **SMALL).num_speculative_tokens == 1


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    del tensors["model.norm.weight"], tensors["mtp.fc.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()
    tensors["model.layers.1.mlp.extra"] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError) as caught:
        LLM(write_checkpoint(tmp_path / "hf", tensors), **SMALL)
    message = str(caught.value)
    assert "2 missing, 1 mis-shaped and 1 unexpected tensors" in message
    assert "'norm.weight' is missing, expected shape [48]" in message
    assert "'mtp.fc.weight' is missing, expected shape [48, 96]" in message
    assert "'lm_head.weight' in model.safetensors has shape [96, 47], expected [96, 48]" in message
    assert "'model.layers.1.mlp.extra' is not a tensor of this model" in message


def test_nan_is_named(tmp_path: Path) -> None:
    tensors = {name: array.copy() for name, array in TENSORS.items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    path = write_checkpoint(tmp_path / "hf", tensors)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight' has 1 NaN or infinite .* \[3, 4\]"):
        LLM(path, **SMALL)
    LLM(write_checkpoint(tmp_path / "good"), **SMALL)


def damaged(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        change(write_checkpoint(path))
        return path

    return make


def set_config(**values: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        (path / "config.json").write_text(json.dumps(config_to_hf(CFG) | values))

    return change


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def only_file(path: Path) -> Path:
    return write_checkpoint(path) / "model.safetensors"


def gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF")
    return path.rename(path.with_suffix(".gguf"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (damaged(cut), CheckpointError, r"model\.safetensors: is truncated: .* 10 bytes are missing"),
        (
            damaged(lambda p: (p / "config.json").unlink()),
            CheckpointError,
            "has no config.json; found model.safetensors",
        ),
        (damaged(lambda p: (p / "model.safetensors").unlink()), CheckpointError, "has config.json but no weights"),
        (damaged(lambda p: (p / "config.json").write_text("{")), CheckpointError, "config.json: is not valid JSON"),
        (damaged(lambda p: (p / "tokenizer.json").write_text("{")), ValueError, "tokenizer.json: not a readable"),
        (damaged(set_config(model_type="llama")), ConfigError, "'model_type' is 'llama'; supported: qwen3_5"),
        (
            damaged(set_config(quantization_config={"quant_method": "gptq"})),
            CheckpointError,
            "'gptq'.*not supported yet",
        ),
        (lambda path: path, CheckpointError, "does not exist"),
        (only_file, CheckpointError, "is a single file"),
        (gguf, CheckpointError, "the version needs 4 bytes"),
    ],
    ids=["cut", "no config", "no weights", "bad json", "tokenizer", "llama", "gptq", "nothing", "file", "gguf"],
)
def test_an_error_names_the_checkpoint_and_what_is_wrong(
    make: Callable[[Path], Path], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"(?s)hf.*{message}"):
        LLM(make(tmp_path / "hf"), **SMALL)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"num_speculative_tokens": -1}, "num_speculative_tokens is -1; expected a whole number from 0 to 8"),
        ({"num_speculative_tokens": 9}, "num_speculative_tokens is 9; expected a whole number from 0 to 8"),
        ({"num_speculative_tokens": 1.5}, r"num_speculative_tokens is 1\.5"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens is True"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of 'auto', 'float32', 'bfloat16'"),
        ({"dtype": jnp.float16}, "dtype is .*float16.*; expected one of 'auto'"),
        ({"dtype": 3}, "dtype is 3; expected one of 'auto'"),
        ({"dtype": None}, "dtype is None; expected one of 'auto'"),
        ({"quantization": "int8"}, "quantization is 'int8', but the model is already loaded"),
        ({"max_model_len": 1}, "max_model_len is 1; expected a whole number >= 2"),
        ({"max_model_len": 513}, "max_model_len is 513; this checkpoint was made for at most 512 positions"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; expected a whole number >= 1"),
        ({"max_prefill_seqs": 0}, "max_prefill_seqs is 0; expected a whole number from 1 to 2 or None"),
        ({"max_prefill_seqs": 3}, "max_prefill_seqs is 3; expected a whole number from 1 to 2 or None"),
        ({"mtp_prompt_tokens": 0}, "mtp_prompt_tokens is 0; expected a whole number >= 1 or None"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"prefill_buckets": ()}, "prefill_buckets is empty"),
        ({"prefill_buckets": (0, 16)}, "prefill_buckets is 0"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json: not a readable tokenizer.json"),
    ],
)
def test_arguments_out_of_range(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(MODEL, **(SMALL | argument))


def test_dtype_is_a_name_a_jnp_dtype_or_chosen_for_the_platform(folder: Path) -> None:
    """A loaded model keeps its own dtype."""
    default = jnp.float32 if platform() == "cpu" else jnp.bfloat16
    assert LLM(folder, max_model_len=40).engine.runner.compute_dtype == default
    for dtype in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")):
        assert LLM(folder, dtype=dtype, max_model_len=40).engine.runner.compute_dtype == jnp.bfloat16
    assert open_model(folder, dtype=jnp.float32, quantization=None, mtp=False, tokenizer=None).dtype == jnp.float32
    loaded = load_checkpoint(open_checkpoint(folder), dtype=jnp.dtype(jnp.bfloat16))
    assert open_model(loaded, dtype="auto", quantization=None, mtp=True, tokenizer=None).dtype == jnp.bfloat16
    with override_platform("cuda", (9, 0)):
        assert open_model(folder, dtype="auto", quantization=None, mtp=True, tokenizer=None).dtype == jnp.bfloat16
