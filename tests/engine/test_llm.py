"""Which prompts and parameters `LLM` takes, and what its answers hold."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtpjax import LLM, SamplingParams
from mtpjax.engine.scheduler import LOOKAHEAD_BATCHES
from tests.helpers.word_checkpoint import MODEL, SMALL, TENSORS, WORDS, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of 90 words."""
    return write_checkpoint(tmp_path_factory.mktemp("api") / "hf", tokenizer=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_speculative_tokens=2, **SMALL)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        (["w1", ""], "prompt 1 is empty"),
        ([], None),
        ([[1] * 39], None),
        ([[1], [1] * 40], "prompt 1 has 40 tokens, more than the 39 that max_model_len = 40 allows"),
        ([[1, 95], [2, 96]], r"prompt 1: id 96 at position 1 is outside the vocabulary 0\.\.\.95"),
        ([[-1]], "prompt 0: id -1 at position 0"),
        ([[1, 2.0]], r"prompt 0 must be a text or a list of token ids: 2\.0 is not a token id"),
        ([[True, 1]], "True is not a token id"),
        ([[1], None], "prompt 1 must be a text or a list"),
    ],
)
def test_a_bad_prompt_is_named_by_its_place(llm: LLM, prompts: Any, message: str | None) -> None:
    if message is None:
        assert len(llm.generate(prompts, SamplingParams(max_tokens=0))) == len(prompts)
        return
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts)


def test_encode_accepts_what_generate_accepts(llm: LLM) -> None:
    array: Any = np.array([5, 6])
    assert llm.encode("w5 w6") == llm.encode([5, 6]) == llm.encode(array) == [5, 6]
    with pytest.raises(ValueError, match="the prompt has 40 tokens"):
        llm.encode([1] * 40)
    with pytest.raises(ValueError, match="9 stop tokens .*at most 8"):
        llm.encode([1], SamplingParams(stop_token_ids=tuple(range(8))))
    assert llm.encode([1], SamplingParams(stop_token_ids=tuple(range(8)), ignore_eos=True)) == [1]


def test_a_text_needs_a_tokenizer(folder: Path) -> None:
    bare = LLM(MODEL, num_speculative_tokens=0, **SMALL)
    with pytest.raises(ValueError, match="prompt 0 is a text, but the checkpoint has no tokenizer"):
        bare.generate("w1")
    (output,) = bare.generate([[1, 2]], SamplingParams(max_tokens=0))
    assert output.text is None and output.prompt is None
    assert LLM(MODEL, num_speculative_tokens=0, tokenizer=folder / "tokenizer.json", **SMALL).encode("w7") == [7]


@pytest.mark.parametrize(
    ("bad", "message"),
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
def test_sampling_out_of_range(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)


def test_sampling_parameters_must_be_one_or_one_each(llm: LLM) -> None:
    for number in (0, 1, 3):
        with pytest.raises(ValueError, match=f"2 prompts but {number} sampling parameters"):
            llm.generate([[1], [2]], [SamplingParams()] * number)
    with pytest.raises(ValueError, match=r"prompt 0: stop token 1099511627776 is outside the vocabulary 0\.\.\.95"):
        llm.generate([[1]], SamplingParams(stop_token_ids=(1 << 40,)))


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
    assert (outputs[0].metrics.num_steps, outputs[0].metrics.mean_acceptance_length) == (0, 1.0)
    assert len(outputs[1].token_ids) == 2


def test_max_model_len_bounds_the_text(llm: LLM) -> None:
    for max_tokens in (None, 1000):
        (output,) = llm.generate([[5] * 35], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        assert len(output.token_ids) == 5 and output.finish_reason == "length"


def test_logits_and_hidden_states_are_those_of_generating(llm: LLM) -> None:
    prompt = [5, 6, 7] * 7  # two chunks
    logits, hidden = llm.logits(prompt), llm.hidden_states(prompt)
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
    streamed: list[int] = []
    (output,) = llm.generate([[5, 6, 7]], params, on_tokens=lambda index, tokens: streamed.extend(tokens))
    assert 80 not in free.token_ids
    assert output.token_ids == streamed == free.token_ids[:end]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert (free.finish_reason, free.outputs[0].stop_reason) == ("length", None)
    assert output.text == " ".join(WORDS[t] for t in free.token_ids[: end - 1])


def test_the_checkpoints_own_stop_tokens_end_the_text_unless_ignored(folder: Path, tmp_path: Path, llm: LLM) -> None:
    (free,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=5))
    path = tmp_path / "hf"
    shutil.copytree(folder, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [free.token_ids[3], 94]}))
    other = LLM(path, num_speculative_tokens=2, **SMALL)
    assert set(other.stop_token_ids) == {free.token_ids[3], 94, 95}  # those of config.json too
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=5)
    named = replace(params, stop_token_ids=(free.token_ids[3],))
    stopped, ignored, both, by_name = other.generate(
        [[5, 6, 7]] * 4, [params, replace(params, ignore_eos=True), named, replace(named, ignore_eos=True)]
    )
    text = free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]
    assert stopped.token_ids == both.token_ids == by_name.token_ids == text and ignored.token_ids == free.token_ids
    # The checkpoint's own end of text is no stop reason, even if the request names it too.
    reasons = [output.outputs[0].stop_reason for output in (stopped, both, by_name, ignored)]
    assert reasons == [None, None, free.token_ids[3], None]


