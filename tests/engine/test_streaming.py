"""Streams: the same text as without, and nothing that is cut off later; requests that come and go at any time."""

import gc
import random

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpjax import LLM, SamplingParams
from mtpjax.engine.engine import Engine
from mtpjax.engine.live_requests import LiveRequests
from mtpjax.engine.request import Request
from mtpjax.engine.scheduler import Scheduler
from mtpjax.streaming import StreamOutput
from tests.helpers.fake_runner import FakeRunner, expected_tokens
from tests.helpers.models import numpy_model, tiny_config
from tests.helpers.streams import PROMPTS, joined, make_llm, params


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm()


def test_a_stream_is_the_text_of_generate(llm: LLM) -> None:
    """All prompts together and one alone; every update is in order, and the last one has the result."""
    todo = params(llm)
    wanted = llm.generate(PROMPTS, todo)
    by_prompt: dict[str, list[StreamOutput]] = {}
    for update in llm.stream(PROMPTS, todo):
        by_prompt.setdefault(update.request_id, []).append(update)
    alone = list(llm.stream([PROMPTS[1]], [todo[1]]))
    for i, output in enumerate(wanted):
        for updates in [by_prompt[str(i)], *([alone] if i == 1 else [])]:
            last = updates[-1]
            assert len(updates) > 1 and [one.finished for one in updates] == [False] * (len(updates) - 1) + [True]
            assert joined(updates) == (output.text, output.token_ids)
            assert last.result is not None and last.result.outputs == output.outputs
            assert (last.finish_reason, last.outputs[0].stop_reason) == (
                output.finish_reason,
                output.outputs[0].stop_reason,
            )
            assert last.prompt == PROMPTS[i] and last.prompt_token_ids == output.prompt_token_ids
            assert all(one.finish_reason is None and one.result is None for one in updates[:-1])


def test_leaving_a_stream_early_ends_its_generation(llm: LLM) -> None:
    """Its cache goes with it."""
    gc.collect()
    before = len(jax.live_arrays())
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=40))
    assert next(stream).token_ids and len(jax.live_arrays()) > before
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert list(stream) == [] and len(jax.live_arrays()) == before


def test_a_stream_refuses_what_generate_refuses_before_it_begins(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        llm.stream(["a", ""])
    with pytest.raises(ValueError, match="2 prompts but 1 sampling parameters"):
        llm.stream(["a", "b"], [SamplingParams()])
    bare = LLM(numpy_model(tiny_config(moe=False, num_superblocks=1)), num_speculative_tokens=0, max_model_len=40)
    with pytest.raises(ValueError, match="prompt 0 has stop strings, but the checkpoint has no tokenizer"):
        bare.generate([[1]], SamplingParams(stop="a"))


@pytest.mark.fast
@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 3), st.none() | st.integers(1, 8), st.randoms(use_true_random=False))
def test_requests_that_come_and_go_at_any_time(
    num_slots: int, drafts: int, max_prefill_seqs: int | None, rng: random.Random
) -> None:
    """Each has the tokens that it gets alone, or a beginning of them; each is answered once."""
    engine, live = Engine(FakeRunner(drafts, 3), max_prefill_seqs=max_prefill_seqs), LiveRequests()  # type: ignore[arg-type]
    todo = [
        Request(i, tuple(rng.choices(range(9), k=rng.randint(1, 5))), rng.randint(0, 20), 0.0, i) for i in range(20)
    ]
    aborted, answered, num_come = set[int](), list[int](), 1
    live.add(todo[0])
    for state in engine.stream(live, num_slots, yields_progress=True, steps_per_call=2):
        index, whole = state.request.index, expected_tokens(state.request)
        assert index not in answered and state.tokens == whole[: len(state.tokens)]
        if state.finished:
            answered.append(index)
            assert state.aborted == (state.finish_reason == "abort") and (not state.aborted or index in aborted)
            assert state.aborted or state.tokens == whole
        is_idle = len(answered) == num_come
        for request in todo[num_come : num_come + rng.randint(is_idle, 3)]:
            live.add(request)
            num_come += 1
        if rng.random() < 0.2:
            aborted.add(victim := rng.randrange(20))  # to come, arrived, running or finished
            live.abort(victim)
        if len(answered) == len(todo):
            live.close()
    assert sorted(answered) == list(range(20))


@pytest.mark.fast
def test_an_abort_finds_a_request_wherever_it_is() -> None:
    """In a slot, in the queue, or not even taken from the source; others stay."""
    live = LiveRequests()
    scheduler = Scheduler(live, 2)
    for index in range(8):
        live.add(Request(index, (index + 1,), 5, 0.0, 0))
        if index in (1, 5):  # two get a slot, four wait, two have just arrived
            while scheduler.admit():
                pass
    for index in (0, 3, 6, 99):
        live.abort(index)
    dropped = scheduler.abort(live.take_aborted())
    assert {state.request.index for state in dropped} == {3, 6} and all(state.aborted for state in dropped)
    assert [state.aborted for state in scheduler.running if state is not None] == [True, False]
    assert sorted(request.index for request in (*scheduler.waiting, *live)) == [2, 4, 5, 7]
    assert live.take_aborted() == set()


@pytest.mark.fast
def test_the_second_way_to_fill_slots_is_used_for_requests_that_arrive() -> None:
    """A free slot is filled while the others run, even if `max_prefill_seqs` is as large as the batch."""
    for num_slots, max_prefill_seqs, prefill_batch in ((8, None, 2), (8, 8, 7), (2, 2, 1), (1, None, 1)):
        scheduler = Scheduler(LiveRequests(), num_slots, max_prefill_seqs=max_prefill_seqs)
        assert (scheduler.static_batch, scheduler.prefill_batch) == (num_slots == 1, prefill_batch)
    live = LiveRequests()
    scheduler = Scheduler(live, 4, max_prefill_seqs=2)
    assert scheduler.admit() is None
    live.add(Request(0, (1,), 5, 0.0, 0))
    group = scheduler.admit()
    assert group is not None and group.slots == [0] and scheduler.admit() is None
    live.add(Request(1, (1,), 5, 0.0, 0))
    group = scheduler.admit()
    assert group is not None and group.slots == [1]
    live.close()
    with pytest.raises(RuntimeError, match="no more requests are taken"):
        live.add(Request(2, (1,), 5, 0.0, 0))
    assert not live.wait()
