"""Presence, frequency and repetition penalties: the formula, and a text that no draft length and no batch changes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpjax.decoding import logits_processors, steps
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.penalties import Penalties, TokenCounts, apply_penalties, round_to_bfloat16
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request, RequestState
from mtpjax.engine.stack_requests import stack_requests
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.models import make_engine, numpy_model, tiny_config

VOCAB, NUM_TOKENS, MAX_MODEL_LEN = 12, 60, 120  # so few ids that tokens are repeated within one window
NO_PENALTIES: dict[str, Any] = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def penalized_row(
    logits: np.ndarray, prompt: Sequence[int], text: Sequence[int], presence: float, frequency: float, repetition: float
) -> np.ndarray:
    """Return the logits of one row in float64, token by token, as the definitions say."""
    out = logits.astype(np.float64)
    for token in set(prompt) | set(text):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token, count in Counter(text).items():
        out[token] -= frequency * count + presence
    return out


def batch_penalties(*requests: tuple[float, float, float]) -> Penalties:
    """Make penalties from (presence, frequency, repetition) of each request."""
    presence, frequency, repetition = (jnp.array(column, jnp.float32) for column in zip(*requests, strict=True))
    return Penalties(presence, frequency, repetition)


def count_tokens(vocab: int, *requests: tuple[Sequence[int], Sequence[int]]) -> TokenCounts:
    """Count the tokens of (prompt, text) of each request."""
    in_prompt, counts = np.zeros((len(requests), vocab), bool), np.zeros((len(requests), vocab), np.int32)
    for b, (prompt, text) in enumerate(requests):
        in_prompt[b, list(prompt)] = True
        np.add.at(counts[b], np.array(text, int), 1)
    return TokenCounts(jnp.asarray(in_prompt), jnp.asarray(counts))


def token_lists(vocab: int, max_size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, vocab - 1), max_size=max_size)


_apply_penalties = jax.jit(apply_penalties)


@pytest.mark.fast
@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-30, 30, width=32), min_size=60, max_size=60),
    prompt=token_lists(20, 8),
    text=token_lists(20, 8),
    drafts=st.lists(st.integers(0, 19), min_size=2, max_size=2),
    presence=st.sampled_from([-2.0, 0.0, 0.3, 1.5]),
    frequency=st.sampled_from([-1.0, 0.0, 0.1, 2.0]).map(round_to_bfloat16),
    repetition=st.sampled_from([0.8, 1.0, 1.1, 3.0]),
)
def test_the_rows_of_a_window_are_to_the_bit_the_rows_that_a_drafter_sees_one_by_one(
    values: list[float],
    prompt: list[int],
    text: list[int],
    drafts: list[int],
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    """Row r of a window follows r drafts and counts them; the logits are those of the definition."""
    logits = np.array(values, np.float32).reshape(1, 3, 20)
    penalties, counts = batch_penalties((presence, frequency, repetition)), count_tokens(20, (prompt, text))
    window = np.asarray(_apply_penalties(logits, penalties, counts, jnp.array([drafts])))
    for r in range(3):
        want = penalized_row(logits[0, r], prompt, text + drafts[:r], presence, frequency, repetition)
        np.testing.assert_allclose(window[0, r], want, rtol=2e-6, atol=2e-6)
        assert np.array_equal(_apply_penalties(logits[:, r : r + 1], penalties, counts)[0, 0], window[0, r])
        counts = counts.add(jnp.array([drafts[r : r + 1] or [0]]), jnp.ones(1, int))


@pytest.mark.fast
def test_neutral_penalties_change_no_bit() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 50)), jnp.float32)
    counts = count_tokens(50, ([1, 2], [3, 3]), ([], [4]))
    rows = np.asarray(apply_penalties(logits, batch_penalties((0, 0, 1), (0.5, 0, 1)), counts))
    assert np.array_equal(rows[0], logits[0]) and np.flatnonzero(rows[1] != logits[1]).tolist() == [4]
    assert apply_penalties(logits, None, counts) is logits
    assert apply_penalties(logits, batch_penalties((1, 1, 1), (1, 1, 1)), None) is logits


@pytest.mark.fast
def test_a_frequency_times_any_count_is_exact() -> None:
    """So it does not matter whether a compiler fuses product and sum."""
    assert round_to_bfloat16(0.1) == 0.10009765625 and round_to_bfloat16(-2.0) == -2
    counts = np.arange(1 << 16, dtype=np.float64)
    for frequency in map(round_to_bfloat16, np.linspace(-2, 2, 41).tolist()):
        assert np.array_equal(np.float32(frequency) * counts.astype(np.float32), frequency * counts)


def mixed_requests() -> list[Request]:
    """Requests with each penalty alone, all of them, and none; greedy and sampled."""
    rng = np.random.default_rng(3)
    how: tuple[dict[str, Any], ...] = (
        {},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.1, "temperature": 0.0},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.4, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "top_k": 9},
        {"presence_penalty": -0.3, "temperature": 0.0},
    )
    prompts = [tuple(rng.integers(0, VOCAB, 4 + 5 * i).tolist()) for i in range(len(how))]
    return [
        Request(i, prompt, NUM_TOKENS, seed=50 + i, **{"temperature": 0.9} | options)
        for i, (prompt, options) in enumerate(zip(prompts, how, strict=True))
    ]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return numpy_model(tiny_config(moe=False, num_superblocks=1, vocab_size=VOCAB), seed=7, scale=0.15)


def engine_of(model: LoadedModel, num_speculative_tokens: int) -> Engine:
    return make_engine(model, num_speculative_tokens=num_speculative_tokens, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def plain_engine(model: LoadedModel) -> Engine:
    return engine_of(model, 0)


@pytest.fixture(scope="module")
def drafting_engine(model: LoadedModel) -> Engine:
    return engine_of(model, 3)


@pytest.fixture(scope="module")
def plain_texts(plain_engine: Engine) -> list[list[int]]:
    return [state.tokens for state in plain_engine.run(mixed_requests(), 6)]


def share_of_first_drafts(states: Sequence[RequestState]) -> float:
    """Return the share of steps that accept the first draft."""
    return sum(s.num_accepted_tokens_per_pos[0] for s in states) / sum(s.num_steps for s in states)


def test_the_text_is_the_same_at_any_draft_length_and_batch(
    model: LoadedModel, drafting_engine: Engine, plain_texts: list[list[int]]
) -> None:
    """All requests side by side, and six requests in four slots, whose counts are replaced when slots become free."""
    for engine, num_slots in ((drafting_engine, 6), (engine_of(model, 1), 4)):
        states = engine.run(mixed_requests(), num_slots)
        assert [s.tokens for s in states] == plain_texts, num_slots
        assert 0 < share_of_first_drafts(states) < 1


def test_greedy_tokens_maximise_the_penalized_logits(plain_engine: Engine, plain_texts: list[list[int]]) -> None:
    requests = mixed_requests()
    unpenalized = plain_engine.run([replace(r, **NO_PENALTIES) for r in requests], 6)
    differs = [s.tokens != text for s, text in zip(unpenalized, plain_texts, strict=True)]
    assert differs == [r.has_penalties for r in requests]
    whole = [r.prompt_token_ids + tuple(text) for r, text in zip(requests, plain_texts, strict=True)]
    chunks = plain_engine.runner.prefill(whole, OutputRows.all(), return_logits=True)[2]
    logits = np.concatenate(chunks, axis=1)[:, -NUM_TOKENS - 1 : -1]  # the rows before the new tokens
    for request, text, rows in zip(requests, plain_texts, logits, strict=True):
        if request.temperature:
            continue
        frequency = round_to_bfloat16(request.frequency_penalty)
        penalties = request.presence_penalty, frequency, request.repetition_penalty
        for i, row in enumerate(rows):
            penalized = penalized_row(row, request.prompt_token_ids, text[:i], *penalties)
            assert penalized.argmax() == text[i], (request.index, i)


def forget_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let verification count what came before the window, but not the drafts before a row."""

    def without_drafts(logits: Any, penalties: Any, counts: Any, drafts: Any) -> Any:
        return apply_penalties(logits, penalties, counts)

    monkeypatch.setattr(logits_processors, "apply_penalties", without_drafts)


