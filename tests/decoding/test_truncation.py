"""Top-k, top-p and min-p: the tokens that stay are those of a sort, and the loop samples from no others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpjax import LLM, SamplingParams
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.sampling import TruncationParams, apply_top_k_top_p_min_p, choose
from mtpjax.engine.request import Request
from tests.decoding.test_sampling import FAIR, FOUL, LOGITS, TEMPERATURE, asked, chance, softmax
from tests.helpers.models import make_engine, numpy_model, tiny_config

VOCAB, TOKENS, MAX_LEN = 96, 60, 120
SHARE = 1e-5  # float32's error in a sum of probabilities, generously


def kept(batch: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> TruncationParams:
    return TruncationParams(
        jnp.full(batch, top_k), jnp.full(batch, top_p, jnp.float32), jnp.full(batch, min_p, jnp.float32)
    )


def sorted_out(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens stay, by sorting in float64."""
    p = softmax(logits.astype(np.float64) / (temperature or 1))
    stay = p >= np.sort(p)[::-1][min(top_k or len(p), len(p)) - 1]
    p = np.where(stay, p, 0) / p[stay].sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        needed = int(np.argmax(np.cumsum(p[order]) >= top_p - SHARE))
        stay &= p >= p[order[needed]]
    return stay & (p >= min_p * p.max() * (1 - SHARE))


numbers = st.integers(-12, 12).map(lambda i: i / 4) | st.floats(
    -20, 20, width=16
)  # full of ties; told apart in float64 too


