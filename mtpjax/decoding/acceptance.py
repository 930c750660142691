"""Which drafts are accepted: the ones that are the trunk's own tokens or, to measure speed, as many as a schedule says.

With random weights the real rule accepts next to nothing, and speed by draft length could not be measured. A simulated
rule draws how many drafts are accepted and goes through the same loop. Its text means nothing; outputs say "simulated
acceptance".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from mtpjax.decoding.sampling import BatchSamplingParams, accepted_prefix_length

Acceptance = Callable[[Int[Array, "B k"], Int[Array, "B W"], Int[Array, " B"], BatchSamplingParams], Int[Array, " B"]]
"""Decides how many drafts are accepted, 0...k.

Arguments: drafts; the trunk's tokens, W = k + 1; number of tokens in the cache, which tells the steps of a request
apart; sampling parameters.
"""
ACCEPTANCE_SALT = 0x5EED  # keeps the random numbers of acceptance apart from the noise of the tokens


def exact_match(
    drafts: Int[Array, "B k"],
    tokens: Int[Array, "B W"],
    position: Int[Array, " B"],
    sampling_params: BatchSamplingParams,
) -> Int[Array, " B"]:
    """Accept the longest prefix of drafts that are the trunk's own tokens.

    Only under this rule is the text the model's. Greedy speculative decoding (Leviathan et al., arXiv:2211.17192)
    accepts in this way; shared noise extends it to sampling (Daliri et al., arXiv:2408.07978).
    """
    return accepted_prefix_length(drafts, tokens)


@dataclass(frozen=True)
class SimulatedAcceptance:
    """Accept the first j drafts of a step with probability `rates[j - 1]`, whatever the drafts are.

    One uniform random number per step, drawn from (request seed, position), decides for all draft positions.

    Raises:
        ValueError: rates are not probabilities, or they rise: draft j is accepted only if draft j - 1 is.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(float(r) for r in self.rates))
        if not self.rates or not all(0 <= r <= 1 for r in self.rates):
            raise ValueError(f"acceptance rates are {self.rates}; expected one or more numbers from 0 to 1")
        if any(b > a for a, b in zip(self.rates, self.rates[1:], strict=False)):
            raise ValueError(
                f"acceptance rates {self.rates} rise; rate j is the share of steps that accept drafts 1...j, "
                "so no rate is above the one before it"
            )

    @classmethod
    def from_mean_length(cls, mean_length: float, num_speculative_tokens: int) -> SimulatedAcceptance:
        """Make the schedule of least variance with `mean_length` tokens per step on average (accepted drafts + 1).

        `mean_length - 1` drafts, rounded down, are always accepted, and one more with the remaining probability. vLLM
        calls this `synthetic_acceptance_length`.

        Raises:
            ValueError: no schedule has this mean.
        """
        if not 1 <= mean_length <= num_speculative_tokens + 1:
            raise ValueError(
                f"mean acceptance length is {mean_length}; expected from 1 to num_speculative_tokens + 1 = "
                f"{num_speculative_tokens + 1} tokens per step"
            )
        return cls(tuple(min(max(mean_length - j, 0.0), 1.0) for j in range(1, num_speculative_tokens + 1)))

    def truncate(self, num_speculative_tokens: int) -> SimulatedAcceptance:
        """Return the rule of the first `num_speculative_tokens` draft positions.

        Raises:
            ValueError: there are fewer rates.
        """
        if num_speculative_tokens > len(self.rates):
            raise ValueError(
                f"there are {len(self.rates)} acceptance rates; expected one for each of "
                f"{num_speculative_tokens} draft tokens"
            )
        return SimulatedAcceptance(self.rates[:num_speculative_tokens])

    def __call__(
        self,
        drafts: Int[Array, "B k"],
        tokens: Int[Array, "B W"],
        position: Int[Array, " B"],
        sampling_params: BatchSamplingParams,
    ) -> Int[Array, " B"]:
        """Return how many drafts are accepted, int32; an `Acceptance`."""

        def draw(seed: Array, position: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ACCEPTANCE_SALT), position)
            return jax.random.uniform(key)

        uniform = jax.vmap(draw)(sampling_params.seed, position)
        rates = jnp.array(self.rates[: drafts.shape[1]], jnp.float32)
        return jnp.sum(uniform[:, None] < rates, axis=1).astype(jnp.int32)


def simulated_acceptance(
    mean_length: float | None, rates: Sequence[float] | None, num_speculative_tokens: int
) -> SimulatedAcceptance | None:
    """Make the rule for `num_speculative_tokens` drafts from `rates` if there are any, else from `mean_length`.

    Returns:
        None if nothing is drafted, or if neither is given.
    """
    if not num_speculative_tokens or (mean_length is None and rates is None):
        return None
    if rates:
        return SimulatedAcceptance(tuple(rates)).truncate(num_speculative_tokens)
    return SimulatedAcceptance.from_mean_length(float(mean_length or 0), num_speculative_tokens)
