"""Tokens follow the model's distribution: chi-square tests, alone and through the loop, that planted bugs must fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import chi2

from mtpjax.config import FULL, LINEAR
from mtpjax.decoding import acceptance, sampling
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams, agreeing, best, choose, emitted, gumbel_noise
from mtpjax.decoding.speculative import mtp_drafter
from mtpjax.engine.request import Request
from tests.helpers.models import make_engine, numpy_model, tiny_config

TEMPERATURE = 0.8
FAIR, FOUL = 1e-3, 1e-9  # chance of the data under a claim: above the first it stands, below the second it is refuted


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def chance(counts: np.ndarray, p: np.ndarray) -> float:
    """Pearson's test: the chance of counts at least as far from `p`. Rare cells (fewer than 5 expected) are one."""
    counts, expected = counts.ravel().astype(float), p.ravel() * counts.sum()
    rare = expected < 5
    if rare.any():
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    keep = expected > 0
    assert not counts[~keep].any()
    counts, expected = counts[keep], expected[keep]
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(chi2.sf(statistic, len(counts) - 1))


def asked(batch: int, temperature: float, *, seed: int = 0) -> BatchSamplingParams:
    return BatchSamplingParams(
        max_tokens=jnp.full(batch, 99),
        temperature=jnp.full(batch, temperature, jnp.float32),
        seed=jnp.arange(batch, dtype=jnp.uint32) + jnp.uint32(seed),
        stops=jnp.full((batch, MAX_STOP_TOKENS), -1),
    )


LOGITS = np.array([1.5, 0.3, -0.7, 2.0, 0.0, -2.5, 1.1, 0.9, -0.2, 1.9, 0.5, -1.0], np.float32)


def draw(seeds: int = 20_000, at: int = 17, **kw) -> np.ndarray:
    """Counts of the tokens that many requests choose at one position with the same logits."""
    logits = jnp.broadcast_to(LOGITS, (seeds, 1, len(LOGITS)))
    tokens = choose(logits, jnp.full((seeds, 1), at), asked(seeds, TEMPERATURE, **kw), len(LOGITS))
    return np.bincount(np.asarray(tokens).ravel(), minlength=len(LOGITS))


def test_tokens_follow_the_softmax():
    for kw in ({}, {"at": 0}, {"at": 100_000}, {"seed": 2**31 + 5}):
        assert chance(draw(**kw), softmax(LOGITS / TEMPERATURE)) > FAIR


@pytest.mark.parametrize("wrong", [1.0, 0.7, TEMPERATURE**2])
def test_the_test_sees_a_wrong_temperature(wrong):
    assert chance(draw(), softmax(LOGITS / wrong)) < FOUL


def test_the_test_sees_temperature_applied_twice(monkeypatch):
    monkeypatch.setattr(sampling, "gumbel_noise", lambda *args: TEMPERATURE * gumbel_noise(*args))
    assert chance(draw(), softmax(LOGITS / TEMPERATURE)) < FOUL


def test_positions_of_one_request_are_independent():
    """One seed, many positions: the tokens follow the softmax, and pairs of neighbours the product."""
    many, vocab = 20_000, len(LOGITS)
    logits = jnp.broadcast_to(LOGITS, (1, many, vocab))
    tokens = np.asarray(choose(logits, jnp.arange(many)[None], asked(1, TEMPERATURE, seed=9), vocab))[0]
    p = softmax(LOGITS / TEMPERATURE)
    assert chance(np.bincount(tokens, minlength=vocab), p) > FAIR
    pairs = np.zeros((vocab, vocab))
    np.add.at(pairs, (tokens[::2], tokens[1::2]), 1)
    assert chance(pairs, np.outer(p, p)) > FAIR


