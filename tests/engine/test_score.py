"""`LLM.score`, and the model of lm-eval that is made of it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtpjax import LLM, SamplingParams, Score
from tests.helpers.models import cpu_only
from tests.helpers.word_checkpoint import MODEL, SMALL, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of 90 words."""
    return write_checkpoint(tmp_path_factory.mktemp("score") / "hf", tokenizer=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_speculative_tokens=2, program_cache=None, **SMALL)


def expected(llm: LLM, ids: list[int], num_prompt_tokens: int) -> tuple[list[float], bool]:
    """Return the log-probabilities of the tokens after the prompt in float64, and whether all are the likeliest."""
    logits = llm.logits(ids)[num_prompt_tokens - 1 : -1, : llm.engine.runner.vocab_size].astype(np.float64)
    rows = logits - logits.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    tokens = ids[num_prompt_tokens:]
    return [float(row[t]) for row, t in zip(rows, tokens, strict=True)], rows.argmax(-1).tolist() == tokens


def test_a_score_is_the_log_softmax_of_the_logits(llm: LLM) -> None:
    score = llm.score([5, 6, 7], [8, 9, 10, 11])
    values, greedy = expected(llm, [5, 6, 7, 8, 9, 10, 11], 3)
    assert isinstance(score, Score) and score.num_tokens == 4 and score.is_greedy == greedy
    np.testing.assert_allclose(score.token_logprobs, values, atol=1e-5)
    assert score.logprob == sum(score.token_logprobs)
    assert math.isclose(score.perplexity, math.exp(-sum(values) / 4), rel_tol=1e-5)


def test_what_greedy_generation_writes_is_greedy(llm: LLM) -> None:
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=0))
    score = llm.score([5, 6, 7], output.token_ids)
    assert score.is_greedy and abs(score.logprob - (output.outputs[0].cumulative_logprob or 0)) < 1e-5
    assert not llm.score([5, 6, 7], [*output.token_ids[:-1], (output.token_ids[-1] + 1) % 90]).is_greedy


def test_lists_are_scored_as_each_pair_alone(llm: LLM) -> None:
    prompts = [[5, 6], [7] * 20, [8], [3] * 30, [1, 2, 3]]
    continuations = [[1], [2, 3], [4] * 30, [5, 6], [7]]
    scores = llm.score(prompts, continuations)
    assert isinstance(scores, list) and [s.num_tokens for s in scores] == [1, 2, 30, 2, 1]
    alone = [llm.score(p, c) for p, c in zip(prompts, continuations, strict=True)]
    for score, other, prompt, continuation in zip(scores, alone, prompts, continuations, strict=True):
        np.testing.assert_allclose(score.token_logprobs, other.token_logprobs, atol=1e-5)
        np.testing.assert_allclose(
            score.token_logprobs, expected(llm, prompt + continuation, len(prompt))[0], atol=1e-5
        )
    assert llm.score([], []) == []


def test_chunks_before_the_continuation_have_no_head(llm: LLM) -> None:
    fresh = LLM(MODEL, num_speculative_tokens=0, program_cache=None, **SMALL)
    score = fresh.score([3] * 33, [4, 5])
    names = [name[0] for name in fresh.engine.runner.programs.compiled]
    assert names.count("prefill") == names.count("prompt_logprobs") == 1
    np.testing.assert_allclose(score.token_logprobs, expected(fresh, [3] * 33 + [4, 5], 33)[0], atol=1e-5)


def test_texts_are_split_where_the_tokens_of_the_prompt_end(llm: LLM) -> None:
    ids = llm.score([5, 6], [7, 8])
    for prompt, continuation in (("w5 w6", " w7 w8"), ("w5 w6 ", "w7 w8"), ("w5 w6", [7, 8]), ([5, 6], "w7 w8")):
        assert llm.score(prompt, continuation) == ids
    assert llm.score(["w5 w6", "w1"], [" w7 w8", " w2"]) == [ids, llm.score([1], [2])]


