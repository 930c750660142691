"""Sampling is exact: tokens follow the softmax, alone and through the loop with drafts; a planted bug is seen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax import sampling
from mtpjax.sampling import STOPS, Requests, agreeing, choose, emitted, gumbel_noise

VOCAB, TEMPERATURE = 12, 0.8
LOGITS = np.random.default_rng(5).normal(0, 1.5, VOCAB).astype(np.float32)
# The 0.999 999 quantile of chi-square with 11 degrees of freedom: a right sampler fails once in a million runs, and
# seeds are fixed. A wrong temperature or wrong noise exceeds it many times over.
LIMIT_11 = 51.0


def requests(batch: int, *, temperature: float = TEMPERATURE, first_seed: int = 0) -> Requests:
    return Requests(
        max_tokens=jnp.full(batch, 100, jnp.int32),
        temperature=jnp.full(batch, temperature, jnp.float32),
        seed=jnp.arange(first_seed, first_seed + batch, dtype=jnp.uint32),
        stops=jnp.full((batch, STOPS), -1, jnp.int32),
    )


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * len(tokens)
    return float(np.sum((np.bincount(tokens, minlength=len(probabilities)) - expected) ** 2 / expected))


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return p / p.sum()


def sample(batch: int = 8000, position: int = 3) -> np.ndarray:
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (batch, 1, VOCAB))
    return np.asarray(jax.jit(partial(choose, vocab=VOCAB))(logits, jnp.full((batch, 1), position), requests(batch)))[
        :, 0
    ]


def test_tokens_follow_the_softmax():
    assert chi_square(sample(), softmax(LOGITS, TEMPERATURE)) < LIMIT_11


def test_a_planted_bug_is_seen(monkeypatch):
    monkeypatch.setattr(sampling, "gumbel_noise", lambda *args: 0.8 * gumbel_noise(*args))
    assert chi_square(sample(), softmax(LOGITS, TEMPERATURE)) > LIMIT_11


def joint(tokens_and_drafts, *, always_accept: bool) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """Two tokens of a two-step chain whose second distribution depends on the first token; one draft, one round each."""
    table, batch = jnp.asarray(np.random.default_rng(6).normal(0, 1.5, (4, 4)).astype(np.float32)), 8000
    asked = requests(batch, first_seed=50_000)

    @jax.jit
    def run():  # type: ignore[no-untyped-def]
        drafts = tokens_and_drafts(table, batch, asked)  # [B, 1]
        window = jnp.stack([jnp.broadcast_to(table[0], (batch, 4)), table[drafts[:, 0]]], axis=1)
        tokens = choose(window, jnp.broadcast_to(jnp.array([7, 8]), (batch, 2)), asked, 4)
        right = jnp.ones(batch, jnp.int32) if always_accept else agreeing(drafts, tokens)
        first = jnp.where(right == 1, drafts[:, 0], tokens[:, 0])
        again = choose(table[first][:, None], jnp.full((batch, 1), 8), asked, 4)[:, 0]
        return first * 4 + jnp.where(right == 1, tokens[:, 1], again)

    t = np.asarray(table)
    first = softmax(t[0], TEMPERATURE)
    return np.asarray(run()), np.concatenate([first[a] * softmax(t[a], TEMPERATURE) for a in range(4)])


def drafted(table, batch, asked):  # type: ignore[no-untyped-def]
    """A drafter with logits of its own (not the trunk's) and the same noise."""
    return choose(jnp.broadcast_to(table[0] + table[1], (batch, 1, 4)), jnp.full((batch, 1), 7), asked, 4)


LIMIT_15 = 58.0  # the same quantile, 15 degrees of freedom


def test_pairs_of_tokens_follow_the_exact_joint_distribution_with_drafts():
    tokens, exact = joint(drafted, always_accept=False)
    assert chi_square(tokens, exact) < LIMIT_15


def test_accepting_every_draft_is_seen():
    tokens, exact = joint(drafted, always_accept=True)
    assert chi_square(tokens, exact) > LIMIT_15


def test_ids_beyond_the_vocabulary_are_never_chosen():
    logits = jnp.zeros((64, 1, 10)).at[:, :, 6:].set(50.0)
    for temperature in (0.0, 1.0):
        tokens = choose(logits, jnp.zeros((64, 1), jnp.int32), requests(64, temperature=temperature), 6)
        assert int(tokens.max()) < 6


def test_noise_belongs_to_seed_and_position():
    one = requests(1, first_seed=7)
    many = requests(8, first_seed=3)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (8, 5, VOCAB))
    positions = jnp.broadcast_to(jnp.arange(20, 25), (8, 5))
    alone = choose(logits[:1, 2:3], positions[:1, 2:3], one, VOCAB)
    assert int(alone[0, 0]) == int(choose(logits, positions, many, VOCAB)[4, 2])
    noise = [np.asarray(gumbel_noise(jnp.uint32(s), jnp.int32(p), VOCAB)) for s, p in ((1, 1), (1, 2), (2, 1))]
    assert not np.allclose(noise[0], noise[1]) and not np.allclose(noise[0], noise[2])


@pytest.mark.parametrize(
    ("count", "room", "stops", "expected"),
    [
        (3, 9, [99], (3, False)),
        (3, 2, [99], (2, False)),
        (4, 9, [12], (3, True)),
        (2, 9, [12], (2, False)),
        (4, 2, [12], (2, False)),
    ],
)
def test_what_leaves_the_loop(count, room, stops, expected):
    tokens = jnp.array([[10, 11, 12, 13]])
    number, stopped = emitted(tokens, jnp.array([count]), jnp.array([room]), jnp.array([stops + [-1] * (STOPS - 1)]))
    assert (int(number[0]), bool(stopped[0])) == expected
