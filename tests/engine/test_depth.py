"""How many tokens are drafted: limits of requests and the depth that "auto" chooses change speed and figures alone."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from mtpjax import LLM, SamplingParams
from mtpjax.engine import slot_depths
from mtpjax.engine.decode_batch import DecodeBatch
from mtpjax.engine.depth import (
    BatchDepths,
    Choice,
    auto_depths,
    depth_for,
)
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import RequestState
from mtpjax.engine.scheduler import Scheduler
from mtpjax.engine.slot_depths import program_depths
from tests.helpers.models import make_engine, numpy_model, tiny_config
from tests.helpers.speculation import BATCH, MAX_MODEL_LEN, plain_texts, small_model, unequal_requests

TOKENS = 40
LIMITS = (0, 1, 2, 3, None)
TEMPERATURE = 0.8


def run(engine: Engine, limits: tuple[int | None, ...], num_slots: int = BATCH) -> list[RequestState]:
    requests = unequal_requests(TEMPERATURE, max_tokens=TOKENS)
    return engine.run([replace(r, num_speculative_tokens=n) for r, n in zip(requests, limits, strict=True)], num_slots)


def texts() -> list[list[int]]:
    return [tokens[:TOKENS] for tokens in plain_texts("dense", TEMPERATURE)]


def decode_programs(engine: Engine) -> set[tuple[Any, ...]]:
    return {name[2:] for name in engine.runner.programs.compiled if name[0] == "decode"}


def check_figures_of_limits(states: list[RequestState], limits: tuple[int | None, ...], k: int) -> None:
    """Check that only drafts of the request itself count, and that no more are accepted than it allows."""
    for state, limit in zip(states, limits, strict=True):
        allowed = k if limit is None else limit
        assert state.num_drafts == (state.num_steps if allowed else 0)
        assert state.num_draft_tokens == state.num_steps * allowed
        accepted = state.num_accepted_tokens_per_pos
        assert len(accepted) == k and not any(accepted[allowed:])
        assert len(state.tokens) <= state.num_steps + sum(accepted)
        assert allowed or state.num_steps == len(state.tokens)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(small_model("dense"), num_speculative_tokens=3, max_model_len=MAX_MODEL_LEN)


def test_requests_of_one_batch_have_limits_of_their_own(engine: Engine) -> None:
    states = run(engine, LIMITS)
    assert [s.tokens for s in states] == texts()
    check_figures_of_limits(states, LIMITS, 3)
    assert states[4].num_accepted_tokens_per_pos[0] > 0 and states[1].num_accepted_tokens_per_pos[0] > 0


def test_the_figures_see_a_limit_that_is_ignored(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_depths.SlotDepths, "has_limits", lambda *_: False)
    states = run(engine, LIMITS)
    assert [s.tokens for s in states] == texts()
    with pytest.raises(AssertionError):
        check_figures_of_limits(states, LIMITS, 3)


@pytest.mark.slow
def test_a_batch_of_small_limits_runs_a_program_of_that_depth(engine: Engine) -> None:
    """There is one for each power of two."""
    for limit in (0, 1, 2):
        states = run(engine, (limit,) * BATCH)
        assert [s.tokens for s in states] == texts()
        check_figures_of_limits(states, (limit,) * BATCH, 3)
    assert decode_programs(engine) >= {("depth", 0), ("depth", 1), ("depth", 2)}
    before = engine.num_programs
    run(engine, (3,) * BATCH), run(engine, (None,) * BATCH), run(engine, (1, 0, 0, 0, 0))
    assert decode_programs(engine) - {("limits", "depth", 1), ("limits",), ()} == {("depth", d) for d in (0, 1, 2)}
    assert engine.num_programs <= before + 2


@pytest.mark.fast
def test_programs_are_made_for_few_depths() -> None:
    assert [program_depths(k) for k in (0, 1, 3, 8)] == [(0,), (0, 1), (0, 1, 2, 3), (0, 1, 2, 4, 8)]
    assert [auto_depths(k) for k in (1, 2, 3, 6, 8)] == [(0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 3, 6), (0, 1, 3, 6, 8)]
    assert [depth_for(np.array(limits), (0, 1, 3)) for limits in ([], [0], [1, 0], [2], [3, 1])] == [0, 0, 1, 3, 3]


# "auto"

DEPTHS = (0, 1, 3)


@pytest.fixture(scope="module")
def auto_engine() -> Engine:
    return make_engine(small_model("dense"), num_speculative_tokens=3, max_model_len=MAX_MODEL_LEN, auto_depths=DEPTHS)


def schedule(monkeypatch: pytest.MonkeyPatch, *depths: int) -> list[int]:
    """Make calls have these depths in turn, five steps each. Returns the list of those that were made."""
    made: list[int] = []

    def choose(self: BatchDepths, running: np.ndarray, limits: np.ndarray, step_limit: int | None = None) -> Choice:
        made.append(depths[len(made) % len(depths)])
        return Choice(made[-1], 5)

    monkeypatch.setattr(BatchDepths, "choose", choose)
    monkeypatch.setattr(BatchDepths, "observe", lambda *_: None)
    return made


@pytest.mark.slow
def test_auto_has_the_same_texts_and_no_more_programs_than_depths(auto_engine: Engine) -> None:
    for num_slots in (BATCH, BATCH):
        states = run(auto_engine, (None,) * BATCH, num_slots)
        assert [s.tokens for s in states] == texts()
        for state in states:
            assert sum(state.num_accepted_tokens_per_pos) <= state.num_draft_tokens <= 3 * state.num_drafts
            assert state.num_drafts <= state.num_steps
    assert decode_programs(auto_engine) <= {("depth", 0), ("depth", 1), ()}
    assert auto_engine.depths is not None and auto_engine.depths.costs(BATCH).seconds[0] > 0
    with_limits = run(auto_engine, (None, 0, None, 1, None))
    assert [s.tokens for s in with_limits] == texts()
    assert with_limits[1].num_draft_tokens == 0 and not any(with_limits[3].num_accepted_tokens_per_pos[1:])


def acceptance_after(engine: Engine, monkeypatch: pytest.MonkeyPatch, *depths: int) -> float:
    """Return the share of drafts at the first position that were accepted in calls of depth 3."""
    accepted, drafted = [0], [0]
    made = schedule(monkeypatch, *depths)

    def count(self: BatchDepths, depth: int, num_steps: np.ndarray, found: np.ndarray, *args: Any) -> None:
        if depth == 3:
            accepted[0] += int(found[:, 0].sum())
            drafted[0] += int(num_steps.sum())

    monkeypatch.setattr(BatchDepths, "observe", count)
    states = run(engine, (None,) * BATCH)
    assert [s.tokens for s in states] == texts() and set(made) == set(depths)
    return accepted[0] / drafted[0]


def mtp_keys_after(engine: Engine, monkeypatch: pytest.MonkeyPatch, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the MTP head's keys and values after two calls of a depth, and those of reading the text."""
    schedule(monkeypatch, depth)
    requests = unequal_requests(TEMPERATURE, max_tokens=TOKENS)
    scheduler = Scheduler(requests, BATCH)
    batch = DecodeBatch(engine.runner, BATCH, scheduler.prefill_batch, depths=engine.depths)
    group = scheduler.admit()
    assert group is not None
    batch.prefill(group, scheduler.requests_by_slot)
    new = [a + b for a, b in zip(*(batch.decode(BATCH).tokens for _ in range(2)), strict=True)]
    assert batch.state is not None
    by_slot = [state.request for state in group.states]
    read = [(*r.prompt_token_ids, *tokens[:-1]) for r, tokens in zip(by_slot, new, strict=True)]
    cache, _, _ = engine.runner.prefill(read)
    got, want = list[np.ndarray](), list[np.ndarray]()
    for slot, text in enumerate(read):
        for name in ("mtp_k", "mtp_v"):
            for c, out in ((batch.state.cache, got), (cache, want)):  # the next draft adds the last keys and values
                out.append(np.asarray(getattr(c, name))[:, slot, :, : len(text) - 1].ravel())
    return np.concatenate(got), np.concatenate(want)


