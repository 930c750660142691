"""Tokens follow the model's distribution: chi-square tests, alone and through the loop, that planted bugs must fail."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax.config import FULL, LINEAR
from mtpjax.decoding import acceptance, sampling
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, gumbel_noise, sample, truncate_at_stop
from mtpjax.engine.request import Request
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.distributions import (
    LOGITS,
    PLAUSIBLE,
    REFUTED,
    TEMPERATURE,
    batch_sampling_params,
    chi_square_p_value,
    softmax,
)
from tests.helpers.models import make_engine, numpy_model, tiny_config


def sampled_counts(num_requests: int = 20_000, position: int = 17, seed: int = 0) -> np.ndarray:
    """Return how often each token is sampled by many requests, from the same logits and at the same position."""
    logits = jnp.broadcast_to(LOGITS, (num_requests, 1, len(LOGITS)))
    params = batch_sampling_params(num_requests, TEMPERATURE, seed=seed)
    tokens = sample(logits, jnp.full((num_requests, 1), position), params, len(LOGITS))
    return np.bincount(np.asarray(tokens).ravel(), minlength=len(LOGITS))


@pytest.mark.fast
@pytest.mark.parametrize("which", [{}, {"position": 0}, {"position": 100_000}, {"seed": 2**31 + 5}])
def test_tokens_follow_the_softmax(which: dict[str, int]) -> None:
    assert chi_square_p_value(sampled_counts(**which), softmax(LOGITS / TEMPERATURE)) > PLAUSIBLE


@pytest.mark.parametrize("wrong", [1.0, 0.7, TEMPERATURE**2])
def test_the_chi_square_test_sees_a_wrong_temperature(wrong: float) -> None:
    assert chi_square_p_value(sampled_counts(), softmax(LOGITS / wrong)) < REFUTED


def test_the_chi_square_test_sees_temperature_applied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "gumbel_noise", lambda *args: TEMPERATURE * gumbel_noise(*args))
    assert chi_square_p_value(sampled_counts(), softmax(LOGITS / TEMPERATURE)) < REFUTED


def test_positions_of_one_request_are_independent() -> None:
    """One seed, many positions: the tokens follow the softmax, and pairs of neighbours follow the product."""
    num_positions, vocab = 20_000, len(LOGITS)
    logits = jnp.broadcast_to(LOGITS, (1, num_positions, vocab))
    params = batch_sampling_params(1, TEMPERATURE, seed=9)
    tokens = np.asarray(sample(logits, jnp.arange(num_positions)[None], params, vocab))[0]
    p = softmax(LOGITS / TEMPERATURE)
    assert chi_square_p_value(np.bincount(tokens, minlength=vocab), p) > PLAUSIBLE
    pairs = np.zeros((vocab, vocab))
    np.add.at(pairs, (tokens[::2], tokens[1::2]), 1)
    assert chi_square_p_value(pairs, np.outer(p, p)) > PLAUSIBLE


@pytest.mark.fast
def test_noise_depends_on_seed_and_position_alone() -> None:
    """It depends neither on the batch, the slot, the row of the window, nor the number of rows."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 4, 12)).astype(np.float32)
    positions = np.array([[7, 8, 9, 10]] * 5)
    params = batch_sampling_params(5, TEMPERATURE, seed=40)
    jitted = jax.jit(sample, static_argnames="vocab_size")
    tokens = np.asarray(jitted(logits, positions, params, vocab_size=12))

    order = np.array([3, 0, 4, 2, 1])
    moved = jax.tree.map(lambda x: x[order], params)
    assert np.array_equal(jitted(logits[order], positions, moved, vocab_size=12), tokens[order])
    noise = jax.jit(gumbel_noise, static_argnames="vocab_size")
    for b, row in np.ndindex(5, 4):
        alone = jax.tree.map(lambda x, b=b: x[b : b + 1], params)
        one = np.s_[b : b + 1, row : row + 1]
        assert jitted(logits[one], positions[one], alone, vocab_size=12)[0, 0] == tokens[b, row]
        noise_there = np.asarray(noise(params.seed[b], jnp.int32(7 + row), vocab_size=12))
        assert (logits[b, row] + np.float32(TEMPERATURE) * noise_there).argmax() == tokens[b, row]

    seed, position = jnp.uint32(3), jnp.int32(5)
    assert np.array_equal(gumbel_noise(seed, position, 12), gumbel_noise(seed, position, 12))
    for other in ((jnp.uint32(4), position), (seed, jnp.int32(6)), (jnp.uint32(5), jnp.int32(3))):
        assert not np.array_equal(gumbel_noise(seed, position, 12), gumbel_noise(*other, 12))


@pytest.mark.fast
def test_each_request_has_its_own_temperature() -> None:
    """A greedy request beside a sampled one is greedy, and a sampled one beside greedy ones is itself."""
    logits, positions = jnp.broadcast_to(LOGITS, (400, 1, len(LOGITS))), jnp.full((400, 1), 3)
    all_sampled = batch_sampling_params(400, TEMPERATURE)
    half_greedy = all_sampled.replace(temperature=jnp.where(jnp.arange(400) % 2 == 0, TEMPERATURE, 0.0))
    want, got = (np.asarray(sample(logits, positions, p, len(LOGITS)))[:, 0] for p in (all_sampled, half_greedy))
    assert np.array_equal(got[::2], want[::2])
    assert (got[1::2] == LOGITS.argmax()).all() and len(set(got[::2].tolist())) > 5


