"""`SamplingParams`: truncation and penalties are checked when they are made, and taken from a generation config."""

from typing import Any

import pytest

from mtpjax import SamplingParams
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
