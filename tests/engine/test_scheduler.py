"""Slots of the loop are filled again as requests end: the texts stay, and no round is wasted that need not be."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest

from mtpjax import LLM, SamplingParams
from mtpjax.engine.decode_batch import stack_requests
from mtpjax.engine.request import Request
from mtpjax.engine.scheduler import Slots
from tests.helpers.models import make_engine, numpy_model, tiny_config

VOCAB, MAX_LEN, BATCH = 96, 160, 4
LENGTHS = (40, 3, 0, 17, 1, 33, 8, 60, 2, 25, 5, 12, 50)  # of the texts


@pytest.fixture(scope="module")
def model():
    return numpy_model(tiny_config(moe=True, num_superblocks=1, vocab_size=VOCAB), seed=7, scale=0.15)


def requests() -> list[Request]:
    """Unequal prompts and texts, some with penalties, in no order; the third wants nothing, the tenth stops early."""
    rng = np.random.default_rng(5)
    some = []
    for i, tokens in enumerate(LENGTHS):
        prompt = tuple(rng.integers(0, VOCAB, rng.integers(1, 70)).tolist())
        some.append(Request(i, prompt, tokens, 0.8 * (i % 2), 30 + i, (), presence_penalty=1.0 * (i in (5, 6))))
    return some


@pytest.fixture(scope="module")
def want(model) -> list[list[int]]:
    """One after another, without drafts."""
    tokens = [r.tokens for r in make_engine(model, num_speculative_tokens=0, max_model_len=MAX_LEN).run(requests(), 1)]
    assert [len(t) for t in tokens] == list(LENGTHS)
    return tokens


def stopping(want: list[list[int]]) -> list[Request]:
    return [replace(r, stops=(want[9][7],)) if r.index == 9 else r for r in requests()]


def cut(want: list[list[int]]) -> list[list[int]]:
    return [t[: t.index(want[9][7]) + 1] if i == 9 else t for i, t in enumerate(want)]


@pytest.mark.parametrize(("draft", "admit"), [(3, 1), (3, 3), (0, None), (2, BATCH)])
def test_the_text_does_not_depend_on_when_a_slot_is_filled(model, want, draft, admit):
    by = make_engine(
        model, num_speculative_tokens=draft, max_model_len=MAX_LEN, max_prefill_seqs=admit, max_steps_per_call=5
    )
    heard: dict[int, list[int]] = {i: [] for i in range(len(LENGTHS))}
    results = by.run(stopping(want), BATCH, lambda result, new: heard[result.request.index].extend(new))
    assert [r.tokens for r in results] == cut(want) and [heard[i] for i in range(len(LENGTHS))] == cut(want)
    assert [r.stopped for r in results] == [i == 9 for i in range(len(LENGTHS))]
    for result in results:
        assert result.done and len(result.tokens) <= result.rounds + sum(result.accepted_per_position)
        assert (result.decode_seconds > 0) == bool(result.tokens) and result.prefill_seconds > 0
    assert by.decode_seconds >= max(r.decode_seconds for r in results)


def test_an_mtp_head_that_reads_the_end_of_prompts_only(model, want):
    by = make_engine(model, num_speculative_tokens=3, max_model_len=MAX_LEN, max_prefill_seqs=2, mtp_prompt_tokens=8)
    assert [r.tokens for r in by.run(requests(), BATCH)] == want


@pytest.mark.parametrize(("admit", "least", "most"), [(1, 0.8, 1), (2, 0.75, 1), (BATCH, 0, 0.6)])
def test_slots_are_busy(model, admit, least, most):
    """The share of slots that some request sits in, over all rounds: without drafts a round is a token."""
    by = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_LEN, max_prefill_seqs=admit)
    rng = np.random.default_rng(0)
    texts = np.clip(rng.lognormal(2.5, 1, 40), 1, 80).astype(int).tolist()
    asked = [Request(i, tuple(rng.integers(0, VOCAB, 1 + i % 20).tolist()), n, 0.0, 0, ()) for i, n in enumerate(texts)]
    results = by.run(asked, BATCH)
    assert sum(r.rounds for r in results) == sum(texts)
    busy = sum(texts) / by.slot_steps
    assert least <= busy <= most, busy


def test_the_loop_returns_when_enough_are_done(model):
    by = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_LEN)
    slots = Slots(by, 3, 3)
    assert list(slots.admit([replace(r, max_tokens=n) for r, n in zip(requests(), (4, 9, 20), strict=False)])) == []
    rounds = []
    for enough in (1, 2, 3):
        (done,) = slots.decode(enough)
        rounds.append(done.rounds)
        assert slots.idle == enough
    assert rounds == [4, 9, 20]


def test_nothing_but_the_chosen_slots_changes_and_the_state_is_not_copied(model):
    by = make_engine(model, num_speculative_tokens=2, max_model_len=MAX_LEN, max_steps_per_call=3)
    slots = Slots(by, BATCH, 2)
    asked = [replace(r, max_tokens=30) for r in requests()]
    for group in (asked[:2], asked[2:3]):
        assert list(slots.admit(group)) == []
    assert list(slots.decode(BATCH)) == []

    def rows(state) -> list[np.ndarray]:
        """Each array with the slots first."""
        cache = [np.moveaxis(np.asarray(a), min(a.ndim - 1, 1), 0) for a in jax.tree.leaves(state.cache)]
        return cache + [np.asarray(a) for a in jax.tree.leaves(state.replace(cache=None))]

    before = [a.copy() for a in rows(slots._state)]
    assert list(slots.admit(asked[3:4])) == [] and slots.idle == 0
    after = rows(slots._state)
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old[:3], new[:3])
    assert any(not np.array_equal(old[3], new[3]) for old, new in zip(before, after, strict=True))
    (key,) = (key for key in by._programs if key[0] == "insert")
    memory = by._programs[key].memory_analysis()
    state = sum(a.nbytes for a in jax.tree.leaves(slots._state))
    assert memory.alias_size_in_bytes >= state and memory.temp_size_in_bytes < state / 8


@pytest.mark.slow
def test_a_prompt_that_requests_share_is_read_once(model):
    """Whichever of them want nothing, have penalties, or come when no slot is idle."""
    a, b = requests()[0].prompt, requests()[1].prompt
    asked = [
        Request(i, (a, b)[i % 3 == 0], n, 0.8, i, (), presence_penalty=1.0 * (i == 4))
        for i, n in enumerate((9, 20, 3, 0, 12, 7, 30, 5))
    ]
    plain = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_LEN, max_prefill_seqs=1)
    want = [plain.run([r], 1)[0].tokens for r in asked]
    for draft, batch, admit, reads in ((2, 8, None, 1), (2, 3, 1, 3), (2, 3, 3, 8)):
        by = make_engine(model, num_speculative_tokens=draft, max_model_len=MAX_LEN, max_prefill_seqs=admit)
        assert [r.tokens for r in by.run(asked, batch)] == want
        # With three slots, those that come later find the prompt gone from the cache.
        assert by.prompt_tokens <= reads * (len(a) + len(b)), (batch, admit)
        assert any(key[0] == "insert" for key in by._programs) == (admit != batch)  # else there is one cache
    assert plain.prompt_tokens == sum(len(r.prompt) for r in asked)


def test_a_run_that_is_left_in_the_middle_leaves_nothing_behind(model, want):
    by = make_engine(model, num_speculative_tokens=2, max_model_len=MAX_LEN, max_prefill_seqs=1)
    assert next(iter(by.stream(requests(), BATCH))).done
    assert [r.tokens for r in by.run(requests(), BATCH)] == want


def test_prompts_are_read_as_they_are_needed(model):
    llm = LLM(model, num_speculative_tokens=2, max_model_len=100, max_num_seqs=2, prefill_buckets=(16,))
    seen = []

    def jobs(number: int) -> Iterator[tuple[list[int], SamplingParams]]:
        for i in range(number):
            seen.append(i)
            yield [1 + i % 90, 7], SamplingParams(max_tokens=1 + i % 3, temperature=1.0, ignore_eos=True)

    first = next(llm.as_completed(jobs(1000)))
    assert first[1].finish_reason == "length" and len(seen) == 2 * 64
    outputs = dict(llm.as_completed(jobs(9)))
    whole = llm.generate([[1 + i, 7] for i in range(9)], [params for _, params in jobs(9)])
    assert [outputs[i].token_ids for i in range(9)] == [out.token_ids for out in whole]
    assert [outputs[i].seed for i in range(9)] == list(range(9))
    assert list(llm.as_completed(iter(()))) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        list(llm.as_completed([([1], SamplingParams()), ([], SamplingParams())]))


def test_admit_is_at_most_the_batch(model):
    for bad in (0, 9):
        with pytest.raises(ValueError, match=f"admit is {bad}; expected a whole number from 1 to 8 or None"):
            LLM(model, max_prefill_seqs=bad)


def test_empty_slots_ask_for_nothing():
    assert stack_requests([None, requests()[0]]).penalties is None
    assert stack_requests([None, requests()[5]]).penalties.repetition.tolist() == [1, 1]
