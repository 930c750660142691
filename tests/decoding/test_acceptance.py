"""Simulated acceptance: the loop accepts what the schedule says, at every position, and says that it is simulated."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax import LLM, SamplingParams, SimulatedAcceptance
from mtpjax.decoding.acceptance import simulated
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams
from tests.helpers.models import numpy_model, tiny_config


def requests(batch: int) -> BatchSamplingParams:
    ints = jnp.zeros(batch, jnp.int32)
    return BatchSamplingParams(
        ints, ints.astype(jnp.float32), jnp.arange(batch, dtype=jnp.uint32), jnp.full((batch, MAX_STOP_TOKENS), -1)
    )


@pytest.mark.parametrize("rates", [(0.88, 0.75, 0.51, 0.43), (1.0, 0.5), (0.3,)])
def test_each_position_is_accepted_as_often_as_asked(rates):
    rule, batch = SimulatedAcceptance(rates), 20_000
    drafts = jnp.zeros((batch, len(rates)), jnp.int32)
    taken = np.asarray(rule(drafts, jnp.ones((batch, len(rates) + 1), jnp.int32), jnp.arange(batch), requests(batch)))
    found = [np.mean(taken >= j) for j in range(1, len(rates) + 1)]
    np.testing.assert_allclose(found, rates, atol=0.015)  # four standard deviations


def test_an_acceptance_length_becomes_the_schedule_of_least_variance():
    assert SimulatedAcceptance.of_length(3.97, 4).rates == pytest.approx((1, 1, 0.97, 0))
    assert SimulatedAcceptance.of_length(1, 2).rates == (0, 0)
    assert SimulatedAcceptance.of_length(3, 2).rates == (1, 1)
    assert simulated(None, [0.9, 0.5, 0.1], 2) == SimulatedAcceptance((0.9, 0.5))
    assert simulated(2.5, None, 0) is None and simulated(None, None, 3) is None


@pytest.mark.parametrize("length", [1.0, 2.5, 4.0])
def test_the_loop_follows_the_schedule(length):
    """Random weights accept next to nothing; here the tokens of a round are those that were asked for."""
    model = numpy_model(tiny_config(moe=False, num_superblocks=1))
    llm = LLM(model, num_speculative_tokens=3, max_model_len=300, acceptance=SimulatedAcceptance.of_length(length, 3))
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    outputs = llm.generate([[1, 2, 3]] * 4, params)
    tokens, rounds = sum(len(o.token_ids) for o in outputs), sum(o.metrics.num_steps for o in outputs)
    assert tokens == 800
    assert tokens / rounds == pytest.approx(length, rel=0.06)
    assert {o.metrics.acceptance for o in outputs} == {"simulated"}
    real = LLM(model, num_speculative_tokens=3, max_model_len=300).generate([[1, 2, 3]], params)[0].metrics
    assert real.acceptance == "real" and real.mean_acceptance_length < 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimulatedAcceptance(()), "one or more numbers from 0 to 1"),
        (lambda: SimulatedAcceptance((0.5, 1.2)), "from 0 to 1"),
        (lambda: SimulatedAcceptance((0.5, 0.6)), "rise"),
        (lambda: SimulatedAcceptance.of_length(5.5, 4), "expected from 1 to draft [+] 1 = 5"),
        (lambda: SimulatedAcceptance((0.5,)).first(2), "one for each of 2 drafts"),
    ],
)
def test_schedules_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