def count_rejected_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop count all tokens of a window, the rejected ones as well."""
    add = TokenCounts.add

    def add_all(self: TokenCounts, tokens: jax.Array, num_tokens: jax.Array) -> TokenCounts:
        return add(self, tokens, jnp.full_like(num_tokens, tokens.shape[1]))

    monkeypatch.setattr(TokenCounts, "add", add_all)


@pytest.mark.parametrize("plant_bug", [forget_drafts, count_rejected_tokens])
def test_the_texts_show_a_planted_bug(
    plant_bug: Callable[[pytest.MonkeyPatch], None],
    model: LoadedModel,
    plain_texts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant_bug(monkeypatch)
    texts = [state.tokens for state in engine_of(model, 3).run(mixed_requests(), 6)]
    assert texts[0] == plain_texts[0] and texts != plain_texts


def test_the_drafter_has_the_penalties_too(
    model: LoadedModel, drafting_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them there the text stays, but drafts repeat what the text must not, and fewer are accepted."""
    requests = [
        Request(i, (i, 2, 3), NUM_TOKENS, 0.9, i, presence_penalty=2.0, frequency_penalty=2.0) for i in range(6)
    ]
    with_penalties = drafting_engine.run(requests, 6)
    monkeypatch.setattr(steps, "process_logits", lambda logits, *_: logits)
    without = engine_of(model, 3).run(requests, 6)
    assert [s.tokens for s in without] == [s.tokens for s in with_penalties]
    assert share_of_first_drafts(without) < 0.8 * share_of_first_drafts(with_penalties)


def test_a_penalty_larger_than_the_range_of_the_logits_lets_no_token_occur_twice(
    plain_engine: Engine, drafting_engine: Engine
) -> None:
    request = Request(0, (1, 2, 3), VOCAB - 1, 0.0, 0)
    (free,) = plain_engine.run([request], 6)
    assert max(Counter(free.tokens).values()) > 2
    chunks = plain_engine.runner.prefill([(1, 2, 3, *free.tokens)], OutputRows.all(), return_logits=True)[2]
    largest_range = float(np.ptp(np.concatenate(chunks, axis=1), axis=-1).max())
    penalized = replace(request, presence_penalty=largest_range + 1)  # more than SamplingParams allows
    for engine in (plain_engine, drafting_engine):
        assert max(Counter(engine.run([penalized], 6)[0].tokens).values()) == 1


def test_the_loop_counts_tokens_only_if_a_request_has_penalties(model: LoadedModel) -> None:
    engine, requests = engine_of(model, 1), [replace(r, max_tokens=4) for r in mixed_requests()]
    free, penalized = requests[:2]
    engine.run([free], 1)
    num_programs = engine.num_programs
    engine.run([replace(free, top_k=3)], 1)
    assert engine.num_programs == num_programs
    engine.run([penalized], 1)
    engine.run([replace(penalized, presence_penalty=0.2, repetition_penalty=1.2)], 1)
    assert engine.num_programs == num_programs + 1
    assert stack_requests([free]).penalties is None
