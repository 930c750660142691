"""Scheduling without a device: every request starts once, in a slot of its own, and gets its own text."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request, RequestState
from mtpjax.engine.scheduler import LOOKAHEAD_BATCHES, Scheduler
from tests.helpers.fake_runner import VOCAB, FakeRunner, expected_tokens

pytestmark = pytest.mark.fast

PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6).map(tuple)


@st.composite
def requests(draw: Any) -> list[Request]:
    """Up to 24 requests; some share a prompt, want no token, stop early or have penalties."""
    pool = draw(st.lists(PROMPTS, min_size=4, max_size=10))
    size = draw(st.integers(0, 24))
    fields = st.tuples(
        st.sampled_from(pool),
        st.integers(0, 12),
        st.integers(0, 50),
        st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
        st.sampled_from((0.0, 0.0, 1.0)),
    )
    return [
        Request(i, prompt, max_tokens, 0.0, seed, stop_token_ids, presence_penalty=penalty)
        for i, (prompt, max_tokens, seed, stop_token_ids, penalty) in enumerate(
            draw(st.lists(fields, min_size=size, max_size=size))
        )
    ]


@st.composite
def limits(draw: Any) -> dict[str, Any]:
    """Slots, and arguments of a `Scheduler`."""
    num_slots = draw(st.integers(1, 8))
    return {
        "num_slots": num_slots,
        "max_prefill_seqs": draw(st.none() | st.integers(1, num_slots) | st.integers(1, max(1, num_slots // 2))),
        "lookahead": draw(st.none() | st.integers(1, 25)),
    }


@given(requests(), limits(), st.randoms(use_true_random=False))
def test_every_request_starts_once_in_a_slot_of_its_own(
    todo: list[Request], limits: dict[str, Any], rng: random.Random
) -> None:
    """Requests end in any order."""
    scheduler = Scheduler(todo, **limits)
    started: list[Request] = []
    while True:
        while group := scheduler.admit():
            new = [state.request for state in group.states]
            assert new and len(group.slots) == len(set(group.slots)) == len(new)
            assert [scheduler.running[slot] for slot in group.slots] == group.states
            assert [group.prompts[row] for row in group.prompt_rows] == [r.prompt_token_ids for r in new]
            assert len(group.prompts) <= scheduler.prefill_batch <= scheduler.num_slots
            if not scheduler.static_batch:
                assert len(set(group.prompts)) == len(group.prompts)  # shared prompts are read once
            started += new
        running = [slot for slot, state in enumerate(scheduler.running) if state is not None]
        assert len(running) + scheduler.num_free_slots == scheduler.num_slots
        if not running:
            break
        assert scheduler.num_free_slots < scheduler.return_when_finished <= scheduler.num_slots
        for slot in rng.sample(running, rng.randint(1, len(running))):
            state = scheduler.running[slot]
            assert scheduler.finish(slot) is state and state.finished and scheduler.running[slot] is None
    assert sorted(r.index for r in started) == [r.index for r in todo]


@given(requests(), limits(), st.integers(0, 3), st.integers(1, 4))
def test_each_request_gets_the_text_that_it_gets_alone(
    todo: list[Request], limits: dict[str, Any], num_speculative_tokens: int, max_steps_per_call: int
) -> None:
    """Slots, prefill batches, shared prompts, penalties and lookahead change no token and lose no request."""
    runner: Any = FakeRunner(num_speculative_tokens, max_steps_per_call)
    engine = Engine(runner, max_prefill_seqs=limits["max_prefill_seqs"])
    streamed: dict[int, list[int]] = {r.index: [] for r in todo}

    def on_tokens(state: RequestState, tokens: list[int]) -> None:
        assert not state.finished
        streamed[state.request.index] += tokens

    states = list(engine.stream(iter(todo), limits["num_slots"], on_tokens, lookahead=limits["lookahead"]))
    assert sorted(state.request.index for state in states) == [r.index for r in todo]
    for state in states:
        request = state.request
        assert state.finished and state.tokens == streamed[request.index] == expected_tokens(request)
        assert state.stopped == bool(state.tokens and state.tokens[-1] in request.stop_token_ids)
        assert len(state.num_accepted_tokens_per_pos) == num_speculative_tokens
        # With the tokens that the last step made beyond the limit.
        num_tokens = state.num_steps + sum(state.num_accepted_tokens_per_pos)
        assert num_tokens - num_speculative_tokens <= len(state.tokens) <= num_tokens
        assert state.prefill_seconds > 0 and (state.decode_seconds > 0) == bool(state.tokens)
    prompts = [r.prompt_token_ids for r in todo]
    assert sum(map(len, set(prompts))) <= engine.num_prompt_tokens <= sum(map(len, prompts))
    assert engine.slot_steps >= sum(state.num_steps for state in states)
    assert [state.request for state in engine.run(todo, limits["num_slots"])] == todo


def make(lengths: list[int]) -> list[Request]:
    """Requests of different prompts of these lengths."""
    return [Request(i, (i % VOCAB,) * length, 1 + i % 3, 0.0, i) for i, length in enumerate(lengths)]


def test_the_longest_prompts_start_first_and_equal_ones_together() -> None:
    a, b = (1, 2, 3), (4, 5, 6)
    todo = [Request(i, prompt, 5, 0.0, i) for i, prompt in enumerate([(9,), b, a, b, a])]
    scheduler = Scheduler(todo, 4, max_prefill_seqs=2)
    group = scheduler.admit()
    assert group is not None and [state.request.index for state in group.states] == [2, 4, 1, 3]
    assert group.prompts == [a, b] and group.prompt_rows == [0, 0, 1, 1] and group.slots == [0, 1, 2, 3]
    assert scheduler.admit() is None and len(scheduler.waiting) == 1


def test_requests_that_may_be_longest_start_first_with_their_equals() -> None:
    """By powers of two: 9 and 12 tokens count the same, so there the longer prompt goes first."""
    prompts = [(1,), (2, 2), (3,), (4, 4, 4), (3,)]
    limits = [9, 12, 2, 3, 40]
    todo = [Request(i, p, n, 0.0, i) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
    scheduler = Scheduler(todo, 1)
    assert [request.index for request in scheduler.waiting] == [2, 4, 1, 0, 3]


def test_requests_that_fit_into_the_batch_at_once_share_its_cache() -> None:
    scheduler = Scheduler(make([3, 2, 1]), 3)
    assert scheduler.static_batch and scheduler.prefill_batch == 3
    scheduler = Scheduler(make([4, 3, 2, 1]), 3, max_prefill_seqs=3)
    assert scheduler.static_batch and scheduler.return_when_finished == 3
    scheduler.admit()
    scheduler.finish(1)
    assert scheduler.admit() is None  # the next batch waits for all of the first
    scheduler = Scheduler(make([4, 3, 2, 1]), 3)
    assert not scheduler.static_batch and scheduler.prefill_batch == 1
    scheduler = Scheduler(make([9] * 40), 16)
    assert not scheduler.static_batch and scheduler.prefill_batch == 4


def test_free_slots_are_refilled_when_as_many_as_a_prefill_batch_are_free() -> None:
    scheduler = Scheduler(make(list(range(20, 0, -1))), 4, max_prefill_seqs=2)
    assert [len(group.slots) for group in iter(scheduler.admit, None)] == [2, 2]
    assert scheduler.return_when_finished == 2
    scheduler.finish(3)
    assert scheduler.admit() is None
    scheduler.finish(0)
    group = scheduler.admit()
    assert group is not None and group.slots == [0, 3]


def test_requests_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def source() -> Iterator[Request]:
        for request in make([1 + i % 5 for i in range(1000)]):
            taken.append(request.index)
            yield request

    engine = Engine(FakeRunner(0, 4), max_prefill_seqs=1)  # type: ignore[arg-type]
    next(engine.stream(source(), 2))
    assert len(taken) == 2 * LOOKAHEAD_BATCHES
    taken.clear()
    next(engine.stream(source(), 2, lookahead=1))
    assert len(taken) == 3  # one more than there are slots, so that requests that fit at once are seen to fit


def test_runs_may_be_interleaved_and_left_in_the_middle() -> None:
    engine = Engine(FakeRunner(2, 1), max_prefill_seqs=1)  # type: ignore[arg-type]
    todo = make([5, 4, 3, 2, 1, 6, 7])
    first, second = engine.stream(todo, 2), engine.stream(todo, 3)
    next(engine.stream(todo, 2))
    states = [*(next(first) for _ in range(2)), *second, *first]
    assert all(state.tokens == expected_tokens(state.request) for state in states) and len(states) == 14
    assert [state.request for state in engine.run(todo, 2)] == todo