def test_penalties_count_ids_that_no_token_has(llm: LLM, folder: Path) -> None:
    """The prompt has an id of the padded matrix, 94, which is never generated."""
    plain = LLM(folder, num_speculative_tokens=0, **SMALL)
    params = SamplingParams(max_tokens=12, ignore_eos=True, presence_penalty=2.0, repetition_penalty=1.5)
    penalized, without_drafts = (each.generate([[5, 94, 7]], params)[0].token_ids for each in (llm, plain))
    assert penalized == without_drafts and max(penalized) < len(WORDS)
    assert penalized != llm.generate([[5, 94, 7]], SamplingParams(max_tokens=12, ignore_eos=True))[0].token_ids


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


def test_metrics_are_those_of_vllm_and_add_up(llm: LLM) -> None:
    # So hot that noise decides, which draft and trunk share: drafts are often right.
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=9, temperature=5.0, seed=1, ignore_eos=True))
    m = output.metrics
    assert 0 < m.num_accepted_tokens < m.num_draft_tokens
    assert m.num_prompt_tokens == 3 and m.num_drafts == m.num_steps and m.num_draft_tokens == 2 * m.num_steps
    assert m.num_accepted_tokens == sum(m.num_accepted_tokens_per_pos) and len(m.num_accepted_tokens_per_pos) == 2
    assert m.num_accepted_tokens_per_pos[0] >= m.num_accepted_tokens_per_pos[1]
    assert m.num_steps + m.num_accepted_tokens >= 9 > m.num_steps + m.num_accepted_tokens - 3
    assert m.mean_acceptance_length == 1 + m.num_accepted_tokens / m.num_drafts
    assert m.prefill_seconds > 0 and m.decode_seconds > 0 and m.acceptance == "real"


def test_jobs_are_taken_as_they_are_needed(llm: LLM) -> None:
    taken = []

    def jobs(number: int) -> Iterator[tuple[list[int], SamplingParams]]:
        for i in range(number):
            taken.append(i)
            yield [1 + i % 90, 7], SamplingParams(max_tokens=1 + i % 3, temperature=1.0, ignore_eos=True)

    first = next(llm.generate_iter(jobs(1000)))
    assert first[1].finish_reason == "length" and len(taken) == 2 * LOOKAHEAD_BATCHES
    streamed: list[list[int]] = [[] for _ in range(9)]
    outputs = dict(llm.generate_iter(jobs(9), on_tokens=lambda index, tokens: streamed[index].extend(tokens)))
    together = llm.generate([[1 + i, 7] for i in range(9)], [params for _, params in jobs(9)])
    assert [outputs[i].token_ids for i in range(9)] == [output.token_ids for output in together] == streamed
    assert [outputs[i].seed for i in range(9)] == list(range(9))
    assert list(llm.generate_iter(iter(()))) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        list(llm.generate_iter([([1], SamplingParams()), ([], SamplingParams())]))
