"""Biases, allowed tokens, bad words and minimal lengths: as in transformers, and a text that no draft changes."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax.decoding import logits_processors
from mtpjax.decoding.constraints import (
    BAD_WORD_CAPACITIES,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    Constraints,
    RecentTokens,
    apply_constraints,
)
from mtpjax.decoding.logits_processors import TextState
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.engine.batch_parts import parts_of
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request
from mtpjax.engine.stack_constraints import no_recent_tokens, stack_constraints
from mtpjax.engine.stack_requests import stack_requests
from mtpjax.loading.draft_head import with_draft_head
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.models import make_engine, numpy_model, tiny_config

VOCAB = 96
NUM_TOKENS = 40
NUM_REQUESTS = 7
NUM_DRAFTS = 3  # of the rows that are compared with transformers
Rows = np.ndarray


def random_request(rng: np.random.Generator, index: int, vocab: int) -> Request:
    """Return a request with some of the constraints; its bad words have few different tokens, so that they occur."""
    words = tuple(tuple(rng.integers(0, 4, rng.integers(1, 5)).tolist()) for _ in range(rng.integers(0, 12)))
    allowed = rng.permutation(vocab)[: rng.integers(6, vocab)].tolist() + [0, 1, 2, 3, 4, 5]
    bias = {int(i): float(rng.normal() * 30) for i in rng.integers(0, vocab, rng.integers(0, 6))}
    return Request(
        index,
        (1,),
        99,
        0.0,
        0,
        min_tokens=int(rng.integers(0, 50)),
        early_stop_token_ids=tuple(rng.permutation(vocab)[: rng.integers(0, 5)].tolist()),
        logit_bias=tuple(bias.items()),
        allowed_token_ids=tuple(dict.fromkeys(allowed)) if rng.random() < 0.5 else (),
        bad_words=tuple(dict.fromkeys(word for word in words if word != (5,))),
    )


def transformers_row(row: Rows, request: Request, text: Sequence[int]) -> Rows:
    """Apply the processors of transformers to the logits after `text`, the generated tokens."""
    import torch
    import transformers as hf

    ids, scores = torch.tensor([list(text)], dtype=torch.long), torch.tensor(row[None])
    if request.allowed_token_ids:
        others = sorted(set(range(len(row))) - set(request.allowed_token_ids))
        scores = hf.SuppressTokensLogitsProcessor(others)(ids, scores) if others else scores
    if request.bad_words:
        scores = hf.NoBadWordsLogitsProcessor([list(word) for word in request.bad_words])(ids, scores)
    if request.early_stop_token_ids and request.min_tokens:
        stops = list(request.early_stop_token_ids)
        scores = hf.MinNewTokensLengthLogitsProcessor(0, request.min_tokens, stops)(ids, scores)
    if request.logit_bias:
        pairs: list[Any] = [[[token], value] for token, value in request.logit_bias]
        scores = hf.SequenceBiasLogitsProcessor(pairs)(ids, scores)
    return scores[0].numpy()


def text_state(texts: Sequence[Sequence[int]]) -> RecentTokens:
    """Return the state after these texts, added in unequal parts as rounds of the loop do."""
    state, rng, done = no_recent_tokens(len(texts)), np.random.default_rng(0), [0] * len(texts)
    while any(n < len(text) for n, text in zip(done, texts, strict=True)):
        window = np.full((len(texts), 9), 77, np.int32)  # rejected tokens stand behind the new ones
        counts = [min(int(rng.integers(0, 10)), len(text) - n) for n, text in zip(done, texts, strict=True)]
        for b, (count, text) in enumerate(zip(counts, texts, strict=True)):
            window[b, :count] = text[done[b] : done[b] + count]
            done[b] += count
        state = state.add(jnp.asarray(window), jnp.asarray(counts, jnp.int32))
    return state


def example(seed: int, batch: int, vocab: int) -> tuple[list[Request], list[list[int]], np.ndarray, np.ndarray]:
    """Return requests, their texts so far, drafts `[B, 3]` and logits `[B, 4, V]`."""
    rng = np.random.default_rng(seed)
    requests = [random_request(rng, i, vocab) for i in range(batch)]
    texts = [rng.integers(0, 4, rng.integers(0, 48)).tolist() for _ in range(batch)]
    drafts = rng.integers(0, 4, (batch, NUM_DRAFTS)).astype(np.int32)
    return requests, texts, drafts, rng.normal(size=(batch, NUM_DRAFTS + 1, vocab)).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
def test_logits_are_those_of_transformers(seed: int) -> None:
    """Every row of a window, for texts shorter and longer than the history."""
    pytest.importorskip("transformers", reason="the oracle is transformers, which is not installed")
    requests, texts, drafts, logits = example(seed, 12, 50)
    constraints, state = stack_constraints(requests, 50, parts_of(requests)), text_state(texts)
    got = np.asarray(apply_constraints(jnp.asarray(logits), constraints, state, jnp.asarray(drafts)))
    num_forbidden = 0
    for b, request in enumerate(requests):
        for r in range(NUM_DRAFTS + 1):
            want = transformers_row(logits[b, r], request, texts[b] + drafts[b, :r].tolist())
            num_forbidden += np.isinf(want).sum() - (50 - len(request.allowed_token_ids or range(50)))
            assert (got[b, r] == want).all(), (b, r)
    assert num_forbidden > 50


def test_a_row_after_drafts_is_the_first_row_of_a_longer_text() -> None:
    requests, texts, drafts, logits = example(1, 12, 50)
    constraints = stack_constraints(requests, 50, parts_of(requests))
    window = apply_constraints(jnp.asarray(logits), constraints, text_state(texts), jnp.asarray(drafts))
    for r in range(NUM_DRAFTS + 1):
        longer = text_state([text + drafts[b, :r].tolist() for b, text in enumerate(texts)])
        row = apply_constraints(jnp.asarray(logits[:, r : r + 1]), constraints, longer)
        assert (row[:, 0] == window[:, r]).all()


@pytest.mark.parametrize("count", [1, 7, 30])
def test_a_draft_head_has_the_logits_of_its_ids(count: int) -> None:
    """Its tokens are places among ids; the text may have ids that it lacks, and so may biases and bad words."""
    requests, texts, drafts, logits = example(2, 12, 50)
    ids = np.sort(np.random.default_rng(count).permutation(50)[:count]).astype(np.int32)
    ids[0] = min(ids[0], 2)  # a token of texts and words
    params = stack_requests(requests, 50)
    state = TextState(recent_tokens=text_state(texts))
    places = np.random.default_rng(3).integers(0, count, (12, NUM_DRAFTS)).astype(np.int32)
    places[:6] = 0
    subset, subset_params, one = state.take(jnp.asarray(ids)), params.take(jnp.asarray(ids)), jnp.ones(12, jnp.int32)
    for r in range(NUM_DRAFTS + 1):
        row = jnp.asarray(logits[:, r : r + 1])
        want = np.asarray(logits_processors.process_logits(row, params, state))[..., ids]
        got = np.asarray(logits_processors.process_logits(row[..., ids], subset_params, subset))
        some = np.isfinite(want).any(axis=-1)  # a row with nothing left is another one in the subset
        assert (got == want)[some].all() and some.any()
        if r < NUM_DRAFTS:
            state = state.add(jnp.asarray(ids[places[:, r : r + 1]]), one)
            subset = subset.add(jnp.asarray(places[:, r : r + 1]), one)


def test_allowed_tokens_hold_where_the_others_leave_nothing() -> None:
    """Row 0 is free, row 1 has a bad word before it, and in row 2 the only other token is a stop token, too early."""
    request = Request(
        0,
        (1,),
        9,
        0.0,
        0,
        allowed_token_ids=(3, 5),
        bad_words=((3, 3), (3, 5)),
        min_tokens=5,
        early_stop_token_ids=(5,),
    )
    logits = jnp.asarray(np.arange(24, dtype=np.float32).reshape(1, 3, 8))
    drafts = jnp.asarray([[3, 5]], jnp.int32)
    got = np.asarray(
        apply_constraints(logits, stack_constraints([request], 8, parts_of([request])), no_recent_tokens(1), drafts)
    )[0]
    finite = [np.flatnonzero(np.isfinite(row)).tolist() for row in got]
    assert finite == [[3], [3, 5], [3]] and (got[1, [3, 5]] == [11, 13]).all()


def test_a_structured_output_keeps_the_tokens_that_it_leaves() -> None:
    """Where it leaves stop tokens alone, `min_tokens` does not count; where it leaves others, it does."""
    request = Request(0, (1,), 9, 0.0, 0, min_tokens=5, early_stop_token_ids=(5,))
    logits = np.full((1, 2, 8), -np.inf, np.float32)
    logits[0, 0, 5], logits[0, 1, [3, 5]] = 1.0, 2.0  # what the mask of the structure leaves
    constraints = stack_constraints([request], 8, parts_of([request]))
    got = apply_constraints(jnp.asarray(logits), constraints, no_recent_tokens(1), is_masked=True)
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(got)[0]] == [[5], [3]]


def small_model() -> LoadedModel:
    return numpy_model(tiny_config(moe=False, num_superblocks=1, vocab_size=VOCAB), seed=7, scale=0.15)


@cache
def engine_of(num_speculative_tokens: int) -> Engine:
    return new_engine(num_speculative_tokens)


def new_engine(num_speculative_tokens: int, model: LoadedModel | None = None) -> Engine:
    return make_engine(model or small_model(), num_speculative_tokens=num_speculative_tokens, max_model_len=120)


@cache
def mixed_requests() -> list[Request]:
    """Requests with each constraint alone, all of them, and none, made so that their free texts violate them."""
    rng = np.random.default_rng(3)
    prompts = [tuple(rng.integers(0, VOCAB, 3 + 5 * i).tolist()) for i in range(NUM_REQUESTS)]
    # The hottest ones follow the noise, which draft and trunk share: their drafts are often accepted.
    temperatures = (0.0, 4.0, 0.0, 0.9, 0.0, 4.0, 4.0)
    free = [Request(i, prompt, NUM_TOKENS, temperatures[i], 50 + i) for i, prompt in enumerate(prompts)]
    texts = [state.tokens for state in engine_of(0).run(free, NUM_REQUESTS)]

    def parts(text: Sequence[int], *lengths: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(text[i : i + n]) for n in lengths for i in range(2, 30, 3))[:8]

    stops = tuple(dict.fromkeys(texts[1][3:11]))
    how: list[dict[str, Any]] = [
        {},
        {"stop_token_ids": stops, "early_stop_token_ids": stops, "min_tokens": 15},
        {"logit_bias": ((texts[2][0], -5.0), (texts[2][3], 1.5), (7, 2.0))},
        {"allowed_token_ids": tuple(range(0, VOCAB, 5)), "top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"bad_words": parts(texts[4], 2, 4)},
        {"bad_words": (*parts(texts[5], 2), (texts[5][0],)), "presence_penalty": 0.5, "repetition_penalty": 1.1},
        {
            "allowed_token_ids": tuple(range(0, VOCAB, 3)),
            "logit_bias": ((3, 1.0), (6, -2.0)),
            "bad_words": tuple((a, b) for a in range(0, VOCAB, 3) for b in (12, 15, 18, 90)),
            "stop_token_ids": (9, 12),
            "early_stop_token_ids": (9, 12),
            "min_tokens": 20,
            "frequency_penalty": 0.1,
        },
    ]
    return [replace(request, **options) for request, options in zip(free, how, strict=True)]


@cache
def plain_texts() -> list[list[int]]:
    return [state.tokens for state in engine_of(0).run(mixed_requests(), NUM_REQUESTS)]


def check_texts(engine: Engine, num_slots: int, requests: Sequence[Request] | None = None) -> None:
    states = engine.run(mixed_requests() if requests is None else requests, num_slots)
    for state in states:
        assert state.tokens == plain_texts()[state.request.index], state.request.index
    if engine.runner.num_speculative_tokens and len(states) > 1:
        assert 0 < sum(s.num_accepted_tokens_per_pos[0] for s in states) < sum(s.num_steps for s in states)


@pytest.mark.parametrize(
    ("num_speculative_tokens", "num_slots"),
    [(3, NUM_REQUESTS), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 4), (8, 3), (0, 2)))],
)
def test_the_text_is_the_same_at_any_draft_length_and_batch(num_speculative_tokens: int, num_slots: int) -> None:
    """With fewer slots than requests, slots get requests with other constraints when they become free."""
    check_texts(engine_of(num_speculative_tokens), num_slots)


@pytest.mark.slow
@pytest.mark.parametrize("num_speculative_tokens", [0, 3])
def test_a_request_alone_has_the_same_text(num_speculative_tokens: int) -> None:
    for request in mixed_requests():
        check_texts(engine_of(num_speculative_tokens), 1, [request])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 40])
def test_the_text_is_the_same_with_a_draft_head(count: int) -> None:
    ids = np.sort(np.random.default_rng(5).permutation(VOCAB)[:count]).astype(np.int32)
    engine = new_engine(3, with_draft_head(small_model(), ids))
    states = engine.run(mixed_requests(), NUM_REQUESTS)
    assert [state.tokens for state in states] == plain_texts()


def test_texts_keep_to_their_constraints() -> None:
    requests, texts = mixed_requests(), plain_texts()
    free = engine_of(0).run(
        [Request(r.index, r.prompt_token_ids, NUM_TOKENS, r.temperature, r.seed) for r in requests], 7
    )
    assert [s.tokens == text for s, text in zip(free, texts, strict=True)] == [True] + [False] * (NUM_REQUESTS - 1)
    for request, text in zip(requests, texts, strict=True):
        assert len(text) >= request.min_tokens and not set(text[: request.min_tokens]) & set(
            request.early_stop_token_ids
        )
        assert set(text) <= set(request.allowed_token_ids or range(VOCAB))
        for word in request.bad_words:
            assert word not in {tuple(text[i : i + len(word)]) for i in range(len(text))}
    assert len(texts[1]) < NUM_TOKENS  # it has stopped after `min_tokens`


def test_greedy_tokens_maximise_the_logits_of_transformers() -> None:
    """Logits of the model, read as a prompt, through transformers' processors."""
    pytest.importorskip("transformers", reason="the oracle is transformers, which is not installed")
    for request in (mixed_requests()[2], mixed_requests()[4]):
        text = plain_texts()[request.index]
        whole = request.prompt_token_ids + tuple(text)
        chunks = engine_of(0).runner.prefill([whole], OutputRows.all(), return_logits=True)[2]
        rows = np.concatenate(chunks, axis=1)[0, -len(text) - 1 : -1]
        for i, row in enumerate(rows):
            assert transformers_row(row, request, text[:i]).argmax() == text[i], (request.index, i)


