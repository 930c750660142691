"""The rejection rule gives tokens of the trunk's distribution: by exact enumeration, by chi-square tests of its random
numbers, and through the whole loop; planted bugs fail.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax import LLM, SamplingParams, SimulatedAcceptance
from mtpjax.config import FULL, LINEAR
from mtpjax.decoding import rejection
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.rejection import accept_or_resample, rejection_rule, sample_draft
from mtpjax.decoding.sampling import BatchSamplingParams, VocabSubset, gumbel_noise
from mtpjax.decoding.speculative import mtp_drafter
from mtpjax.engine.request import Request
from mtpjax.loading.draft_head import with_draft_head
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.distributions import (
    LOGITS,
    PLAUSIBLE,
    REFUTED,
    TEMPERATURE,
    batch_sampling_params,
    chi_square_p_value,
    kept_by_sorting,
    softmax,
    truncation_params,
)
from tests.helpers.models import make_engine, numpy_model, tiny_config

Patch = pytest.MonkeyPatch

# By enumeration. Probabilities of p are sixteenths and those of q powers of two, or zero. Thresholds for the uniform
# numbers are then eighths, so eight uniform numbers, one in the middle of each eighth, integrate exactly.

V, K, STRATA = 4, 2, 8
Q_ROWS = np.array([[8, 4, 2, 2], [2, 2, 4, 8], [8, 8, 0, 0], [4, 4, 4, 4], [0, 16, 0, 0]]) / 16
P_ROWS = np.array([[1, 3, 5, 7], [8, 0, 8, 0], [4, 4, 4, 4], [0, 0, 1, 15], [2, 8, 6, 0], [16, 0, 0, 0]]) / 16


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return p of three tokens `[V, V, 3, V]` and q of two `[V, V, 2, V]`, given the first two tokens of the text."""
    rng = np.random.default_rng(seed)
    p, q = np.zeros((V, V, K + 1, V)), np.zeros((V, V, K, V))
    p[:, :, 0], q[:, :, 0] = P_ROWS[rng.integers(len(P_ROWS))], Q_ROWS[rng.integers(len(Q_ROWS))]
    for x in range(V):
        p[x, :, 1], q[x, :, 1] = P_ROWS[rng.integers(len(P_ROWS))], Q_ROWS[rng.integers(len(Q_ROWS))]
        for y in range(V):
            p[x, y, 2] = P_ROWS[rng.integers(len(P_ROWS))]
    return p, q


def output_distribution(p: np.ndarray, q: np.ndarray, max_accepted: int = K) -> np.ndarray:
    """Return the distribution of three tokens, the first ones by the rule and the others from p, `[V, V, V]`.

    It sums over all drafts and all uniform numbers.
    """
    cases = list(itertools.product(range(V), range(V), range(STRATA), range(STRATA)))
    drafts = np.array([case[:2] for case in cases])
    uniform = (np.array([case[2:] for case in cases]) + 0.5) / STRATA
    of_case = tuple(drafts.T)
    f32 = partial(jnp.asarray, dtype=jnp.float32)
    num_accepted, weights = rejection.decide(
        f32(p[of_case]), f32(q[of_case]), jnp.asarray(drafts), f32(uniform), jnp.full(len(cases), max_accepted)
    )
    rows = np.asarray(weights, np.float64)
    total = np.zeros((V, V, V))
    for (x, y, _, _), n, row in zip(cases, np.asarray(num_accepted), rows, strict=True):
        chance = q[x, y, 0, x] * q[x, y, 1, y] / STRATA**2
        if not chance:
            continue
        third = p[:, :, 2]
        row = row / row.sum()
        if n == 0:
            total += chance * row[:, None, None] * p[:, 0, 1][:, :, None] * third
        elif n == 1:
            total[x] += chance * row[:, None] * third[x]
        else:
            total[x, y] += chance * row
    return total


def model_distribution(p: np.ndarray) -> np.ndarray:
    return p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]


def largest_error(max_accepted: int = K) -> float:
    errors = []
    for seed in range(12):
        p, q = tables(seed)
        errors.append(np.abs(output_distribution(p, q, max_accepted) - model_distribution(p)).max())
    return float(max(errors))


@pytest.mark.fast
@pytest.mark.parametrize("max_accepted", [0, 1, 2])
def test_the_rule_gives_exactly_the_distribution_of_the_trunk(max_accepted: int) -> None:
    """Whatever the drafter draws from, also where p or q is zero, and with a limit on the drafts."""
    assert largest_error(max_accepted) < 1e-6


BUGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "p in place of the residual": ("residual", lambda p, q: p),
    "no positive part": ("residual", lambda p, q: jnp.abs(p - q)),
    "p and q exchanged": ("accept_draft", lambda p, q, uniform: uniform * p < q),
    "everything accepted": ("accept_draft", lambda p, q, uniform: uniform >= 0),
}


@pytest.mark.fast
@pytest.mark.parametrize("bug", BUGS)
def test_the_enumeration_sees_a_planted_bug(bug: str, monkeypatch: Patch) -> None:
    name, wrong = BUGS[bug]
    monkeypatch.setattr(rejection, name, wrong)
    assert largest_error() > 0.01


@pytest.mark.fast
def test_the_enumeration_sees_a_residual_after_the_last_allowed_draft(monkeypatch: Patch) -> None:
    """A draft that a request does not allow has not been rejected."""
    decide = rejection.decide

    def resample(p: Any, q: Any, drafts: Any, uniform: Any, max_accepted: Any) -> Any:
        return decide(p, q, drafts, jnp.asarray(uniform).at[:, 1].set(jnp.inf), jnp.full_like(max_accepted, K))

    monkeypatch.setattr(rejection, "decide", resample)
    assert largest_error(1) > 0.01


# The random numbers: one row of drafts from LOGITS_Q against LOGITS, many requests.

LOGITS_Q = np.array([0.5, 1.3, 0.4, 1.0, 1.0, -1.5, 2.1, -0.9, 0.2, 0.9, -0.5, 0.0], np.float32)
MANY = 20_000