def test_noise_depends_on_seed_and_position_alone():
    """Not on the batch, the slot, the row of the window, nor the number of rows."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(5, 4, 12)).astype(np.float32))
    positions = jnp.asarray([[7, 8, 9, 10]] * 5)
    requests = asked(5, TEMPERATURE, seed=40)
    tokens = np.asarray(choose(logits, positions, requests, 12))

    order = np.array([3, 0, 4, 2, 1])
    moved = jax.tree.map(lambda x: x[order], requests)
    assert np.array_equal(choose(logits[order], positions, moved, 12), tokens[order])
    for b, row in np.ndindex(5, 4):
        alone = jax.tree.map(lambda x, b=b: x[b : b + 1], requests)
        got = choose(logits[b : b + 1, row : row + 1], positions[b : b + 1, row : row + 1], alone, 12)
        assert got[0, 0] == tokens[b, row]
        want = jnp.argmax(logits[b, row] + np.float32(TEMPERATURE) * gumbel_noise(requests.seed[b], 7 + row, 12))
        assert want == tokens[b, row]

    key = (jnp.uint32(3), jnp.int32(5))
    assert np.array_equal(gumbel_noise(*key, 12), gumbel_noise(*key, 12))
    for other in ((jnp.uint32(4), key[1]), (key[0], jnp.int32(6)), (key[1].astype(jnp.uint32), jnp.int32(3))):
        assert not np.array_equal(gumbel_noise(*key, 12), gumbel_noise(*other, 12))


def test_each_request_has_its_own_temperature():
    """A greedy request beside a sampled one is greedy, a sampled one beside greedy ones is itself."""
    logits = jnp.broadcast_to(LOGITS, (400, 1, len(LOGITS)))
    at = jnp.full((400, 1), 3)
    hot = asked(400, TEMPERATURE)
    mixed = hot.replace(temperature=jnp.where(jnp.arange(400) % 2 == 0, TEMPERATURE, 0.0))
    want, got = (np.asarray(choose(logits, at, r, len(LOGITS)))[:, 0] for r in (hot, mixed))
    assert np.array_equal(got[::2], want[::2])
    assert (got[1::2] == LOGITS.argmax()).all() and len(set(got[::2].tolist())) > 5


def test_the_best_is_the_first_of_the_largest():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 5, (50, 3, 12)).astype(np.float32)  # full of ties
    logits[0], logits[1, :, :6] = -np.inf, -np.inf
    assert np.array_equal(jax.jit(best)(logits), logits.argmax(-1))


def test_ids_beyond_the_vocabulary_are_never_chosen():
    """The rows of a padded matrix may say anything at all."""
    logits = np.broadcast_to(LOGITS, (3000, 1, len(LOGITS))).copy()
    logits[..., 9:] = 50.0
    for temperature in (0.0, TEMPERATURE, 30.0):
        tokens = np.asarray(choose(jnp.asarray(logits), jnp.zeros((3000, 1), int), asked(3000, temperature), 9))
        assert tokens.max() < 9
        if temperature == TEMPERATURE:
            counts = np.bincount(tokens[:, 0], minlength=9)
            assert chance(counts, softmax(LOGITS[:9] / TEMPERATURE)) > FAIR


def test_agreeing_counts_the_prefix():
    tokens = jnp.array([[1, 2, 3, 4]] * 5)
    drafts = jnp.array([[1, 2, 3], [1, 2, 9], [1, 9, 3], [9, 2, 3], [2, 3, 4]])
    assert agreeing(drafts, tokens).tolist() == [3, 2, 1, 0, 0]
    assert agreeing(drafts[:, :0], tokens[:, :1]).tolist() == [0] * 5


def test_emitted_ends_at_the_limit_or_the_first_stop_token():
    tokens = jnp.array([[5, 6, 7, 6]] * 7)
    stops = jnp.full((7, MAX_STOP_TOKENS), -1).at[2:, 3].set(6).at[6, 0].set(5)
    count, room = jnp.array([4, 2, 4, 1, 4, 3, 4]), jnp.array([9, 9, 9, 9, 1, 0, 9])
    sent, stopped = emitted(tokens, count, room, stops)
    assert sent.tolist() == [4, 2, 2, 1, 1, 0, 1]
    assert stopped.tolist() == [False, False, True, False, False, False, True]


# Through the whole loop: the joint distribution of the first two tokens against its enumeration.

VOCAB, PADDED, START, SEEDS, DRAFT = 7, 8, 3, 4096, 2


@pytest.fixture(scope="module")
def toy():
    """A model of eight ids, seven of which exist, and the joint distribution `[V, V]` of the tokens behind `START`."""
    sizes = {"hidden_size": 16, "q_heads": 2, "kv_heads": 1, "head_dim": 8, "rotary_dim": 4, "linear_k_heads": 1}
    sizes |= {"linear_v_heads": 2, "linear_k_dim": 8, "linear_v_dim": 8, "mlp_size": 24, "vocab_size": PADDED}
    cfg = tiny_config(moe=False, layer_pattern=(LINEAR, FULL), num_superblocks=1, **sizes)
    model = numpy_model(cfg, seed=2, scale=0.35)
    engine = make_engine(model, num_speculative_tokens=0, max_model_len=16, prefill_buckets=(2,))
    _, _, kept = engine.runner.prefill([[START, t] for t in range(VOCAB)], OutputRows.all(), return_logits=True)
    p = softmax(kept[0][..., :VOCAB].astype(np.float64) / TEMPERATURE)  # [V, 2, V]
    assert np.ptp(p[:, 0], axis=0).max() < 1e-6
    joint = p[0, 0][:, None] * p[:, 1]
    assert np.abs(p[:, 1] - p[0, 1]).max() > 0.05  # the second token does depend on the first
    return model, joint


def joint_counts(model, draft: int, drafter=mtp_drafter) -> tuple[np.ndarray, float]:
    """Counts of the first two tokens of many requests, and the share of first drafts accepted."""
    engine = make_engine(
        model, num_speculative_tokens=draft, max_model_len=16, prefill_buckets=(2,), vocab_size=VOCAB, drafter=drafter
    )
    requests = [Request(i, (START,), 2, TEMPERATURE, 1000 + i, ()) for i in range(SEEDS)]
    results = engine.run(requests, SEEDS)
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, tuple(np.array([r.tokens for r in results]).T), 1)
    rounds = sum(r.num_steps for r in results)
    return counts, sum(r.num_accepted_tokens_per_pos[0] for r in results) / rounds if draft else 0.0


def test_the_loop_samples_the_model(toy):
    """Plain and speculative decoding give one sample, not only one distribution, and it is the model's."""
    model, joint = toy
    plain, _ = joint_counts(model, 0)
    drafted, accepted = joint_counts(model, DRAFT)
    assert np.array_equal(plain, drafted)
    assert 0.1 < accepted < 0.9
    assert chance(plain, joint) > FAIR