def forget_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let verification see what came before the window, but not the drafts before a row."""

    def without_drafts(logits: Any, constraints: Any, recent: Any, drafts: Any, **_: Any) -> Any:
        return apply_constraints(logits, constraints, recent)

    monkeypatch.setattr(logits_processors, "apply_constraints", without_drafts)


def remember_rejected_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop append all tokens of a window, the rejected ones as well."""
    add = RecentTokens.add

    def add_all(self: RecentTokens, tokens: jax.Array, num_tokens: jax.Array) -> RecentTokens:
        return add(self, tokens, jnp.full_like(num_tokens, tokens.shape[1]))

    monkeypatch.setattr(RecentTokens, "add", add_all)


@pytest.mark.parametrize("plant_bug", [forget_drafts, pytest.param(remember_rejected_tokens, marks=pytest.mark.slow)])
def test_the_texts_show_a_planted_bug(
    plant_bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = plain_texts()
    plant_bug(monkeypatch)
    texts = [state.tokens for state in new_engine(3).run(mixed_requests(), NUM_REQUESTS)]
    assert texts[0] == want[0] and texts != want


def test_a_batch_without_constraints_has_the_program_that_it_had() -> None:
    """Names say which parts are there, and the arguments are the same arrays."""
    engine, requests = new_engine(1), [replace(r, max_tokens=4, min_tokens=0) for r in mixed_requests()]
    free = requests[0]
    engine.run([free], 1)
    assert [name for name in engine.runner.programs.compiled if name[0] == "decode"] == [("decode", 1)]
    constrained = replace(requests[2], bad_words=((1, 2),))
    for request in (constrained, replace(constrained, logit_bias=((1, 1.0),), bad_words=((3,),), min_tokens=2), free):
        engine.run([request], 1)
    names = [name for name in engine.runner.programs.compiled if name[0] == "decode"]
    assert names == [("decode", 1), ("decode", 1, "recent_tokens", "logit_bias", "bad_words_8x4")]
    assert stack_constraints([free, None], VOCAB, parts_of([free])) is None and stack_requests([free]).parts == ()


def test_mixed_batches_compile_a_bounded_number_of_programs() -> None:
    """Two with and without a bias, times none or one of three sizes of bad words; penalties double that."""
    parts = set()
    sizes = itertools.product((0, 1, 8, 9, 32, 33, 128), (1, 4, 5, 8, 9, 32), (0, 5), ((), ((1, 1.0),)))
    for number, length, min_tokens, bias in sizes:
        words = tuple((i,) * length for i in range(number))
        request = Request(0, (1,), 9, 0.0, 0, min_tokens=min_tokens, logit_bias=bias, bad_words=words)
        constraints = stack_constraints([None, request], 128, parts_of([None, request]))
        parts.add(() if constraints is None else constraints.parts)
    assert len(parts) == 2 * (1 + len(BAD_WORD_CAPACITIES)) == 8
    longest = Request(0, (1,), 9, 0.0, 0, bad_words=((1,) * MAX_BAD_WORD_TOKENS,) * MAX_BAD_WORDS)
    constraints = stack_constraints([longest], VOCAB, parts_of([longest]))
    assert isinstance(constraints, Constraints) and constraints.parts == ("bad_words_128x32",)