@pytest.mark.parametrize(
    ("prompt", "continuation", "message"),
    [
        ([5], [], "continuation is empty"),
        ("w1", "", "continuation is empty"),
        ("w1", "  ", "continuation has no tokens of its own"),
        ("", "w1", "prompt is empty"),
        ([[1], [2]], [[3], []], "continuation 1 is empty"),
        ([[1], []], [[3], [4]], "prompt 1 is empty"),
        ([[1], [2]], [[3]], "2 prompts but 1 continuations"),
        ([1], [[3]], "one of prompt and continuation is a list"),
        ([1] * 30, [2] * 11, r"prompt \+ continuation has 41 tokens, more than the 40 that max_model_len = 40 allows"),
        ([1], [96], "continuation: id 96 at position 0 is outside the vocabulary"),
        ([1], [True], "True is not a token id"),
    ],
)
def test_bad_input_is_named(llm: LLM, prompt: Any, continuation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.score(prompt, continuation)


# lm-eval


@pytest.fixture(scope="module")
def adapter(llm: LLM) -> Any:
    reason = "the adapter needs lm-eval: pip install 'mtpjax[eval]'"
    pytest.importorskip("lm_eval", reason=reason)
    from mtpjax.lm_eval_adapter import MtpjaxLM

    return MtpjaxLM(llm, prefix_token_id=1, max_gen_toks=5)


def instance(kind: str, *args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, args, 0)


def test_it_is_registered_under_its_name(adapter: Any, folder: Path) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("mtpjax") is type(adapter)
    made = type(adapter).create_from_arg_obj({"model": str(folder), "max_model_len": 24}, {"batch_size": 4})
    assert (made.max_length, made.llm.max_num_seqs) == (24, 4) and made.eot_token_id == made.llm.stop_token_ids[0]


def test_loglikelihoods_are_scores(adapter: Any, llm: LLM) -> None:
    pairs = [("w5 w6", " w7 w8"), ("", "w3 w4"), ("w2 " * 60, "w9")]
    found = adapter.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    scores = [llm.score([5, 6], [7, 8]), llm.score([1], [3, 4]), llm.score([2] * 39, [9])]
    np.testing.assert_allclose([x for x, _ in found], [s.logprob for s in scores], atol=1e-5)
    assert [greedy for _, greedy in found] == [s.is_greedy for s in scores]


def test_a_long_text_is_scored_in_windows(adapter: Any, llm: LLM) -> None:
    ids = np.random.default_rng(0).integers(0, 90, 90).tolist()
    text = " ".join(f"w{i}" for i in ids)
    (found,) = adapter.loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    windows = [([1], ids[:39]), ([ids[38]], ids[39:78]), (ids[50:78], ids[78:])]
    assert abs(found - sum(llm.score(*window).logprob for window in windows)) < 1e-4


def test_generation_ends_before_a_stop_string(adapter: Any, llm: LLM) -> None:
    (whole,) = adapter.generate_until([instance("generate_until", "w5 w6 w7", {"until": []})], disable_tqdm=True)
    (output,) = llm.generate(["w5 w6 w7"], SamplingParams(max_tokens=5))
    assert whole == output.text and len(whole.split()) > 2
    stop = whole.split()[2]
    options = [{"until": [stop], "do_sample": False}, {"until": stop, "max_gen_toks": 4, "temperature": 0}]
    found = adapter.generate_until([instance("generate_until", "w5 w6 w7", o) for o in options], disable_tqdm=True)
    assert found == [whole[: whole.index(stop)]] * 2
    with pytest.raises(ValueError, match="generation_kwargs has .'num_beams'."):
        adapter.generate_until([instance("generate_until", "w1", {"num_beams": 3})])


@cpu_only
def test_a_task_runs_from_end_to_end(adapter: Any, llm: LLM) -> None:
    """A multiple-choice task made here: its accuracy is that of choosing by the scores themselves."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows: list[dict[str, Any]] = [
        {"q": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i + 3}"], "label": i % 2} for i in range(6)
    ]

    task = ConfigurableTask(
        config={
            "task": "tiny",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    results = evaluator.evaluate(lm=adapter, task_dict={"tiny": task}, bootstrap_iters=0, log_samples=False)
    right = 0
    for row in rows:
        scores = [llm.score(row["q"], f" {choice}").logprob for choice in row["choices"]]
        right += int(np.argmax(scores)) == row["label"]
    assert results["results"]["tiny"]["acc,none"] == right / len(rows)