@pytest.mark.parametrize("depth", [0, 3])
def test_the_mtp_head_has_read_what_nothing_was_drafted_for(
    auto_engine: Engine, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    got, want = mtp_keys_after(auto_engine, monkeypatch, depth)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_the_comparison_sees_an_mtp_head_that_has_not_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the program of depth 0 of an engine that does not draft later."""
    engine = make_engine(
        small_model("dense"), num_speculative_tokens=3, max_model_len=MAX_MODEL_LEN, auto_depths=DEPTHS
    )
    monkeypatch.setattr(engine.runner, "auto_depths", None)
    got, want = mtp_keys_after(engine, monkeypatch, 0)
    assert np.abs(got - want).max() > 0.01


@pytest.mark.slow
def test_drafts_are_as_good_after_rounds_without_drafts(auto_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    always = acceptance_after(auto_engine, monkeypatch, 3)
    between = acceptance_after(auto_engine, monkeypatch, 0, 3, 1, 3)
    assert abs(always - between) < 0.12


def test_arguments_that_contradict_each_other_are_errors() -> None:
    model = numpy_model(tiny_config(moe=False, num_superblocks=1))
    make = partial(LLM, model, max_model_len=64, prefill_buckets=(16,))
    for wrong, message in (
        ({"num_speculative_tokens": "fast"}, 'expected "auto" or a whole number from 0 to 8'),
        ({"num_speculative_tokens": 9}, "from 0 to 8"),
        ({"num_speculative_tokens": 3, "max_speculative_tokens": 4}, "give one of them"),
        ({"num_speculative_tokens": "auto", "max_speculative_tokens": 0}, "max_speculative_tokens is 0"),
        ({"num_speculative_tokens": "auto", "max_speculative_tokens": 9}, "from 1 to 8"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**wrong)
    llm = make(num_speculative_tokens="auto", max_speculative_tokens=2)
    assert llm.num_speculative_tokens == 2 and llm.engine.runner.auto_depths == (0, 1, 2)
    with pytest.raises(ValueError, match="prompt 0: num_speculative_tokens is 3, and the LLM drafts at most 2"):
        llm.generate([[1, 2]], SamplingParams(num_speculative_tokens=3))
    for wrong_limit in (-1, 1.5, True):
        with pytest.raises(ValueError, match="num_speculative_tokens is"):
            SamplingParams(num_speculative_tokens=wrong_limit)  # type: ignore[arg-type]
