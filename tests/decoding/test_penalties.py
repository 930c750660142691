"""Presence, frequency and repetition penalties: the formula, and a text that no draft length and no batch changes."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpjax import LLM, SamplingParams
from mtpjax.decoding import speculative as loop
from mtpjax.decoding import steps
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.penalties import Penalties, TokenCounts, apply_penalties, round_to_bfloat16
from mtpjax.engine.decode_batch import stack_requests
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request
from mtpjax.sampling_params import PENALTIES
from tests.decoding.test_sampling import planted
from tests.helpers.models import make_engine, numpy_model, tiny_config

VOCAB, TOKENS, MAX_LEN = 12, 60, 120  # few, so that tokens come again within one round


def lowered(
    logits: np.ndarray, prompt: list[int], text: list[int], presence: float, frequency: float, repetition: float
):
    """One row in float64, token by token, as the definitions say."""
    out = logits.astype(np.float64)
    for token in set(prompt) | set(text):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token, times in Counter(text).items():
        out[token] -= frequency * times + presence
    return out


def asked(*each: tuple[float, float, float]) -> Penalties:
    presence, frequency, repetition = (jnp.array(column, jnp.float32) for column in zip(*each, strict=True))
    return Penalties(presence, frequency, repetition)


def known(vocab: int, *each: tuple[list[int], list[int]]) -> TokenCounts:
    """Of (prompt, text)."""
    empty = TokenCounts(prompt=jnp.zeros((len(each), vocab), bool), counts=jnp.zeros((len(each), vocab), jnp.int32))
    for b, (prompt, text) in enumerate(each):
        empty = empty.replace(prompt=empty.prompt.at[b, jnp.array(prompt, int)].set(True))
        for token in text:
            empty = empty.replace(counts=empty.counts.at[b, token].add(1))
    return empty


def some(vocab: int, most: int) -> st.SearchStrategy:
    return st.lists(st.integers(0, vocab - 1), max_size=most)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=60, max_size=60), some(20, 8), some(20, 8), some(20, 2),
    st.sampled_from([-2.0, 0.0, 0.3, 1.5]), st.sampled_from([-1.0, 0.0, 0.1, 2.0]), st.sampled_from([0.8, 1.0, 1.1, 3.0]),
)  # fmt: skip
def test_rows_are_those_of_the_definition_and_to_the_bit_those_of_one_after_another(
    values, prompt, text, drafts, presence, frequency, repetition
):
    """Row r of a window comes after r drafts, which it counts as a drafter does that sees them one by one."""
    drafts = (drafts + [3, 3])[:2]
    logits, frequency = np.array(values, np.float32).reshape(1, 3, 20), round_to_bfloat16(frequency)
    penalties, seen = asked((presence, frequency, repetition)), known(20, (prompt, text))
    rows = np.asarray(jax.jit(apply_penalties)(logits, penalties, seen, jnp.array([drafts])))
    one = jax.jit(lambda logits, seen: apply_penalties(logits, penalties, seen))
    for r in range(3):
        want = lowered(logits[0, r], prompt, text + drafts[:r], presence, frequency, repetition)
        np.testing.assert_allclose(rows[0, r], want, rtol=2e-6, atol=2e-6)
        assert np.array_equal(one(logits[:, r : r + 1], seen)[0, 0], rows[0, r])
        seen = seen.add(jnp.array([drafts[r : r + 1] or [0]]), jnp.ones(1, int))


def test_no_penalty_changes_no_bit():
    logits = np.random.default_rng(0).normal(size=(2, 1, 50)).astype(np.float32)
    seen = known(50, ([1, 2], [3, 3]), ([], [4]))
    rows = np.asarray(apply_penalties(logits, asked((0, 0, 1), (0.5, 0, 1)), seen))
    assert np.array_equal(rows[0], logits[0]) and np.flatnonzero(rows[1] != logits[1]).tolist() == [4]


def test_a_frequency_times_any_count_is_exact():
    """So it does not matter whether a compiler contracts product and sum."""
    assert round_to_bfloat16(0.1) == 0.10009765625 and round_to_bfloat16(-2) == -2
    counts = np.arange(1 << 16, dtype=np.float64)
    for frequency in map(round_to_bfloat16, np.linspace(-2, 2, 41)):
        assert np.array_equal(np.float32(frequency) * counts.astype(np.float32), frequency * counts)


def mixed() -> list[Request]:
    """Each penalty alone, all of them, none beside them; greedy and not."""
    rng = np.random.default_rng(3)
    one = [Request(i, tuple(rng.integers(0, VOCAB, 4 + 5 * i).tolist()), TOKENS, 0.9, 50 + i, ()) for i in range(6)]
    how = (
        {}, {"presence_penalty": 1.5}, {"frequency_penalty": 0.1, "temperature": 0.0}, {"repetition_penalty": 1.3},
        {"presence_penalty": 0.4, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "top_k": 9},
        {"presence_penalty": -0.3, "temperature": 0.0},
    )  # fmt: skip
    return [replace(request, **changes) for request, changes in zip(one, how, strict=True)]


NONE = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
DRAFTED = ((3, 6), (3, 1), (1, 4))  # draft length, batch


@pytest.fixture(scope="module")
def model():
    return numpy_model(tiny_config(moe=True, num_superblocks=1, vocab_size=VOCAB), seed=7, scale=0.15)


@pytest.fixture(scope="module")
def plain(model) -> Engine:
    return make_engine(model, num_speculative_tokens=0, max_model_len=MAX_LEN)


@pytest.fixture(scope="module")
def want(plain) -> list[list[int]]:
    return [result.tokens for result in plain.run(mixed(), 6)]


def drafted(model, draft: int, batch: int, drafter=loop.mtp_drafter) -> list[list[int]]:
    results = make_engine(model, num_speculative_tokens=draft, max_model_len=MAX_LEN, drafter=drafter).run(
        mixed(), batch
    )
    assert 0 < sum(r.num_accepted_tokens_per_pos[0] for r in results) < sum(r.num_steps for r in results)
    return [r.tokens for r in results]


@pytest.mark.slow
def test_the_text_is_the_same_at_any_draft_length_and_batch(model, want):
    for draft, batch in DRAFTED:
        assert drafted(model, draft, batch) == want, (draft, batch)


def test_greedy_tokens_are_the_best_of_the_penalised_logits(plain, want):
    without = [result.tokens for result in plain.run([replace(r, **NONE) for r in mixed()], 6)]
    assert without[0] == want[0] and all(a != b for a, b in zip(without[1:], want[1:], strict=True))
    logits = [
        plain.runner.prefill([r.prompt_token_ids + tuple(t)], OutputRows.all(), return_logits=True)[2]
        for r, t in zip(mixed(), want, strict=True)
    ]
    for request, text, rows in zip(mixed(), want, logits, strict=True):
        if request.temperature:
            continue
        ahead = np.concatenate(rows, axis=1)[0, -TOKENS - 1 : -1]
        for i, row in enumerate(ahead):
            how = (request.presence_penalty, round_to_bfloat16(request.frequency_penalty), request.repetition_penalty)
            assert lowered(row, list(request.prompt_token_ids), text[:i], *how).argmax() == text[i], (request.index, i)


def forget_drafts(monkeypatch):
    """A verification that counts what was there before the round and not the drafts before a row."""
    monkeypatch.setattr(
        loop, "apply_penalties", lambda logits, penalties, seen, drafts: apply_penalties(logits, penalties, seen)
    )


def count_what_was_rejected(monkeypatch):
    add = TokenCounts.add
    monkeypatch.setattr(
        TokenCounts, "add", lambda self, tokens, count: add(self, tokens, jnp.full_like(count, tokens.shape[1]))
    )


@pytest.mark.parametrize("bug", [forget_drafts, count_what_was_rejected])
def test_the_test_sees(bug, model, want, monkeypatch):
    bug(monkeypatch)
    got = drafted(model, 3, 6, planted(bug.__name__))
    assert got[0] == want[0] and got != want


@pytest.mark.slow
def test_the_drafter_has_the_penalties_too(monkeypatch):
    """Left out there, the text stays, but drafts repeat what the text must not."""
    params = SamplingParams(max_tokens=60, presence_penalty=2.0, frequency_penalty=2.0)

    def answer(drafter):
        return LLM(num_speculative_tokens=4, max_model_len=100, prefill_buckets=(16,), drafter=drafter).generate(
            "The sun was shining and", params
        )[0]

    ours = answer(loop.mtp_drafter)
    monkeypatch.setattr(steps, "apply_penalties", lambda logits, *_: logits)
    without = answer(planted("left out"))
    assert (
        without.token_ids == ours.token_ids and without.metrics.num_accepted_tokens < ours.metrics.num_accepted_tokens
    )


def test_a_penalty_larger_than_the_range_of_the_logits_lets_no_token_come_twice(plain, model):
    request = Request(0, (1, 2, 3), VOCAB - 1, 0.0, 0, ())
    free = plain.run([request], 1)[0].tokens
    assert max(Counter(free).values()) > 2
    spread = np.ptp(
        np.concatenate(plain.runner.prefill([(1, 2, 3, *free)], OutputRows.all(), return_logits=True)[2], axis=1),
        axis=-1,
    ).max()
    most = replace(request, presence_penalty=float(spread) + 1)  # more than SamplingParams allows
    for by in (plain, make_engine(model, num_speculative_tokens=3, max_model_len=MAX_LEN)):
        assert max(Counter(by.run([most], 1)[0].tokens).values()) == 1


def test_without_penalties_the_loop_carries_no_counts(model):
    by = make_engine(model, num_speculative_tokens=1, max_model_len=MAX_LEN)
    free, held = (replace(mixed()[0], max_tokens=4), replace(mixed()[1], max_tokens=4))
    by.run([free], 1)
    programs = by.num_programs
    by.run([replace(free, top_k=3)], 1)
    assert by.num_programs == programs
    by.run([held], 1)
    by.run([replace(held, presence_penalty=0.2, repetition_penalty=1.2)], 1)
    assert by.num_programs == programs + 1
    assert stack_requests([free]).penalties is None


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"presence_penalty": 2.1}, r"presence_penalty is 2\.1; expected a number from -2 to 2 \(0 is none\)"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3; expected a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"repetition_penalty": 0}, r"repetition_penalty is 0; expected a finite number above 0 \(1 is none\)"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": "1"}, "presence_penalty is '1'"),
    ],
)
def test_out_of_range(bad, says):
    with pytest.raises(ValueError, match=says):
        SamplingParams(**bad)


def test_what_a_checkpoint_advises():
    advice = {"do_sample": True, "temperature": 0.7, "presence_penalty": 1.5, "repetition_penalty": 1.05}
    assert SamplingParams.from_generation_config(advice) == SamplingParams(temperature=0.7, presence_penalty=1.5, repetition_penalty=1.05)
    greedy = SamplingParams.from_generation_config({**advice, "do_sample": False})
    assert greedy == SamplingParams(presence_penalty=1.5, repetition_penalty=1.05)
    assert set(PENALTIES) == set(NONE)