def one_round(
    params: BatchSamplingParams, vocab: int = len(LOGITS), subset: VocabSubset | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens `[N, 2]`, accepted drafts `[N]` and drafts `[N]` of one round with one draft at position 17."""

    def run(params: BatchSamplingParams) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch = params.seed.shape[0]
        logits = jnp.broadcast_to(LOGITS, (batch, 2, len(LOGITS)))
        q_logits = LOGITS_Q if subset is None else LOGITS_Q[np.asarray(subset.token_ids)]
        positions = jnp.full((batch, 2), 17) + jnp.arange(2)
        q_rows = jnp.broadcast_to(q_logits, (batch, 1, len(q_logits)))
        column, filtered = rejection.sample_draft(q_rows, positions[:, :1], params, vocab, subset)
        draft = column if subset is None else jnp.asarray(subset.token_ids)[column]
        tokens, num_accepted = accept_or_resample(logits, draft, filtered[:, None], positions, params, vocab)
        return tokens, num_accepted, draft[:, 0]

    tokens, num_accepted, drafts = map(np.asarray, jax.jit(run)(params))
    return tokens, num_accepted, drafts


def first_token_p_value(params: BatchSamplingParams, want: np.ndarray) -> float:
    tokens, _, _ = one_round(params)
    return chi_square_p_value(np.bincount(tokens[:, 0], minlength=len(LOGITS)), want)


@pytest.mark.fast
def test_tokens_drafts_and_acceptance_follow_their_distributions() -> None:
    """The token after an accepted draft as well; the share of accepted drafts is the overlap of p and q."""
    tokens, num_accepted, drafts = one_round(batch_sampling_params(MANY, TEMPERATURE, seed=3))
    p, q = softmax(LOGITS / TEMPERATURE), softmax(LOGITS_Q / TEMPERATURE)
    count = partial(np.bincount, minlength=len(LOGITS))
    assert chi_square_p_value(count(drafts), q) > PLAUSIBLE
    assert chi_square_p_value(count(tokens[:, 0]), p) > PLAUSIBLE
    assert chi_square_p_value(count(tokens[num_accepted == 1, 1]), p) > PLAUSIBLE
    assert abs(num_accepted.mean() - np.minimum(p, q).sum()) < 0.02
    pairs = np.zeros((len(p), len(p)))  # the second token does not know the first
    np.add.at(pairs, tuple(tokens[num_accepted == 1].T), 1)
    first = np.minimum(p, q) / np.minimum(p, q).sum()
    assert chi_square_p_value(pairs, np.outer(first, p)) > PLAUSIBLE


TOP_K = 4


def truncated() -> tuple[BatchSamplingParams, np.ndarray]:
    kept = kept_by_sorting(LOGITS, TEMPERATURE, TOP_K, 0.9)
    params = batch_sampling_params(MANY, TEMPERATURE, truncation=truncation_params(MANY, TOP_K, 0.9))
    return params, softmax(np.where(kept, LOGITS, -np.inf) / TEMPERATURE)


@pytest.mark.fast
def test_truncated_tokens_follow_their_distribution() -> None:
    assert first_token_p_value(*truncated()) > PLAUSIBLE


def test_the_test_sees_q_from_before_truncation(monkeypatch: Patch) -> None:
    params, want = truncated()

    def sample_and_forget(logits: jax.Array, *args: Any) -> tuple[jax.Array, jax.Array]:
        column, _ = sample_draft(logits, *args)
        return column, logits[:, 0]

    monkeypatch.setattr(rejection, "sample_draft", sample_and_forget)
    assert first_token_p_value(params, want) < REFUTED


def test_the_test_sees_noise_that_drafter_and_trunk_share(monkeypatch: Patch) -> None:
    """A draft and the token in its place are then large together."""
    want = softmax(LOGITS / TEMPERATURE)
    params = batch_sampling_params(4 * MANY, TEMPERATURE)
    assert first_token_p_value(params, want) > PLAUSIBLE
    monkeypatch.setattr(rejection, "draft_noise", gumbel_noise)
    assert first_token_p_value(params, want) < REFUTED


@pytest.mark.fast
def test_a_draft_from_a_part_of_the_vocabulary() -> None:
    """q is zero outside of the part; tokens outside come from the residual."""
    subset = VocabSubset(jnp.array([0, 3, 6, 8]), len(LOGITS))
    tokens, num_accepted, drafts = one_round(batch_sampling_params(MANY, TEMPERATURE), subset=subset)
    assert set(np.unique(drafts)) == {0, 3, 6, 8} and 0.1 < num_accepted.mean() < 0.9
    counts = np.bincount(tokens[:, 0], minlength=len(LOGITS))
    assert chi_square_p_value(counts, softmax(LOGITS / TEMPERATURE)) > PLAUSIBLE


@pytest.mark.fast
def test_at_temperature_zero_it_is_exact_match_and_ids_beyond_the_vocabulary_are_never_chosen() -> None:
    params = batch_sampling_params(64, 0.0)
    tokens, num_accepted, drafts = one_round(params)
    assert (drafts == LOGITS_Q.argmax()).all() and not num_accepted.any() and (tokens[:, 0] == LOGITS.argmax()).all()
    mixed = batch_sampling_params(2000, 30.0)
    tokens, _, drafts = one_round(mixed, vocab=9)
    assert tokens.max() < 9 and drafts.max() < 9


# Through the whole loop.

VOCAB, PADDED_VOCAB, FIRST_TOKEN, NUM_REQUESTS = 7, 8, 3, 4096
ENGINE: dict[str, Any] = {"max_model_len": 16, "prefill_buckets": (2,), "acceptance": rejection_rule}
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated": {"top_k": 5, "top_p": 0.95},
    "penalties": {"presence_penalty": 0.7, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
}


@pytest.fixture(scope="module")
def toy() -> LoadedModel:
    sizes = {"hidden_size": 16, "q_heads": 2, "kv_heads": 1, "head_dim": 8, "rotary_dim": 4, "linear_k_heads": 1}
    sizes |= {"linear_v_heads": 2, "linear_k_dim": 8, "linear_v_dim": 8, "mlp_size": 24, "vocab_size": PADDED_VOCAB}
    return numpy_model(
        tiny_config(moe=False, layer_pattern=(LINEAR, FULL), num_superblocks=1, **sizes), seed=2, scale=0.35
    )


def joint_distribution(model: LoadedModel, how: dict[str, Any]) -> np.ndarray:
    """Return the distribution of two tokens after the first, `[V, V]`, computed in numpy from the trunk's logits."""
    runner = make_engine(model, num_speculative_tokens=0, max_model_len=16, prefill_buckets=(2,)).runner
    prompts = [[FIRST_TOKEN, token] for token in range(VOCAB)]
    _, _, (logits,) = runner.prefill(prompts, OutputRows.all(), return_logits=True)
    logits = logits[..., :VOCAB].astype(np.float64)

    def distribution(row: np.ndarray, text: tuple[int, ...]) -> np.ndarray:
        row = row.copy()
        for token in {FIRST_TOKEN, *text}:
            factor = how.get("repetition_penalty", 1.0)
            row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
        for token in text:
            row[token] -= how.get("frequency_penalty", 0.0) + how.get("presence_penalty", 0.0)
        kept = kept_by_sorting(row, TEMPERATURE, how.get("top_k", 0), how.get("top_p", 1.0))
        return softmax(np.where(kept, row, -np.inf) / TEMPERATURE)

    first = distribution(logits[0, 0], ())
    return np.stack([first[x] * distribution(logits[x, 1], (x,)) for x in range(VOCAB)])


def joint_counts(model: LoadedModel, k: int, how: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Return counts of the first two tokens of many requests, and the share of first drafts that are accepted."""
    engine = make_engine(model, num_speculative_tokens=k, vocab_size=VOCAB, **ENGINE)
    requests = [Request(i, (FIRST_TOKEN,), 2, TEMPERATURE, 1000 + i, **how) for i in range(NUM_REQUESTS)]
    states = engine.run(requests, NUM_REQUESTS)
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, tuple(np.array([s.tokens for s in states]).T), 1)
    return counts, sum(s.num_accepted_tokens_per_pos[0] for s in states) / sum(s.num_steps for s in states)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_the_loop_samples_the_model(toy: LoadedModel, how: str) -> None:
    """Of seven ids the drafts come from five."""
    want = joint_distribution(toy, HOW[how])
    model = with_draft_head(toy, np.array([0, 1, 2, 4, 6], np.int32)) if how == "plain" else toy
    counts, accepted = joint_counts(model, 2, HOW[how])
    assert 0.2 < accepted < 0.95
    assert chi_square_p_value(counts, want) > PLAUSIBLE


@pytest.mark.slow
def test_the_joint_test_sees_p_in_place_of_the_residual(toy: LoadedModel, monkeypatch: Patch) -> None:
    monkeypatch.setattr(rejection, "residual", lambda p, q: p)
    counts, _ = joint_counts(toy, 1, HOW["penalties"])
    assert chi_square_p_value(counts, joint_distribution(toy, HOW["penalties"])) < REFUTED


MODEL_SIZES: dict[str, Any] = {"max_model_len": 64, "prefill_buckets": (16,)}


@pytest.mark.slow
def test_a_text_is_a_function_of_the_request_and_the_number_of_drafts() -> None:
    """Alone, beside others, in another slot; with a limit it is the text of that number of drafts."""
    model = numpy_model(tiny_config(moe=True, num_superblocks=1), seed=7)
    prompts = [[5, 6, 7], [8] * 9, [1], [2, 3]]
    params = [
        SamplingParams(max_tokens=24, temperature=t, seed=i, ignore_eos=True) for i, t in enumerate((1, 0, 0.7, 1))
    ]

    def texts(llm: LLM, order: list[int], **how: Any) -> dict[int, list[int]]:
        outputs = llm.generate([prompts[i] for i in order], [replace(params[i], **how) for i in order])
        assert all(o.metrics.acceptance in ("rejection", "real") for o in outputs)
        return {i: o.token_ids for i, o in zip(order, outputs, strict=True)}

    make = partial(LLM, model, max_num_seqs=3, **MODEL_SIZES)
    three, one = (make(num_speculative_tokens=k, acceptance="rejection") for k in (3, 1))
    coupled = make(num_speculative_tokens=0)
    want = texts(three, [0, 1, 2, 3])
    assert texts(three, [3, 2, 0, 1]) == want and texts(three, [2]) == {2: want[2]}
    limited = texts(one, [0, 1, 2, 3])
    assert texts(three, [0, 1, 2, 3], num_speculative_tokens=1) == limited
    assert want[0] != limited[0]
    mixed = three.generate(prompts, [replace(p, num_speculative_tokens=(None, 1)[i % 2]) for i, p in enumerate(params)])
    assert [o.token_ids for o in mixed] == [(want, limited)[i % 2][i] for i in range(4)]
    assert texts(coupled, [1])[1] == want[1]  # greedy


def test_what_the_rule_does_not_go_with_is_an_error() -> None:
    model = numpy_model(tiny_config(moe=False, num_superblocks=1))
    with pytest.raises(ValueError, match=r'expected "coupled", "rejection" or a SimulatedAcceptance'):
        LLM(model, acceptance="reject", **MODEL_SIZES)
    with pytest.raises(ValueError, match="needs the distribution that drafts are drawn from"):
        LLM(model, acceptance="rejection", drafter=lambda *args: mtp_drafter(*args), **MODEL_SIZES)
    with pytest.raises(ValueError, match="the text would depend on measured times"):
        LLM(model, acceptance="rejection", num_speculative_tokens="auto", **MODEL_SIZES)
    with pytest.raises(ValueError, match="there are 1 acceptance rates"):
        LLM(model, acceptance=SimulatedAcceptance((0.5,)), num_speculative_tokens=3, **MODEL_SIZES)
    with pytest.raises(TypeError, match="cannot decide from tokens alone"):
        rejection_rule(jnp.zeros((1, 1), int), jnp.zeros((1, 2), int), jnp.zeros(1, int), None)
