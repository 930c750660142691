"""Inside kernels: the experts with the largest logits.

Every kernel that chooses experts does it by these operations, so a row has the same experts and weights wherever they
are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.partial_sums import load_partial_sum
from kernels_pallas.tiles import next_power_of_2


def load_logits(logits_ref: Any, row: Array) -> Float[Array, " experts"]:
    """Return the logits of a row of partial sums `[P, rows, E]`, filled up with -inf to a power of two."""
    num_experts = logits_ref.shape[2]
    expert = jnp.arange(next_power_of_2(num_experts))
    exists = expert < num_experts
    return jnp.where(exists, load_partial_sum(logits_ref, row, expert, mask=exists), -jnp.inf)


def nth_largest(logits: Float[Array, " experts"], n: Array | int) -> Int[Array, ""]:
    """Return the expert with the n-th largest logit, from 0 on; of equals the lower number comes first."""
    expert = jnp.arange(logits.size)

    def step(_: Array, left: Array) -> Array:
        return jnp.where(expert == jnp.argmax(left), -jnp.inf, left)

    return jnp.argmax(lax.fori_loop(0, n, step, logits)).astype(jnp.int32)


def relative_weight(logits: Float[Array, " experts"], expert: Array) -> Float[Array, ""]:
    """Return the probability of an expert, divided by that of the most probable one."""
    largest = jnp.max(logits)
    logit = jnp.max(jnp.where(jnp.arange(logits.size) == expert, logits, -jnp.inf))
    return jnp.exp(logit - largest)


def add_in_order(terms: Sequence[Array]) -> Array:
    """Return the sum of scalars, added one after the other."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