@settings(max_examples=150, deadline=None)
@given(
    st.lists(numbers, min_size=40, max_size=40),
    st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
    st.integers(0, 50),
    st.sampled_from([0.01, 0.1, 0.5, 0.8, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_what_stays_is_what_sorting_says(values, temperature, top_k, top_p, min_p):
    logits = np.array(values, np.float32)
    got = jax.jit(apply_top_k_top_p_min_p)(logits[None], jnp.full(1, temperature), kept(1, top_k, top_p, min_p))[0]
    less = sorted_out(
        logits, temperature, top_k, top_p - 3 * SHARE if top_p < 1 else 1, min(min_p * (1 + 3 * SHARE), 1)
    )
    more = sorted_out(logits, temperature, top_k, top_p + 3 * SHARE, min_p * (1 - 3 * SHARE))
    stays = np.isfinite(got)
    assert (stays >= less).all() and (stays <= more).all(), (less, stays, more)
    assert stays[logits.argmax()] and np.array_equal(got[stays], logits[stays])


def test_equal_logits_stay_together():
    """Both zeros are one probability."""
    for how in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
        logits = jnp.array([[-1.0, 0.0, -0.0, -2.0, 0.0]])
        assert np.isfinite(jax.jit(apply_top_k_top_p_min_p)(logits, jnp.ones(1), kept(1, **how))).tolist() == [
            [False, True, True, False, True]
        ]


def test_a_vocabulary_as_large_as_qwens():
    logits = np.random.default_rng(0).normal(size=(3, 248_320)).astype(np.float32) * 3
    for settings_ in ((20, 1.0, 0.0), (0, 0.95, 0.0), (50, 0.8, 0.01), (0, 0.3, 0.0)):
        got = np.isfinite(jax.jit(apply_top_k_top_p_min_p)(logits, jnp.full(3, 0.7), kept(3, *settings_)))
        for row, stays in zip(logits, got, strict=True):
            want = sorted_out(row, 0.7, *settings_)
            assert abs(int(want.sum()) - int(stays.sum())) <= 1e-3 * want.sum(), settings_
            assert stays.sum() == 20 or settings_[0] != 20


@pytest.mark.parametrize(
    "how", [{"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.4}, {"top_k": 6, "top_p": 0.9, "min_p": 0.2}]
)
def test_tokens_follow_the_softmax_of_those_that_stay(how):
    seeds = 20_000
    requests = asked(seeds, TEMPERATURE).replace(kept=kept(seeds, **how))
    logits = jnp.broadcast_to(LOGITS, (seeds, 1, len(LOGITS)))
    counts = np.bincount(
        np.asarray(choose(logits, jnp.full((seeds, 1), 5), requests, len(LOGITS)))[:, 0], minlength=len(LOGITS)
    )
    stays = sorted_out(LOGITS, TEMPERATURE, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0} | how)
    assert 1 < stays.sum() < len(LOGITS)
    assert chance(counts, softmax(np.where(stays, LOGITS / TEMPERATURE, -np.inf))) > FAIR
    assert chance(np.where(stays, counts, 0), softmax(LOGITS / TEMPERATURE)) < FOUL


def mixed() -> list[Request]:
    """All tokens, the best of few, the best of a share, greedy beside them, and everything at once."""
    rng = np.random.default_rng(3)
    one = [Request(i, tuple(rng.integers(0, VOCAB, 4 + 5 * i).tolist()), TOKENS, 0.9, 50 + i, ()) for i in range(5)]
    how = ({}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.0, "top_k": 2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1})
    return [replace(request, **changes) for request, changes in zip(one, how, strict=True)]


def test_the_text_is_the_same_at_any_draft_length_and_batch():
    """One program serves requests that keep all tokens and those that do not; each token is one of those that stay."""
    model = numpy_model(tiny_config(moe=True, vocab_size=VOCAB), seed=7, scale=0.15)
    plain = make_engine(model, num_speculative_tokens=0, max_model_len=MAX_LEN)
    want = [result.tokens for result in plain.run(mixed(), 5)]
    assert [r.tokens for r in plain.run([replace(r, top_k=0, top_p=1.0, min_p=0.0) for r in mixed()], 5)] != want
    programs = plain.num_programs
    assert plain.run([replace(mixed()[0], top_k=1)] + mixed()[1:], 5)[0].tokens != want[0]
    assert plain.num_programs == programs
    for draft, batch in ((3, 5), (3, 1), (1, 2)):
        results = make_engine(model, num_speculative_tokens=draft, max_model_len=MAX_LEN).run(mixed(), batch)
        assert [r.tokens for r in results] == want
        assert 0 < sum(r.num_accepted_tokens_per_pos[0] for r in results) < sum(r.num_steps for r in results)
    texts = [r.prompt_token_ids + tuple(tokens) for r, tokens in zip(mixed(), want, strict=True)]
    logits = np.concatenate(
        plain.runner.prefill(texts, OutputRows.all(), return_logits=True)[2], axis=1
    )  # padded in front
    for i, (request, text) in enumerate(zip(mixed(), texts, strict=True)):
        for place in range(len(request.prompt_token_ids), len(text)):
            row = logits[i, place - len(text) - 1]
            assert sorted_out(row, request.temperature, request.top_k, request.top_p, request.min_p)[text[place]]


def test_one_token_that_stays_is_the_greedy_choice():
    llm = LLM(num_speculative_tokens=2, max_model_len=64, prefill_buckets=(16,))
    hot = {"max_tokens": 12, "temperature": 2.0, "seed": 4}
    one = ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0})
    ways = [SamplingParams(max_tokens=12), *(SamplingParams(**hot, **how) for how in one)]
    greedy, *others = (out.token_ids for out in llm.generate(["Once upon a time"] * 4, ways))
    assert others == [greedy] * 3
    (free,) = llm.generate("Once upon a time", SamplingParams(**hot, top_k=-1))
    assert free.token_ids != greedy


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"top_k": -2}, "top_k is -2; expected a whole number >= -1"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"top_p": 0}, "top_p is 0; expected a number above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_p": True}, "top_p is True"),
        ({"min_p": -0.1}, r"min_p is -0\.1; expected a number from 0 to 1"),
        ({"min_p": "0.1"}, r"min_p is '0\.1'"),
    ],
)
def test_out_of_range(bad, says):
    with pytest.raises(ValueError, match=says):
        SamplingParams(**bad)


def test_what_a_checkpoint_advises():
    qwen = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "eos_token_id": [1],
        "transformers_version": "5",
    }
    assert SamplingParams.from_generation_config(qwen, max_tokens=9) == SamplingParams(max_tokens=9, temperature=0.6, top_k=20, top_p=0.95)
    assert SamplingParams.from_generation_config(qwen, top_k=5).top_k == 5
    assert SamplingParams.from_generation_config({**qwen, "do_sample": False}) == SamplingParams.from_generation_config({}) == SamplingParams()
    with pytest.raises(ValueError, match="top_p is 7"):
        SamplingParams.from_generation_config({"top_p": 7})
