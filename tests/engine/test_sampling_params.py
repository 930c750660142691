"""`SamplingParams`: truncation and penalties are checked when they are made, and taken from a generation config."""

import warnings
from typing import Any

import pytest

from checkpoints.errors import CheckpointWarning
from mtpjax import SamplingParams
from mtpjax.generation_config import HARMLESS, NEUTRAL, recommended_stop_token_ids, warn_of_unused_settings
from mtpjax.sampling_params import PENALTIES

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"top_k": -2}, "top_k is -2; expected a whole number >= -1"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"top_p": 0}, "top_p is 0; expected a number above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_p": True}, "top_p is True"),
        ({"min_p": -0.1}, r"min_p is -0\.1; expected a number from 0 to 1"),
        ({"min_p": "0.1"}, r"min_p is '0\.1'"),
        ({"presence_penalty": 2.1}, r"presence_penalty is 2\.1; expected a number from -2 to 2 \(0 is none\)"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; expected a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0; expected a finite number above 0 \(1 is none\)"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": "1"}, "presence_penalty is '1'"),
    ],
)
def test_values_out_of_range_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)


def test_a_generation_config_gives_sampling_params() -> None:
    qwen: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    qwen |= {"eos_token_id": [1], "transformers_version": "5"}
    recommended = SamplingParams.from_generation_config
    assert recommended(qwen, max_tokens=9) == SamplingParams(max_tokens=9, temperature=0.6, top_k=20, top_p=0.95)
    assert recommended(qwen, top_k=5).top_k == 5
    assert recommended({**qwen, "do_sample": False}) == recommended({}) == SamplingParams()
    with pytest.raises(ValueError, match="top_p is 7"):
        SamplingParams.from_generation_config({"top_p": 7})


@pytest.mark.parametrize("name", PENALTIES)
def test_a_generation_config_gives_each_penalty(name: str) -> None:
    recommended = SamplingParams.from_generation_config
    penalty: dict[str, Any] = {name: 1.5}
    other: dict[str, Any] = {name: 1.25}
    config = {"do_sample": True, "temperature": 0.7, **penalty}
    assert recommended(config) == SamplingParams(temperature=0.7, **penalty)
    assert recommended({**config, "do_sample": False}) == SamplingParams(**penalty)  # greedy choice has penalties, too
    assert recommended(config, **other) == SamplingParams(temperature=0.7, **other)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"top_k": 50.0, "temperature": "0.6"}, {"top_k": 50, "temperature": 0.6}),
        ({"top_k": "20", "top_p": "1", "repetition_penalty": "1.05"}, {"top_k": 20, "repetition_penalty": 1.05}),
        ({"temperature": None, "top_k": None, "top_p": None, "min_p": None}, {}),
        ({"top_p": 0, "temperature": 0.7}, {"top_k": 1, "temperature": 0.7}),  # as transformers and llama.cpp
        ({"top_p": 0.0, "top_k": 40, "temperature": 0.7}, {"top_k": 1, "temperature": 0.7}),
        ({"top_k": -1, "temperature": 1}, {"top_k": -1, "temperature": 1}),  # llama.cpp's "all"
        ({"do_sample": "false", "temperature": 0.7}, {}),
        ({"do_sample": None, "temperature": 0.7}, {"temperature": 0.7}),
        ({"max_new_tokens": 64.0}, {"max_tokens": 64}),  # as vLLM
    ],
)
def test_oddities_of_generation_configs(config: dict[str, Any], want: dict[str, Any]) -> None:
    assert SamplingParams.from_generation_config(config) == SamplingParams(**want)


def test_an_override_goes_before_an_odd_value() -> None:
    recommended = SamplingParams.from_generation_config
    assert recommended({"top_p": 0, "top_k": 9}, top_p=0.5) == SamplingParams(top_p=0.5, top_k=9)
    assert recommended({"top_p": 0}, top_k=5) == SamplingParams(top_k=5)
    assert recommended({"temperature": "warm"}, temperature=0.5) == SamplingParams(temperature=0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": "warm"}, "generation_config.json: temperature is 'warm'; expected a number"),
        ({"temperature": True}, "generation_config.json: temperature is True"),
        ({"top_k": [20]}, r"generation_config.json: top_k is \[20\]"),
        ({"top_k": 20.5}, r"top_k is 20\.5; expected a whole number"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_impossible_recommendations_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams.from_generation_config(config)


def test_stop_tokens_of_generation_configs() -> None:
    for value, want in ((None, ()), (7, (7,)), ([7.0, "8"], (7, 8)), ([], ())):
        assert recommended_stop_token_ids({"eos_token_id": value}) == want
    for bad in (-1, 1.5, True, "<|im_end|>", [None]):
        with pytest.raises(ValueError, match="eos_token_id is .*; expected"):
            recommended_stop_token_ids({"eos_token_id": bad})


def test_settings_without_effect_are_named_once() -> None:
    harmless = dict.fromkeys(HARMLESS, 1) | {key: values[0] for key, values in NEUTRAL.items()}
    written = GENERATION_CONFIG_OF_TRANSFORMERS | harmless
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unused_settings(written, "file")
    with pytest.warns(CheckpointWarning, match="^file has 3 unknown key.*'num_beams', 'temprature' .*, 'typical_p'"):
        warn_of_unused_settings(written | {"num_beams": 4, "typical_p": 0.9, "temprature": 1.0}, "file")


# What transformers 4 wrote with its defaults; transformers 5 writes null, or nothing, for all of them.
GENERATION_CONFIG_OF_TRANSFORMERS: dict[str, Any] = {
    "_from_model_config": True, "assistant_confidence_threshold": 0.4, "do_sample": False, "early_stopping":
    False, "max_length": 20, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "bad_words_ids": None, "use_cache": True,
    "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant", "target_lookbehind": 10,
    "assistant_lookbehind": 10, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0, "no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "min_length": 0, "output_scores": False, "return_dict_in_generate": False, "encoder_repetition_penalty":
    1.0, "remove_invalid_values": False, "renormalize_logits": False, "is_assistant": False,
    "disable_compile": False, "token_healing": False, "transformers_version": "5.24.0", "sequence_bias": None,
}  # fmt: skip
