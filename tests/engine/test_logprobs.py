"""Log-probabilities of generated tokens and of prompts: against float64, and equal in any company."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtpjax import LLM, CompletionOutput, Logprob, RequestOutput, SamplingParams
from mtpjax.decoding import speculative
from mtpjax.decoding.logprobs import PROMPT_BLOCK, LogprobsSpec, TokenLogprobs, window_logprobs
from mtpjax.decoding.logprobs import prompt_logprobs as prompt_program
from mtpjax.engine.batch_parts import num_top_size
from mtpjax.engine.request_logprobs import logprobs_of_prompts
from mtpjax.model import abstract_model
from mtpjax.model.cache import new_cache, padded_kv_length
from tests.helpers.models import cpu_only, numpy_model, rounded_to_bfloat16, tiny_config
from tests.helpers.programs import DENSE, VOCAB, abstract, computed_arrays

MODEL = numpy_model(tiny_config(moe=False, num_superblocks=1), seed=3, scale=0.3)
PROMPTS = [[5, 6, 7], [9] * 20, [11], list(range(1, 30)), [50, 40]]
OPTIONS: list[dict[str, Any]] = [
    {"logprobs": 5},
    {"logprobs": 0, "temperature": 0.9, "top_p": 0.8},
    {},
    {"logprobs": 2, "temperature": 1.0, "presence_penalty": 0.5},
    {"logprobs": 3, "temperature": 0.7, "top_k": 9},
]
PARAMS = [SamplingParams(max_tokens=12, seed=i, ignore_eos=True, **options) for i, options in enumerate(OPTIONS)]


def make_llm(num_speculative_tokens: int = 0, *, bits: bool = True, **options: Any) -> LLM:
    """Make an LLM; with `bits`, of the dtype in which logits do not depend on the rows beside them."""
    settings: dict[str, Any] = {"max_model_len": 80, "max_num_seqs": 5, "prefill_buckets": (64,)} | options
    model = rounded_to_bfloat16(MODEL) if bits else MODEL
    return LLM(model, num_speculative_tokens=num_speculative_tokens, program_cache=None, **settings)


@cache
def plain() -> LLM:
    return make_llm()


@cache
def in_float32() -> LLM:
    return make_llm(3, bits=False)


@cache
def alone() -> tuple[CompletionOutput, ...]:
    """Every prompt by itself, without drafts."""
    return tuple(plain().generate([p], q)[0].outputs[0] for p, q in zip(PROMPTS, PARAMS, strict=True))


def same(outputs: list[RequestOutput]) -> bool:
    """Return whether texts and all of their log-probabilities are those of `alone`, to the bit."""
    found = [(o.token_ids, o.outputs[0].logprobs, o.outputs[0].cumulative_logprob) for o in outputs]
    return found == [(o.token_ids, o.logprobs, o.cumulative_logprob) for o in alone()]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_they_have_the_form_of_vllm() -> None:
    for output, params in zip(alone(), PARAMS, strict=True):
        if params.logprobs is None:
            assert output.logprobs is None and output.cumulative_logprob is None
            continue
        assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids) == 12
        for token, entry in zip(output.token_ids, output.logprobs, strict=True):
            assert next(iter(entry)) == token and all(isinstance(e, Logprob) for e in entry.values())
            assert len(entry) in (params.logprobs, params.logprobs + 1)
            others = sorted((e.rank, -e.logprob) for e in entry.values())
            assert [rank for rank, _ in others][: params.logprobs] == list(range(1, params.logprobs + 1))
            assert [logprob for _, logprob in others] == sorted(logprob for _, logprob in others)
        assert output.cumulative_logprob == sum(
            e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True)
        )


def test_raw_ones_are_the_log_softmax_of_the_logits() -> None:
    llm = in_float32()
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, PARAMS), strict=True):
        rows = log_softmax(llm.logits(prompt + output.token_ids)[len(prompt) - 1 : -1])
        for row, token, entry in zip(rows, output.token_ids, output.outputs[0].logprobs or [], strict=False):
            for other, found in entry.items():
                assert abs(found.logprob - row[other]) < 1e-5
            assert entry[token].rank == 1 + (row > row[token]).sum()


@cpu_only
@pytest.mark.parametrize(
    "drafts", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 3, 8]
)
def test_drafts_and_batch_change_no_bit(drafts: int) -> None:
    assert same(make_llm(drafts).generate(PROMPTS, PARAMS))


@cpu_only
@pytest.mark.slow
def test_slots_that_are_filled_again_change_no_bit() -> None:
    """The loop then computes as many top tokens as its requests of the moment need."""
    llm = make_llm(2, max_num_seqs=2, max_prefill_seqs=1)
    assert same(llm.generate(PROMPTS, PARAMS))
    sizes = {name[-2] for name in llm.engine.runner.programs.compiled if "logprobs" in name}
    assert sizes <= {0, 5}


def test_a_batch_without_them_has_the_program_of_before() -> None:
    assert len(alone()) == len(PROMPTS)
    names = {name for name in plain().engine.runner.programs.compiled if name[0] == "decode"}
    raw = {("decode", 1, "logprobs", size, "raw_logprobs") for size in (0, 5)}  # 0 if nothing larger was there
    assert {("decode", 1), ("decode", 1, "logprobs", 5, "raw_logprobs")} <= names
    assert names <= {("decode", 1), *raw, ("decode", 1, "token_counts", "logprobs", 5, "raw_logprobs")}


@cpu_only
def test_rows_of_rejected_drafts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the log-probabilities of the window's last row for every token."""

    def last_row(spec: LogprobsSpec, raw: jax.Array, processed: jax.Array, *rest: Any) -> TokenLogprobs:
        return window_logprobs(spec, jnp.broadcast_to(raw[:, -1:], raw.shape), processed, *rest)

    monkeypatch.setattr(speculative, "window_logprobs", last_row)
    assert not same(make_llm(1).generate(PROMPTS, PARAMS))


