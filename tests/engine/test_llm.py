"""`LLM`: what it loads, what it refuses and in which words, and what its answers hold."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoints import CheckpointError, open_checkpoint, write_safetensors_directory
from mtpjax import LLM, SamplingParams
from mtpjax.cli.convert import main as convert
from mtpjax.config import ConfigError
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.weight_map import export_tensors, flat
from tests.helpers.models import numpy_model, tiny_config

CFG = tiny_config(moe=False, num_superblocks=1, max_position=512)  # 96 ids, the last is its stop token
MODEL = numpy_model(CFG, seed=1, scale=0.5)
TENSORS = {name: read() for name, _, _, read in export_tensors(MODEL)}
WORDS = [f"w{i}" for i in range(90)]  # fewer than ids: a published matrix is padded too
SMALL: dict[str, Any] = {"max_len": 40, "max_batch": 2, "prefill_chunks": (16,)}


def write(path: Path, tensors: dict[str, np.ndarray] = TENSORS, *, words: bool = False, **config: Any) -> Path:
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()]
    write_safetensors_directory(path, config_to_hf(CFG) | config, entries)
    if words:
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of 90 words."""
    return write(tmp_path_factory.mktemp("api") / "hf", words=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_speculative_tokens=2, **SMALL)


# Loading


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
    loaded = load_checkpoint(open_checkpoint(write(tmp_path / "hf", tensors)), dtype=jnp.float32)
    assert loaded.cfg == CFG
    want = flat(MODEL.params)
    got = flat(loaded.params)
    assert got.keys() == want.keys()
    assert all(np.array_equal(leaf[...], want[path][...]) for path, leaf in got.items())


@pytest.mark.parametrize("config_says", [1, 0])
def test_without_an_mtp_head_it_warns_once_and_decodes_without_drafts(
    config_says: int, llm: LLM, tmp_path: Path
) -> None:
    tensors = {name: array for name, array in TENSORS.items() if not name.startswith("mtp.")}
    path = write(tmp_path / "hf", tensors, words=True, mtp_num_hidden_layers=config_says)
    with pytest.warns(UserWarning, match="hf: the checkpoint has no MTP head.*without drafts") as caught:
        plain = LLM(path, num_speculative_tokens=2, **SMALL)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LLM(path, num_speculative_tokens=0, **SMALL)
    params = SamplingParams(max_tokens=6, temperature=0.7, seed=3, ignore_eos=True)
    (want,), (got,) = llm.generate([[5, 6, 7]], params), plain.generate([[5, 6, 7]], params)
    assert got.token_ids == want.token_ids
    assert (got.metrics.drafted, got.metrics.accepted_per_position, got.metrics.rounds) == (0, (), 6)
    assert want.metrics.drafted > 0


