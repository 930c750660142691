"""Speculation never changes the text: at any draft length and in any batch it is the text of plain decoding."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.sampling import gumbel_noise
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request
from tests.helpers.models import make_engine
from tests.helpers.speculation import (
    BATCH,
    MAX_MODEL_LEN,
    NUM_TOKENS,
    VOCAB,
    check_figures,
    plain_texts,
    small_engine,
    small_model,
    unequal_requests,
)

TEMPERATURES = (0.0, 0.8)


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_plain_decoding_is_what_reading_the_text_says(kind: str) -> None:
    """Other tests compare with plain decoding: each of its tokens maximises the logits of its row plus its noise."""
    noise = jax.jit(jax.vmap(gumbel_noise, (None, 0, None)), static_argnums=2)
    for temperature in TEMPERATURES:
        requests, texts = unequal_requests(temperature), plain_texts(kind, temperature)
        whole = [r.prompt_token_ids + tuple(tokens) for r, tokens in zip(requests, texts, strict=True)]
        chunks = small_engine(kind, 0).runner.prefill(whole, OutputRows.all(), return_logits=True)[2]
        logits = np.concatenate(chunks, axis=1)  # padded in front
        for request, text, rows in zip(requests, texts, logits, strict=True):
            rows = rows[-len(text) - 1 : -1]  # the row before each new token
            positions = len(request.prompt_token_ids) + np.arange(len(text))
            noisy = rows + temperature * np.asarray(noise(jnp.uint32(request.seed), positions, VOCAB))
            assert noisy.argmax(-1).tolist() == text


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("kind", "num_speculative_tokens"),
    [
        *(("moe", n) for n in (1, 2, 3, 4, 8)),
        ("dense", 1),
        pytest.param("dense", 3, marks=pytest.mark.fast),
        ("dense", 8),
    ],
)
def test_draft_length_does_not_change_the_text(kind: str, num_speculative_tokens: int, temperature: float) -> None:
    """In a batch of five unequal prompts."""
    states = small_engine(kind, num_speculative_tokens).run(unequal_requests(temperature), BATCH)
    for state, want in zip(states, plain_texts(kind, temperature), strict=True):
        assert state.tokens == want[:NUM_TOKENS]
        assert state.finished and not state.stopped
        check_figures(state, num_speculative_tokens)
    if temperature:  # with the noise that both share, drafts are right far more often than one in 96, and not always
        num_steps = sum(s.num_steps for s in states)
        assert 0.25 < sum(s.num_accepted_tokens_per_pos[0] for s in states) / num_steps < 0.5
    assert len({tuple(s.tokens) for s in states}) == len(states)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("kind", "num_speculative_tokens"), [("moe", 3), ("dense", 0)])
def test_neighbours_do_not_change_the_text(kind: str, num_speculative_tokens: int, temperature: float) -> None:
    """Each request alone, in a batch of one, has the text that it has beside four others."""
    alone = small_engine(kind, num_speculative_tokens).run(unequal_requests(temperature), 1)
    assert [s.tokens for s in alone] == [tokens[:NUM_TOKENS] for tokens in plain_texts(kind, temperature)]


@cache
def _engine_with_a_limited_head() -> Engine:
    return make_engine(small_model("moe"), num_speculative_tokens=3, max_model_len=MAX_MODEL_LEN, mtp_prompt_tokens=1)


def engine_whose_head_reads(mtp_prompt_tokens: int) -> Engine:
    """Return an engine whose MTP head reads the last tokens of a prompt. All of them share the program of the loop."""
    engine = _engine_with_a_limited_head()
    engine.runner.mtp_prompt_tokens = mtp_prompt_tokens
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("mtp_prompt_tokens", [1, 5, 32, 33])
def test_how_much_of_the_prompt_the_head_reads_does_not_change_the_text(mtp_prompt_tokens: int) -> None:
    """Chunks have 32 rows: the rows that the head skips end inside a chunk, at its edge, or in the chunk before."""
    for temperature in TEMPERATURES:
        states = engine_whose_head_reads(mtp_prompt_tokens).run(unequal_requests(temperature), BATCH)
        assert [s.tokens for s in states] == [tokens[:NUM_TOKENS] for tokens in plain_texts("moe", temperature)]
        for state in states:
            check_figures(state, 3)


def test_a_head_that_reads_the_last_tokens_has_their_values_and_no_others() -> None:
    prompts = [r.prompt_token_ids for r in unequal_requests(0.0)]
    runner = small_engine("moe", 3).runner
    whole, _, _ = runner.prefill(prompts)
    for mtp_prompt_tokens in (1, 5, 33, MAX_MODEL_LEN):
        part, hidden, _ = runner.prefill(prompts, mtp_prompt_tokens=mtp_prompt_tokens)
        for i, prompt in enumerate(prompts):
            num_rows = min(mtp_prompt_tokens, len(prompt))
            assert int(part.mtp_start_pos[i]) == len(prompt) - num_rows
            values, all_values = np.asarray(part.mtp_v[0, i]), np.asarray(whole.mtp_v[0, i])
            want = all_values[:, len(prompt) - num_rows : len(prompt)]
            np.testing.assert_allclose(values[:, :num_rows], want, atol=1e-5)
            assert not values[:, num_rows:].any() and all_values[:, : len(prompt)].any()
        assert np.asarray(hidden).any()
    # The last of these limits is longer than any prompt: then keys are the same as well, and so is all that follows.
    np.testing.assert_allclose(np.asarray(part.mtp_k), np.asarray(whole.mtp_k), atol=1e-5)
    limited, unlimited = (
        engine.run(unequal_requests(0.8), BATCH)
        for engine in (engine_whose_head_reads(MAX_MODEL_LEN), small_engine("moe", 3))
    )
    accepted = [[state.num_accepted_tokens_per_pos for state in states] for states in (limited, unlimited)]
    assert accepted[0] == accepted[1]


@pytest.mark.parametrize("chosen", [[2], [4, 1, 3]])
def test_a_half_empty_batch_does_not_change_the_text(chosen: list[int]) -> None:
    requests = unequal_requests(0.8)
    states = small_engine("moe", 3).run([requests[i] for i in chosen], BATCH)
    assert [s.tokens for s in states] == [plain_texts("moe", 0.8)[i][:NUM_TOKENS] for i in chosen]


def requests_that_differ() -> list[Request]:
    """Return requests with other limits, temperatures, seeds and stop tokens each."""
    sampled, greedy = plain_texts("moe", 0.8), plain_texts("moe", 0.0)
    first, second, third, fourth, fifth = unequal_requests(0.8)
    return [
        replace(first, max_tokens=7),
        replace(second, temperature=0.0, max_tokens=0),
        replace(third, temperature=0.0, stop_token_ids=(VOCAB + 5, greedy[2][90])),
        replace(fourth, max_tokens=1),
        replace(fifth, stop_token_ids=tuple(dict.fromkeys((sampled[4][40], sampled[4][41], sampled[4][55])))),
    ]


def text_until_its_end(request: Request) -> tuple[list[int], bool]:
    """Return the text of a request up to its limit or its first stop token, and whether a stop token ends it."""
    tokens = plain_texts("moe", request.temperature)[request.index][: request.max_tokens]
    stop = next((i for i, token in enumerate(tokens) if token in request.stop_token_ids), None)
    return (tokens, False) if stop is None else (tokens[: stop + 1], True)


@pytest.mark.parametrize("num_speculative_tokens", [0, 1, 3, 8])
def test_every_request_keeps_its_own_settings(num_speculative_tokens: int) -> None:
    requests, engine = requests_that_differ(), small_engine("moe", num_speculative_tokens)
    want = [text_until_its_end(r) for r in requests]
    assert [stopped for _, stopped in want] == [False, False, True, False, True]
    streamed: dict[int, list[int]] = {r.index: [] for r in requests}
    states = engine.run(requests, BATCH, lambda state, new: streamed[state.request.index].extend(new))
    assert [(s.tokens, s.stopped) for s in states] == want
    assert [streamed[r.index] for r in requests] == [tokens for tokens, _ in want]
    for state in states:
        check_figures(state, num_speculative_tokens)
    assert states[1].num_steps == 0
    # Again, with other neighbours and other slots.
    again = engine.run([requests[4], requests[2]], BATCH)
    assert [(s.tokens, s.stopped) for s in again] == [want[4], want[2]]


def test_a_text_stops_in_whichever_row_of_a_window_its_stop_token_is() -> None:
    tokens, request = plain_texts("moe", 0.8)[0], unequal_requests(0.8)[0]
    first_occurrences = [i for i, token in enumerate(tokens[:40]) if token not in tokens[:i]]
    assert len(first_occurrences) >= 15
    requests = [replace(request, index=n, stop_token_ids=(tokens[i],)) for n, i in enumerate(first_occurrences)]
    states = small_engine("moe", 3).run(requests, BATCH)
    assert [s.tokens for s in states] == [tokens[: i + 1] for i in first_occurrences]
    assert all(s.stopped for s in states)


@pytest.mark.parametrize("num_speculative_tokens", [0, 3])
def test_outputs_of_the_api_have_the_text_and_figures_that_fit_together(num_speculative_tokens: int) -> None:
    llm = LLM(
        small_model("moe"),
        num_speculative_tokens=num_speculative_tokens,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=BATCH,
        prefill_buckets=(32,),
    )
    requests = requests_that_differ()
    params = [
        SamplingParams(
            max_tokens=r.max_tokens,
            temperature=r.temperature,
            seed=r.seed,
            ignore_eos=True,
            stop_token_ids=tuple(token for token in r.stop_token_ids if token < VOCAB),
        )
        for r in requests
    ]
    outputs = llm.generate([list(r.prompt_token_ids) for r in requests], params)
    for request, out in zip(requests, outputs, strict=True):
        tokens, stopped = text_until_its_end(request)
        assert out.token_ids == tokens and out.finish_reason == ("stop" if stopped else "length")
        m = out.metrics
        assert m.num_prompt_tokens == len(request.prompt_token_ids)
        assert m.num_drafts == (m.num_steps if num_speculative_tokens else 0)
        assert m.num_draft_tokens == m.num_steps * num_speculative_tokens
        assert len(m.num_accepted_tokens_per_pos) == num_speculative_tokens
        assert m.num_accepted_tokens == sum(m.num_accepted_tokens_per_pos)
        assert m.mean_acceptance_length == (1 + m.num_accepted_tokens / m.num_drafts if m.num_drafts else 1.0)
        assert len(tokens) <= m.num_steps + m.num_accepted_tokens <= len(tokens) + num_speculative_tokens


@pytest.mark.slow
def test_the_embedded_model_has_one_text_and_useful_drafts(shipped_code: None) -> None:
    """As users run it: the same text with and without drafts, greedy and sampled, and many accepted drafts."""
    lines = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][:5]
    params = [
        SamplingParams(max_tokens=NUM_TOKENS, temperature=t, seed=5, ignore_eos=True) for t in (0.8, 0.0, 0.8, 0.0, 0.8)
    ]
    options: dict[str, Any] = {"max_model_len": 500, "max_num_seqs": 5, "prefill_buckets": (64,)}
    plain, drafted = (LLM(num_speculative_tokens=n, **options).generate(prompts, params) for n in (0, 3))
    assert [out.token_ids for out in drafted] == [out.token_ids for out in plain]
    assert all(len(out.token_ids) == NUM_TOKENS for out in plain)
    num_accepted = sum(out.metrics.num_accepted_tokens for out in drafted)
    assert num_accepted / sum(out.metrics.num_steps for out in drafted) > 0.5