def test_processed_ones_are_those_that_tokens_are_sampled_from() -> None:
    params = [
        SamplingParams(max_tokens=8, logprobs=20, temperature=0.7, top_k=4, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=8, logprobs=20, top_k=4, ignore_eos=True),
    ]
    llm = make_llm(2, bits=False, logprobs_mode="processed_logprobs")
    sampled, greedy = llm.generate(PROMPTS[:2], params)
    for output, temperature, kept in ((sampled, 0.7, 4), (greedy, 1.0, 20)):
        logits = llm.logits(output.prompt_token_ids + output.token_ids)[len(output.prompt_token_ids) - 1 : -1]
        for row, entry in zip(logits / temperature, output.outputs[0].logprobs or [], strict=True):
            finite = [token for token, e in entry.items() if np.isfinite(e.logprob)]
            if kept == 4:
                row = np.where(row >= np.sort(row)[-4], row, -np.inf)
            assert len(finite) == kept
            np.testing.assert_allclose([entry[t].logprob for t in finite], log_softmax(row)[finite], atol=5e-5)


# Prompts


def test_a_prompt_is_scored_without_generating() -> None:
    llm, prompt = in_float32(), list(range(1, 70))
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=4))
    entries, rows = output.prompt_logprobs, log_softmax(llm.logits(prompt))
    assert output.token_ids == [] and entries is not None and len(entries) == len(prompt) and entries[0] is None
    for token, row, entry in zip(prompt[1:], rows[:-1], entries[1:], strict=True):
        assert entry is not None and next(iter(entry)) == token
        top = np.argsort(-row, kind="stable")[:4].tolist()
        assert list(entry) == list(dict.fromkeys([token, *top]))
        assert all(abs(e.logprob - row[t]) < 1e-5 and e.rank == 1 + (row > row[t]).sum() for t, e in entry.items())
    (short,) = llm.generate([[4]], SamplingParams(max_tokens=2, prompt_logprobs=0))
    assert short.prompt_logprobs == [None] and short.outputs[0].logprobs is None