def test_the_head_is_found_by_its_tensors_whatever_the_config_says(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", mtp_num_hidden_layers=0)
    assert LLM(path, num_speculative_tokens=1, **SMALL).draft == 1


def test_one_error_lists_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    del tensors["model.norm.weight"], tensors["mtp.fc.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()
    tensors["model.layers.1.mlp.extra"] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError) as caught:
        LLM(write(tmp_path / "hf", tensors), **SMALL)
    said = str(caught.value)
    assert "2 missing, 1 mis-shaped and 1 unexpected tensors" in said
    assert "'norm.weight' is missing, expected shape [48]" in said
    assert "'mtp.fc.weight' is missing, expected shape [48, 96]" in said
    assert "'lm_head.weight' in model.safetensors has shape [96, 47], expected [96, 48]" in said
    assert "'model.layers.1.mlp.extra' is not a tensor of this model" in said


def test_nan_is_named(tmp_path: Path) -> None:
    tensors = {name: array.copy() for name, array in TENSORS.items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    path = write(tmp_path / "hf", tensors)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight' has 1 NaN or infinite .* \[3, 4\]"):
        LLM(path, **SMALL)
    LLM(write(tmp_path / "good"), **SMALL)


def damaged(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        change(write(path))
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
    return write(path) / "model.safetensors"


def gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF")
    return path.rename(path.with_suffix(".gguf"))


@pytest.mark.parametrize(
    ("make", "error", "says"),
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
def test_what_cannot_be_loaded_is_named(
    make: Callable[[Path], Path], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"(?s)hf.*{says}"):
        LLM(make(tmp_path / "hf"), **SMALL)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ({"draft": -1}, "draft is -1; expected a whole number from 0 to 8"),
        ({"draft": 9}, "draft is 9; expected a whole number from 0 to 8"),
        ({"draft": 1.5}, r"draft is 1\.5"),
        ({"draft": True}, "draft is True"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of 'float32', 'bfloat16'"),
        ({"dtype": jnp.float32}, "dtype is .*float32"),
        ({"max_len": 1}, "max_len is 1; expected a whole number >= 2"),
        ({"max_len": 513}, "max_len is 513; this checkpoint was made for at most 512 positions"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"mtp_prompt": 0}, "mtp_prompt is 0; expected a whole number >= 1 or None"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"prefill_chunks": ()}, "prefill_chunks is empty"),
        ({"prefill_chunks": (0, 16)}, "prefill_chunks is 0"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json: not a readable tokenizer.json"),
    ],
)
def test_arguments_out_of_range(argument: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LLM(MODEL, **(SMALL | argument))


# Prompts


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([[1], []], "prompt 1 is empty"),
        (["w1", ""], "prompt 1 is empty"),
        ([], None),
        ([[1] * 39], None),
        ([[1], [1] * 40], "prompt 1 has 40 tokens, more than the 39 that max_len = 40 allows"),
        ([[1, 95], [2, 96]], r"prompt 1: id 96 at position 1 is outside the vocabulary 0\.\.\.95"),
        ([[-1]], "prompt 0: id -1 at position 0"),
        ([[1, 2.0]], r"prompt 0 must be a text or a list of token ids: 2\.0 is not a token id"),
        ([[True, 1]], "True is not a token id"),
        ([[1], None], "prompt 1 must be a text or a list"),
    ],
)
def test_a_bad_prompt_is_named_by_its_place(llm: LLM, prompts: Any, says: str | None) -> None:
    if says is None:
        assert len(llm.generate(prompts, SamplingParams(max_tokens=0))) == len(prompts)
        return
    with pytest.raises(ValueError, match=says):
        llm.generate(prompts)


def test_check_is_what_generate_would_do(llm: LLM) -> None:
    assert llm.check("w5 w6") == [5, 6] and llm.check(np.array([5, 6])) == [5, 6]
    with pytest.raises(ValueError, match="the prompt has 40 tokens"):
        llm.check([1] * 40)
    with pytest.raises(ValueError, match="9 stop tokens .*at most 8"):
        llm.check([1], SamplingParams(stop_token_ids=tuple(range(8))))
    assert llm.check([1], SamplingParams(stop_token_ids=tuple(range(8)), ignore_eos=True)) == [1]


def test_a_text_needs_a_tokenizer(folder: Path) -> None:
    bare = LLM(MODEL, num_speculative_tokens=0, **SMALL)
    with pytest.raises(ValueError, match="prompt 0 is a text, but the checkpoint has no tokenizer"):
        bare.generate("w1")
    (output,) = bare.generate([[1, 2]], SamplingParams(max_tokens=0))
    assert output.text is None and output.prompt is None
    assert LLM(MODEL, num_speculative_tokens=0, tokenizer=folder / "tokenizer.json", **SMALL).check("w7") == [7]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"max_tokens": -1}, "max_tokens is -1; expected a whole number >= 0 or None"),
        ({"max_tokens": 2.0}, r"max_tokens is 2\.0"),
        ({"temperature": -0.1}, r"temperature is -0\.1; expected a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is -1"),
    ],
)
def test_sampling_out_of_range(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplingParams(**bad)


def test_sampling_parameters_must_be_one_or_one_each(llm: LLM) -> None:
    for number in (0, 1, 3):
        with pytest.raises(ValueError, match=f"2 prompts but {number} sampling parameters"):
            llm.generate([[1], [2]], [SamplingParams()] * number)
    with pytest.raises(ValueError, match=r"prompt 0: stop token 1099511627776 is outside the vocabulary 0\.\.\.95"):
        llm.generate([[1]], SamplingParams(stop_token_ids=(1 << 40,)))


# Answers


def test_one_prompt_may_stand_alone(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    by_text, by_ids, by_list = (llm.generate(p, params)[0] for p in ("w5 w6", [5, 6], [[5, 6]]))
    assert by_text.token_ids == by_ids.token_ids == by_list.token_ids
    assert (by_text.prompt, by_ids.prompt) == ("w5 w6", None)
    assert by_text.prompt_token_ids == [5, 6]
    assert by_ids.text == by_text.text == " ".join(WORDS[t] for t in by_ids.token_ids)


def test_no_token_may_be_asked_for(llm: LLM) -> None:
    outputs = llm.generate([[5, 6], [7]], [SamplingParams(max_tokens=0), SamplingParams(max_tokens=2, ignore_eos=True)])
    assert (outputs[0].token_ids, outputs[0].text, outputs[0].finish_reason) == ([], "", "length")
    assert (outputs[0].metrics.rounds, outputs[0].metrics.tokens_per_round) == (0, 0.0)
    assert len(outputs[1].token_ids) == 2


def test_max_len_bounds_the_text(llm: LLM) -> None:
    for asked in (None, 1000):
        (output,) = llm.generate([[5] * 35], SamplingParams(max_tokens=asked, ignore_eos=True))
        assert len(output.token_ids) == 5 and output.finish_reason == "length"


def test_logits_and_hidden_states_are_those_of_generating(llm: LLM) -> None:
    prompt = [5, 6, 7] * 7  # two chunks
    logits, hidden = llm.logits(prompt), llm.hidden(prompt)
    assert (logits.shape, logits.dtype) == ((21, 96), np.float32)
    assert (hidden.shape, hidden.dtype) == ((21, 48), np.float32)
    assert np.allclose(hidden @ TENSORS["lm_head.weight"].T, logits, atol=1e-3)
    assert np.allclose(llm.logits(prompt[:20]), logits[:20], atol=1e-3)
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))
    text = prompt + output.token_ids
    # Ids of the padded matrix that no word has are never generated.
    assert output.token_ids == np.argmax(llm.logits(text)[20:-1, : len(WORDS)], axis=1).tolist()
    with pytest.raises(ValueError, match="token_ids has 41 tokens"):
        llm.logits([1] * 41)


