"""The choice of experts inside the launch of gate and up, for few rows.

By itself the choice is a kernel that takes longer to start than to run. A program of gate and up needs only the number
of one expert, the n-th largest logit of its row, and finds it alone. One program of each assignment stores the expert
and its weight for the down kernel. Programs behind the last assignment activate the shared expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Bool, Float

from kernels_pallas.partial_sums import PartialSums, load_partial_sum
from kernels_pallas.tiles import next_power_of_2
from kernels_pallas.top_experts import add_in_order, load_logits, nth_largest, relative_weight


class Router(NamedTuple):
    """What the router's launch leaves: logits of all experts, and gate and up of the shared expert."""

    logits: PartialSums  # [P, rows, E], float32
    gate: PartialSums  # [P, rows, I], float32
    up: PartialSums  # [P, rows, I], float32
    valid: Bool[Array, " rows"]  # rows that count; the others have no experts


class RouterRefs(NamedTuple):
    """Refs of a `Router`."""

    logits: Any
    gate: Any
    up: Any
    valid: Any  # int32


class ChoiceRefs(NamedTuple):
    """Refs of what the kernel of gate and up leaves for the down kernel."""

    expert_ids: Any  # [A], int32; E where the row does not count
    relative_weights: Any  # [A], float32: of each assignment, divided by the largest of its row
    shared_hidden: Any  # [rows, I]


def choose_expert(router: RouterRefs, choice: ChoiceRefs, assignment: Array, topk: int, stores: Array) -> Array:
    """Return the expert of an assignment, and store it with its weight if this program `stores`."""
    row, num_experts = lax.div(assignment, topk), router.logits.shape[2]
    logits = load_logits(router.logits, row)
    expert = nth_largest(logits, lax.rem(assignment, topk))
    chosen = jnp.where(plt.load(router.valid.at[row]) > 0, expert, num_experts)

    @pl.when(stores)
    def store() -> None:
        plt.store(choice.expert_ids.at[assignment], chosen)
        plt.store(choice.relative_weights.at[assignment], relative_weight(logits, expert))

    return chosen


def activate_shared(router: RouterRefs, choice: ChoiceRefs, row: Array, part: Array, parts: int) -> None:
    """Store `silu(gate) * up` of the shared expert for a row: one of `parts` runs of hidden units."""
    num_hidden = choice.shared_hidden.shape[1]
    size = next_power_of_2(-(-num_hidden // parts))
    at = part * size + jnp.arange(size)
    inside = at < num_hidden
    gate, up = (load_partial_sum(ref, row, at, mask=inside) for ref in (router.gate, router.up))
    hidden = (gate * lax.logistic(gate) * up).astype(choice.shared_hidden.dtype)
    plt.store(choice.shared_hidden.at[row, at], hidden, mask=inside)


def load_weight(relative_weights_ref: Any, assignment: Array, topk: int) -> Float[Array, ""]:
    """Return the weight of an assignment: those of a row have the sum 1."""
    first = assignment - lax.rem(assignment, topk)
    total = add_in_order([plt.load(relative_weights_ref.at[first + n]) for n in range(topk)])
    return plt.load(relative_weights_ref.at[assignment]) / total
