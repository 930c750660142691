"""Which drafts are accepted: those that are the trunk's own tokens, or, for measurements of speed, as many as a schedule says.

With random weights the real rule accepts next to nothing, so speed by draft length cannot be measured. A simulated rule draws
how many drafts are accepted and goes through the same loop. Its text means nothing; outputs say "simulated acceptance".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from mtpjax.decoding.sampling import BatchSamplingParams, agreeing

# drafts accepted `[B]`, 0...k, from (drafts `[B, k]`, the trunk's tokens `[B, k + 1]`, position of the round `[B]`, requests)
Acceptance = Callable[[Int[Array, "B k"], Int[Array, "B W"], Int[Array, " B"], BatchSamplingParams], Int[Array, " B"]]
STREAM = 0x5EED  # apart from the noise of the tokens


def exact_match(drafts: Array, tokens: Array, position: Array, requests: BatchSamplingParams) -> Array:
    """The longest prefix of drafts that are the trunk's own tokens: the only rule under which the text is the model's."""
    return agreeing(drafts, tokens)


@dataclass(frozen=True)
class SimulatedAcceptance:
    """Accepts the first j drafts of a round with probability `rates[j - 1]`, whatever they are.

    One uniform number a round, drawn from (request seed, position), decides for all positions.

    Raises:
        ValueError: rates that are not probabilities, or that rise: draft j is accepted only behind draft j - 1.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(float(r) for r in self.rates))
        if not self.rates or not all(0 <= r <= 1 for r in self.rates):
            raise ValueError(f"acceptance rates are {self.rates}; expected one or more numbers from 0 to 1")
        if any(b > a for a, b in zip(self.rates, self.rates[1:], strict=False)):
            raise ValueError(
                f"acceptance rates {self.rates} rise; rate j is the share of rounds that accept drafts 1...j, so none is "
                "above the one before"
            )

    @classmethod
    def of_length(cls, length: float, draft: int) -> SimulatedAcceptance:
        """The schedule of least variance with `length` tokens a round on average (accepted drafts + 1).

        That many drafts, rounded down, are always accepted, and one more with the remaining probability: what vLLM calls
        `synthetic_acceptance_length`.
        """
        if not 1 <= length <= draft + 1:
            raise ValueError(
                f"acceptance length is {length}; expected from 1 to draft + 1 = {draft + 1} tokens a round"
            )
        return cls(tuple(min(max(length - j, 0.0), 1.0) for j in range(1, draft + 1)))

    def first(self, draft: int) -> SimulatedAcceptance:
        """The rates of the first `draft` positions."""
        if draft > len(self.rates):
            raise ValueError(f"there are {len(self.rates)} acceptance rates; expected one for each of {draft} drafts")
        return SimulatedAcceptance(self.rates[:draft])

    def __call__(self, drafts: Array, tokens: Array, position: Array, requests: BatchSamplingParams) -> Array:
        def uniform(seed: Array, at: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAM), at)
            return jax.random.uniform(key)

        drawn = jax.vmap(uniform)(requests.seed, position)
        rates = jnp.array(self.rates[: drafts.shape[1]], jnp.float32)
        return jnp.sum(drawn[:, None] < rates, axis=1).astype(jnp.int32)


def simulated(length: float | None, rates: Sequence[float] | None, draft: int) -> SimulatedAcceptance | None:
    """The rule for `draft` drafts from whichever of an acceptance length and rates was given."""
    if not draft or (length is None and rates is None):
        return None
    return (
        SimulatedAcceptance(tuple(rates)).first(draft)
        if rates
        else SimulatedAcceptance.of_length(float(length or 0), draft)
    )
