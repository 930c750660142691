"""Continuous batching on the device: slots are refilled as requests end, texts stay the same, and no step is wasted."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from mtpjax.decoding.speculative import DecodeState
from mtpjax.engine.decode_batch import DecodeBatch
from mtpjax.engine.engine import STEPS_OF_FIRST_CALL
from mtpjax.engine.programs import compile_ahead
from mtpjax.engine.request import Request, RequestState
from mtpjax.engine.scheduler import PrefillGroup, Scheduler
from mtpjax.engine.stack_requests import stack_requests
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.models import make_engine, numpy_model, tiny_config

VOCAB, MAX_MODEL_LEN, NUM_SLOTS = 96, 160, 4
TEXT_LENGTHS = (40, 3, 0, 17, 1, 33, 8, 60, 2, 25, 5, 12, 50)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return numpy_model(tiny_config(moe=True, num_superblocks=1, vocab_size=VOCAB), seed=7, scale=0.15)


def requests() -> list[Request]:
    """Unequal prompts and texts in no order, two of them with penalties; the third asks for no token."""
    rng = np.random.default_rng(5)
    made = []
    for i, max_tokens in enumerate(TEXT_LENGTHS):
        prompt = tuple(rng.integers(0, VOCAB, rng.integers(1, 70)).tolist())
        made.append(Request(i, prompt, max_tokens, 0.8 * (i % 2), 30 + i, presence_penalty=1.0 * (i in (5, 6))))
    return made


@pytest.fixture(scope="module")
def texts(model: LoadedModel) -> list[list[int]]:
    """The texts of `requests`, generated one after another without drafts."""
    engine = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_MODEL_LEN)
    tokens = [state.tokens for state in engine.run(requests(), 1)]
    assert [len(t) for t in tokens] == list(TEXT_LENGTHS)
    return tokens


@pytest.mark.parametrize(("num_speculative_tokens", "max_prefill_seqs"), [(3, 1), (3, 3), (0, None), (2, NUM_SLOTS)])
def test_the_text_does_not_depend_on_when_a_slot_is_filled(
    model: LoadedModel, texts: list[list[int]], num_speculative_tokens: int, max_prefill_seqs: int | None
) -> None:
    """The tenth request stops early."""
    stop = texts[9][7]
    expected = list(texts)
    expected[9] = texts[9][: texts[9].index(stop) + 1]
    todo = requests()
    todo[9] = replace(todo[9], stop_token_ids=(stop,))
    engine = make_engine(
        model,
        num_speculative_tokens=num_speculative_tokens,
        max_model_len=MAX_MODEL_LEN,
        max_prefill_seqs=max_prefill_seqs,
        max_steps_per_call=5,
    )
    streamed: list[list[int]] = [[] for _ in todo]
    states = engine.run(todo, NUM_SLOTS, lambda state, tokens: streamed[state.request.index].extend(tokens))
    assert [state.tokens for state in states] == expected and streamed == expected
    assert [state.stopped for state in states] == [i == 9 for i in range(len(todo))]
    for state in states:
        assert state.finished and len(state.tokens) <= state.num_steps + sum(state.num_accepted_tokens_per_pos)
        assert (state.decode_seconds > 0) == bool(state.tokens) and state.prefill_seconds > 0
    assert engine.decode_seconds >= max(state.decode_seconds for state in states)


@pytest.mark.slow
def test_an_mtp_head_that_reads_the_end_of_prompts_only(model: LoadedModel, texts: list[list[int]]) -> None:
    engine = make_engine(
        model, num_speculative_tokens=3, max_model_len=MAX_MODEL_LEN, max_prefill_seqs=2, mtp_prompt_tokens=8
    )
    assert [state.tokens for state in engine.run(requests(), NUM_SLOTS)] == texts


@pytest.mark.parametrize(("max_prefill_seqs", "least", "most"), [(1, 0.8, 1), (2, 0.75, 1), (NUM_SLOTS, 0, 0.8)])
def test_slots_are_busy(model: LoadedModel, max_prefill_seqs: int, least: float, most: float) -> None:
    """The share of slots that have a request, over all steps: without drafts a step is a token."""
    engine = make_engine(
        model, num_speculative_tokens=0, max_model_len=MAX_MODEL_LEN, max_prefill_seqs=max_prefill_seqs
    )
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.5, 1, 40), 1, 80).astype(int).tolist()
    todo = [Request(i, tuple(rng.integers(0, VOCAB, 1 + i % 20).tolist()), n, 0.0, 0) for i, n in enumerate(lengths)]
    states = engine.run(todo, NUM_SLOTS)
    assert sum(state.num_steps for state in states) == sum(lengths)
    busy = sum(lengths) / engine.slot_steps
    assert least <= busy <= most, busy


def test_the_loop_returns_when_enough_requests_are_finished(model: LoadedModel) -> None:
    engine = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_MODEL_LEN)
    scheduler = Scheduler([replace(r, max_tokens=n) for r, n in zip(requests(), (4, 9, 20), strict=False)], 3)
    batch = DecodeBatch(engine.runner, 3, scheduler.prefill_batch)
    group = scheduler.admit()
    assert group is not None
    batch.prefill(group, scheduler.requests_by_slot)
    num_steps = 0
    for return_when_finished, expected in ((1, 4), (2, 9), (3, 20)):
        num_steps += batch.decode(return_when_finished).num_steps
        assert num_steps == expected and batch.figures().finished.sum() == return_when_finished


def test_the_first_tokens_do_not_wait_for_a_whole_call_of_the_loop(model: LoadedModel) -> None:
    engine = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_MODEL_LEN)
    calls: list[int] = []
    engine.run([replace(requests()[0], max_tokens=60)], 1, lambda state, tokens: calls.append(len(tokens)))
    per_call = engine.runner.max_steps_per_call
    assert calls == [STEPS_OF_FIRST_CALL, per_call, 60 - STEPS_OF_FIRST_CALL - per_call]


def slot_rows(state: DecodeState | None) -> list[np.ndarray]:
    """Every array of a state with the slots as its first axis."""
    assert state is not None
    cache = [np.moveaxis(np.asarray(a), min(a.ndim - 1, 1), 0) for a in jax.tree.leaves(state.cache)]
    return cache + [np.asarray(a) for a in jax.tree.leaves(state.replace(cache=None))]  # type: ignore[arg-type]


def test_a_refill_changes_the_chosen_slots_alone_and_does_not_copy_the_state(model: LoadedModel) -> None:
    engine = make_engine(model, num_speculative_tokens=2, max_model_len=MAX_MODEL_LEN, max_steps_per_call=3)
    batch = DecodeBatch(engine.runner, NUM_SLOTS, prefill_batch=2)
    todo = [replace(r, max_tokens=30) for r in requests()[:NUM_SLOTS]]
    by_slot: list[Request | None] = [None] * NUM_SLOTS

    def start(*slots: int) -> None:
        for slot in slots:
            by_slot[slot] = todo[slot]
        states = [RequestState(todo[slot]) for slot in slots]
        prompts = [todo[slot].prompt_token_ids for slot in slots]
        batch.prefill(PrefillGroup(states, list(slots), prompts, list(range(len(slots)))), by_slot)

    start(0, 1)
    start(2)
    batch.decode(NUM_SLOTS)
    before = [a.copy() for a in slot_rows(batch.state)]
    start(3)
    after = slot_rows(batch.state)
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old[:3], new[:3])
    assert any(not np.array_equal(old[3], new[3]) for old, new in zip(before, after, strict=True))
    (insert,) = (program for name, program in engine.runner.programs.compiled.items() if name[0] == "insert")
    memory = insert.memory_analysis()  # type: ignore[attr-defined]
    state_bytes = sum(a.nbytes for a in jax.tree.leaves(batch.state))
    assert memory.alias_size_in_bytes >= state_bytes and memory.temp_size_in_bytes < state_bytes / 8


@pytest.mark.slow
def test_a_prompt_that_requests_share_is_read_once(model: LoadedModel) -> None:
    """Also if some of them ask for no token, have penalties, or come when no slot is free."""
    a, b = requests()[0].prompt_token_ids, requests()[1].prompt_token_ids
    todo = [
        Request(i, (a, b)[i % 3 == 0], n, 0.8, i, presence_penalty=1.0 * (i == 4))
        for i, n in enumerate((9, 20, 3, 0, 12, 7, 30, 5))
    ]
    plain = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_MODEL_LEN, max_prefill_seqs=1)
    expected = [plain.run([r], 1)[0].tokens for r in todo]
    # With three slots, requests that come later find the prompt gone from the cache.
    for num_drafts, num_slots, max_prefill_seqs, num_reads in ((2, 8, None, 1), (2, 3, 1, 3), (2, 3, 3, 8)):
        engine = make_engine(
            model,
            num_speculative_tokens=num_drafts,
            max_model_len=MAX_MODEL_LEN,
            max_prefill_seqs=max_prefill_seqs,
        )
        assert [state.tokens for state in engine.run(todo, num_slots)] == expected
        assert engine.num_prompt_tokens <= num_reads * (len(a) + len(b)), (num_slots, max_prefill_seqs)
        inserts = any(key[0] == "insert" for key in engine.runner.programs.compiled)
        assert inserts == (max_prefill_seqs != num_slots)  # otherwise there is one cache
    assert plain.num_prompt_tokens == sum(len(r.prompt_token_ids) for r in todo)


def test_a_run_that_is_left_in_the_middle_leaves_nothing_behind(model: LoadedModel, texts: list[list[int]]) -> None:
    engine = make_engine(model, num_speculative_tokens=2, max_model_len=MAX_MODEL_LEN, max_prefill_seqs=1)
    assert next(iter(engine.stream(requests(), NUM_SLOTS))).finished
    assert [state.tokens for state in engine.run(requests(), NUM_SLOTS)] == texts


def test_free_slots_ask_for_nothing() -> None:
    assert stack_requests([None, requests()[0]]).penalties is None
    penalties = stack_requests([None, requests()[5]]).penalties
    assert penalties is not None and penalties.repetition.tolist() == [1, 1]


def test_every_program_is_made_by_the_compile_function(model: LoadedModel) -> None:
    """A compile function sees jitted functions and their arguments; its programs are the ones that run."""
    calls: list[int] = []

    def compile_fn(fn: Any, args: tuple[Any, ...]) -> Any:
        number, program = len(calls), compile_ahead(fn, args)
        calls.append(0)

        def run(*arguments: Any) -> Any:
            calls[number] += 1
            return program(*arguments)

        return run

    engine = make_engine(model, num_speculative_tokens=1, max_model_len=64, compile_fn=compile_fn)
    (state,) = engine.run([Request(0, (1, 2, 3), 4, 0.0, 0)], 1)
    assert len(state.tokens) == 4 and len(calls) == engine.num_programs == 3 and all(calls)
    assert engine.compile_seconds > 0