def planted(name: str):
    """A drafter like the MTP's but another function, so that the loop is traced anew, with the bug in it."""

    def drafter(*args):
        return mtp_drafter(*args)

    drafter.__name__ = name
    return drafter


def test_the_test_sees_drafts_that_are_always_accepted(toy, monkeypatch):
    """The second token is then the trunk's answer to a first one that is not in the text."""
    model, joint = toy
    monkeypatch.setattr(acceptance, "agreeing", lambda drafts, tokens: jnp.full(drafts.shape[:1], drafts.shape[1]))
    counts, accepted = joint_counts(model, DRAFT, planted("always"))
    assert accepted == 1.0
    assert chance(counts.sum(1), joint.sum(1)) > FAIR
    assert chance(counts, joint) < FOUL


def test_the_test_sees_noise_that_is_shared_between_positions(toy, monkeypatch):
    """Each token alone still follows its softmax; only the pair does not."""
    model, joint = toy
    monkeypatch.setattr(sampling, "gumbel_noise", lambda seed, position, vocab: gumbel_noise(seed, 0 * position, vocab))
    counts, _ = joint_counts(model, 1, planted("shared noise"))
    assert chance(counts.sum(1), joint.sum(1)) > FAIR
    assert chance(counts, joint) < FOUL


def test_the_test_sees_temperature_applied_twice_in_the_loop(toy, monkeypatch):
    model, joint = toy
    monkeypatch.setattr(sampling, "gumbel_noise", lambda *args: TEMPERATURE * gumbel_noise(*args))
    counts, _ = joint_counts(model, 1, planted("twice"))
    assert chance(counts, joint) < FOUL