def test_a_stop_token_ends_the_text_and_is_not_in_it(llm: LLM) -> None:
    (free,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=5))
    stop = free.token_ids[4]
    end = free.token_ids.index(stop) + 1
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=5, stop_token_ids=(80, stop))
    seen: list[int] = []
    (output,) = llm.generate([[5, 6, 7]], params, on_tokens=lambda index, new: seen.extend(new))
    assert 80 not in free.token_ids
    assert output.token_ids == seen == free.token_ids[:end]
    assert output.finish_reason == "stop" and free.finish_reason == "length"
    assert output.text == " ".join(WORDS[t] for t in free.token_ids[: end - 1])


def test_the_checkpoints_own_stop_tokens_end_the_text_unless_ignored(folder: Path, tmp_path: Path, llm: LLM) -> None:
    (free,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=5))
    path = tmp_path / "hf"
    shutil.copytree(folder, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [free.token_ids[3], 94]}))
    other = LLM(path, num_speculative_tokens=2, **SMALL)
    assert set(other.stop_token_ids) == {free.token_ids[3], 94, 95}  # those of config.json too
    stopped, ignored = other.generate(
        [[5, 6, 7]] * 2, [SamplingParams(max_tokens=8, temperature=1.0, seed=5, ignore_eos=i) for i in (False, True)]
    )
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]
    assert ignored.token_ids == free.token_ids


def test_seeds(llm: LLM) -> None:
    hot = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    first = llm.generate([[5, 6]] * 3, hot)
    assert [o.seed for o in first] == [0, 1, 2]  # the LLM's seed plus the place in the call
    assert len({tuple(o.token_ids) for o in first}) == 3
    again = llm.generate([[5, 6]] * 2, [replace(hot, seed=2), replace(hot, seed=2 + (1 << 32))])
    assert [o.token_ids for o in again] == [first[2].token_ids] * 2  # 32 bits count
    assert llm.generate([[5, 6]], replace(hot, seed=-1))[0].token_ids not in [o.token_ids for o in first]
    other = LLM(MODEL, num_speculative_tokens=2, seed=1, **SMALL)
    assert [o.seed for o in other.generate([[5, 6]] * 2, SamplingParams(max_tokens=0))] == [1, 2]


def test_figures(llm: LLM) -> None:
    # So hot that noise decides, which draft and trunk share: drafts are often right.
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=9, temperature=5.0, seed=1, ignore_eos=True))
    metrics = output.metrics
    assert 0 < metrics.accepted < metrics.drafted
    assert metrics.prompt_tokens == 3 and metrics.drafted == 2 * metrics.rounds
    assert metrics.accepted == sum(metrics.accepted_per_position) and len(metrics.accepted_per_position) == 2
    assert metrics.accepted_per_position[0] >= metrics.accepted_per_position[1]
    assert metrics.rounds + metrics.accepted >= 9 > metrics.rounds + metrics.accepted - 3
    assert metrics.tokens_per_round == 9 / metrics.rounds
    assert metrics.prefill_seconds > 0 and metrics.decode_seconds > 0
