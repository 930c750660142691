"""Simulated acceptance: the loop accepts what the schedule says, at every position, and the outputs name it."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax import LLM, SamplingParams, SimulatedAcceptance
from mtpjax.decoding.acceptance import exact_match, simulated_acceptance
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.distributions import batch_sampling_params
from tests.helpers.models import numpy_model, tiny_config


@pytest.mark.fast
@pytest.mark.parametrize("rates", [(0.88, 0.75, 0.51, 0.43), (1.0, 0.5), (0.3,)])
def test_each_position_is_accepted_with_its_rate(rates: tuple[float, ...]) -> None:
    rule, batch = SimulatedAcceptance(rates), 20_000
    drafts, tokens = jnp.zeros((batch, len(rates)), jnp.int32), jnp.ones((batch, len(rates) + 1), jnp.int32)
    num_accepted = np.asarray(rule(drafts, tokens, jnp.arange(batch), batch_sampling_params(batch, 0.0)))
    shares = [np.mean(num_accepted >= j) for j in range(1, len(rates) + 1)]
    np.testing.assert_allclose(shares, rates, atol=0.015)  # four standard deviations


@pytest.mark.fast
def test_the_real_rule_accepts_the_longest_prefix_of_the_trunks_tokens() -> None:
    tokens = jnp.array([[1, 2, 3, 4]] * 5)
    drafts = jnp.array([[1, 2, 3], [1, 2, 9], [1, 9, 3], [9, 2, 3], [2, 3, 4]])
    params = batch_sampling_params(5, 0.0)
    assert exact_match(drafts, tokens, jnp.zeros(5, int), params).tolist() == [3, 2, 1, 0, 0]
    assert exact_match(drafts[:, :0], tokens[:, :1], jnp.zeros(5, int), params).tolist() == [0] * 5


@pytest.mark.fast
def test_a_mean_length_becomes_the_schedule_of_least_variance() -> None:
    assert SimulatedAcceptance.from_mean_length(3.97, 4).rates == pytest.approx((1, 1, 0.97, 0))
    assert SimulatedAcceptance.from_mean_length(1.0, 2).rates == (0, 0)
    assert SimulatedAcceptance.from_mean_length(3.0, 2).rates == (1, 1)
    assert simulated_acceptance(None, [0.9, 0.5, 0.1], 2) == SimulatedAcceptance((0.9, 0.5))
    assert simulated_acceptance(2.5, None, 2) == SimulatedAcceptance.from_mean_length(2.5, 2)
    assert simulated_acceptance(2.5, None, 0) is None and simulated_acceptance(None, None, 3) is None


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return numpy_model(tiny_config(moe=False, num_superblocks=1))


def generate(model: LoadedModel, acceptance: SimulatedAcceptance | None) -> tuple[float, set[str]]:
    """Return tokens per step of four texts of 200 tokens, and the kinds of acceptance that their metrics name."""
    llm = LLM(model, num_speculative_tokens=3, max_model_len=300, prefill_buckets=(16,), acceptance=acceptance)
    outputs = llm.generate([[1, 2, 3]] * 4, SamplingParams(max_tokens=200, ignore_eos=True))
    assert [len(out.token_ids) for out in outputs] == [200] * 4
    return 800 / sum(out.metrics.num_steps for out in outputs), {out.metrics.acceptance for out in outputs}


@pytest.mark.parametrize("mean_length", [1.0, 2.5, 4.0])
def test_the_loop_follows_the_schedule(model: LoadedModel, mean_length: float) -> None:
    tokens_per_step, kinds = generate(model, SimulatedAcceptance.from_mean_length(mean_length, 3))
    assert tokens_per_step == pytest.approx(mean_length, rel=0.06)
    assert kinds == {"simulated"}


def test_random_weights_accept_next_to_nothing_under_the_real_rule(model: LoadedModel) -> None:
    tokens_per_step, kinds = generate(model, None)
    assert tokens_per_step < 1.5 and kinds == {"real"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimulatedAcceptance(()), "one or more numbers from 0 to 1"),
        (lambda: SimulatedAcceptance((0.5, 1.2)), "from 0 to 1"),
        (lambda: SimulatedAcceptance((0.5, 0.6)), "rise"),
        (lambda: SimulatedAcceptance.from_mean_length(5.5, 4), "from 1 to num_speculative_tokens [+] 1 = 5 tokens"),
        (lambda: SimulatedAcceptance((0.5,)).truncate(2), "there are 1 acceptance rates; expected .* 2 draft tokens"),
    ],
)
def test_impossible_schedules_are_refused(make: Callable[[], SimulatedAcceptance], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