def test_those_of_a_text_are_those_of_its_generation() -> None:
    """Up to rounding: a prompt is read by other programs than the loop's."""
    (made,) = in_float32().generate([PROMPTS[0]], PARAMS[0])
    (read,) = in_float32().generate([PROMPTS[0] + made.token_ids], SamplingParams(max_tokens=0, prompt_logprobs=0))
    expected = [entry[t].logprob for t, entry in zip(made.token_ids, made.outputs[0].logprobs or [], strict=True)]
    entries = [entry or {} for entry in (read.prompt_logprobs or [])[len(PROMPTS[0]) :]]
    found = [entry[t].logprob for t, entry in zip(made.token_ids, entries, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@cpu_only
def test_chunks_and_batch_change_no_bit_of_a_prompt() -> None:
    prompts = [list(range(1, 71)), list(range(20, 53)), [3, 4]]

    def found(buckets: tuple[int, ...], together: bool) -> Iterator[list[np.ndarray]]:
        runner = make_llm(prefill_buckets=buckets, max_model_len=130).engine.runner
        for group in [prompts] if together else [[p] for p in prompts]:
            for each in logprobs_of_prompts(runner, group, 3):
                yield [np.asarray(x) for x in each]

    reference = list(found((128,), False))
    assert [len(each[0]) for each in reference] == [69, 32, 1]
    for buckets, together in (((64,), True), ((16, 64), False)):
        for one, other in zip(found(buckets, together), reference, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rows", [256, 320])
def test_logits_of_all_rows_never_exist(rows: int) -> None:
    graph, params = nnx.split(abstract_model(DENSE))
    cache = jax.eval_shape(lambda: new_cache(DENSE, 2, padded_kv_length(600, 1)))
    ids, pad = abstract(2, rows, dtype=jnp.int32), abstract(2, dtype=jnp.int32)
    step = jax.jit(prompt_program, static_argnames=("graph", "num_top", "vocab_size"))
    traced = step.trace(params, ids, ids, pad, cache, graph=graph, num_top=5, vocab_size=VOCAB)
    of_vocabulary = [a for a in computed_arrays(traced) if a.size and (VOCAB in a.shape or 1024 in a.shape)]
    assert of_vocabulary and max(a.size for a in of_vocabulary) == PROMPT_BLOCK * 1024
    assert "1009" in (text := traced.lower().compile().as_text()) and f"[{2 * rows},{VOCAB}]" not in text


# Bad input


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, True, 1.5, "3"])
def test_a_bad_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; expected a whole number >= 0 or None"):
        SamplingParams(**{name: value})


def test_more_than_the_limit_is_refused() -> None:
    llm = plain()
    with pytest.raises(ValueError, match="prompt 1: logprobs is 21; at most max_logprobs = 20"):
        llm.generate([[1], [2]], [SamplingParams(), SamplingParams(logprobs=21)])
    with pytest.raises(ValueError, match="prompt 0: prompt_logprobs is 21; at most max_logprobs = 20"):
        llm.generate([[1]], SamplingParams(prompt_logprobs=21))
    with pytest.raises(ValueError, match="prompt 0 has 80 tokens, more than the 79"):
        llm.generate([[1] * 80], SamplingParams(max_tokens=0, prompt_logprobs=1))
    with pytest.raises(ValueError, match="logprobs_mode is 'raw'; expected 'raw_logprobs' or 'processed_logprobs'"):
        LLM(MODEL, logprobs_mode="raw", max_model_len=80)
    with pytest.raises(ValueError, match="max_logprobs is -1"):
        LLM(MODEL, max_logprobs=-1, max_model_len=80)
    assert [num_top_size(n, 30) for n in (0, 1, 5, 6, 20, 21)] == [0, 5, 5, 20, 20, 30] and num_top_size(2, 3) == 3