@pytest.mark.parametrize("temperature", [0.0, TEMPERATURE, 30.0])
def test_ids_beyond_the_vocabulary_are_never_sampled(temperature: float) -> None:
    """The rows of a padded matrix may give any logits at all."""
    logits = np.broadcast_to(LOGITS, (3000, 1, len(LOGITS))).copy()
    logits[..., 9:] = 50.0
    params = batch_sampling_params(3000, temperature)
    tokens = np.asarray(sample(jnp.asarray(logits), jnp.zeros((3000, 1), int), params, 9))
    assert tokens.max() < 9
    if temperature == TEMPERATURE:
        counts = np.bincount(tokens[:, 0], minlength=9)
        assert chi_square_p_value(counts, softmax(LOGITS[:9] / TEMPERATURE)) > PLAUSIBLE


@pytest.mark.fast
def test_a_text_ends_at_its_limit_or_with_its_first_stop_token() -> None:
    tokens = jnp.array([[5, 6, 7, 6]] * 7)
    stop_token_ids = jnp.full((7, MAX_STOP_TOKENS), -1).at[2:, 3].set(6).at[6, 0].set(5)
    num_tokens, num_tokens_left = jnp.array([4, 2, 4, 1, 4, 3, 4]), jnp.array([9, 9, 9, 9, 1, 0, 9])
    num_new, stopped = truncate_at_stop(tokens, num_tokens, num_tokens_left, stop_token_ids)
    assert num_new.tolist() == [4, 2, 2, 1, 1, 0, 1]
    assert stopped.tolist() == [False, False, True, False, False, False, True]


# Through the whole loop: the joint distribution of the first two tokens against its enumeration.

VOCAB, PADDED_VOCAB, FIRST_TOKEN, NUM_REQUESTS = 7, 8, 3, 4096
ENGINE: dict[str, Any] = {"max_model_len": 16, "prefill_buckets": (2,)}


@pytest.fixture(scope="module")
def toy() -> tuple[LoadedModel, np.ndarray]:
    """A model of eight ids, seven of which exist, and the joint distribution `[V, V]` of two tokens after the first."""
    sizes = {"hidden_size": 16, "q_heads": 2, "kv_heads": 1, "head_dim": 8, "rotary_dim": 4, "linear_k_heads": 1}
    sizes |= {"linear_v_heads": 2, "linear_k_dim": 8, "linear_v_dim": 8, "mlp_size": 24, "vocab_size": PADDED_VOCAB}
    cfg = tiny_config(moe=False, layer_pattern=(LINEAR, FULL), num_superblocks=1, **sizes)
    model = numpy_model(cfg, seed=2, scale=0.35)
    runner = make_engine(model, num_speculative_tokens=0, **ENGINE).runner
    prompts = [[FIRST_TOKEN, token] for token in range(VOCAB)]
    _, _, (logits,) = runner.prefill(prompts, OutputRows.all(), return_logits=True)
    p = softmax(logits[..., :VOCAB].astype(np.float64) / TEMPERATURE)  # [V, 2, V]
    assert np.ptp(p[:, 0], axis=0).max() < 1e-6
    assert np.abs(p[:, 1] - p[0, 1]).max() > 0.05  # the second token does depend on the first
    return model, p[0, 0][:, None] * p[:, 1]


def joint_counts(model: LoadedModel, num_speculative_tokens: int) -> tuple[np.ndarray, float]:
    """Return counts of the first two tokens of many requests, and the share of first drafts that are accepted."""
    engine = make_engine(model, num_speculative_tokens=num_speculative_tokens, vocab_size=VOCAB, **ENGINE)
    requests = [Request(i, (FIRST_TOKEN,), 2, TEMPERATURE, 1000 + i) for i in range(NUM_REQUESTS)]
    states = engine.run(requests, NUM_REQUESTS)
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, tuple(np.array([s.tokens for s in states]).T), 1)
    if not num_speculative_tokens:
        return counts, 0.0
    return counts, sum(s.num_accepted_tokens_per_pos[0] for s in states) / sum(s.num_steps for s in states)


@pytest.mark.slow
def test_the_loop_samples_the_model(toy: tuple[LoadedModel, np.ndarray]) -> None:
    """Plain and speculative decoding give one sample, not only one distribution, and it is the model's."""
    model, joint = toy
    plain, _ = joint_counts(model, 0)
    drafted, accepted = joint_counts(model, 2)
    assert np.array_equal(plain, drafted)
    assert 0.1 < accepted < 0.9
    assert chi_square_p_value(plain, joint) > PLAUSIBLE


def test_the_joint_test_sees_drafts_that_are_always_accepted(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second token is then the trunk's answer to a first one that is not in the text."""
    model, joint = toy

    def everything(drafts: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.full(drafts.shape[:1], drafts.shape[1])

    monkeypatch.setattr(acceptance, "accepted_prefix_length", everything)
    counts, accepted = joint_counts(model, 2)
    assert accepted == 1.0
    assert chi_square_p_value(counts.sum(1), joint.sum(1)) > PLAUSIBLE
    assert chi_square_p_value(counts, joint) < REFUTED


def test_the_joint_test_sees_noise_that_is_shared_between_positions(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token alone still follows its softmax; only the pair does not."""
    model, joint = toy
    monkeypatch.setattr(sampling, "gumbel_noise", lambda seed, position, vocab: gumbel_noise(seed, 0 * position, vocab))
    counts, _ = joint_counts(model, 1)
    assert chi_square_p_value(counts.sum(1), joint.sum(1)) > PLAUSIBLE
    assert chi_square_p_value(counts, joint) < REFUTED


def test_the_joint_test_sees_temperature_applied_twice(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, joint = toy
    monkeypatch.setattr(sampling, "gumbel_noise", lambda *args: TEMPERATURE * gumbel_noise(*args))
    counts, _ = joint_counts(model, 1)
    assert chi_square_p_value(counts, joint) < REFUTED
