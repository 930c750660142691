"""The choice of experts as a Pallas kernel through the Triton lowering, behind a launch that makes the logits.

XLA makes four kernels of what follows the logits, each of which takes longer to start than to run, and its product adds up
in an order that depends on the number of rows: a row could choose other experts in a window than by itself. With the
logits of `kernels_pallas.matmul.triton` it cannot. The same launch activates the shared expert, whose projections come from
the same product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Bool, Float, Int

from kernels_pallas.partial_sums import load_partial_sum
from kernels_pallas.tiles import next_power_of_2


def _choose_kernel(
    logits_ref: Any,
    gate_ref: Any,
    up_ref: Any,
    live_ref: Any,
    weights_ref: Any,
    chosen_ref: Any,
    hidden_ref: Any,
    *,
    k: int,
) -> None:
    """One row: the softmax of its logits and the `k` largest, one after the other; by another program the shared expert."""
    row, experts, hidden = pl.program_id(0), logits_ref.shape[2], hidden_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def choose() -> None:
        expert, place = jnp.arange(next_power_of_2(experts)), jnp.arange(next_power_of_2(k))
        logits = jnp.where(expert < experts, load_partial_sum(logits_ref, row, expert, mask=expert < experts), -jnp.inf)
        p = jnp.exp(logits - jnp.max(logits))
        p = p / jnp.sum(p)
        weights, chosen = jnp.zeros(place.shape, jnp.float32), jnp.zeros(place.shape, jnp.int32)
        for turn in range(k):
            best = jnp.max(p)
            first = jnp.min(jnp.where(p == best, expert, expert.size))  # of equals the first, as `lax.top_k`
            weights, chosen = jnp.where(place == turn, best, weights), jnp.where(place == turn, first, chosen)
            p = jnp.where(expert == first, -1.0, p)
        chosen = jnp.where(plt.load(live_ref.at[row]) > 0, chosen, experts)
        plt.store(weights_ref.at[row, place], weights / jnp.sum(weights), mask=place < k)
        plt.store(chosen_ref.at[row, place], chosen, mask=place < k)

    @pl.when(pl.program_id(1) == 1)
    def activate() -> None:
        at = jnp.arange(next_power_of_2(hidden))
        gate, up = (load_partial_sum(ref, row, at, mask=at < hidden) for ref in (gate_ref, up_ref))
        plt.store(hidden_ref.at[row, at], (gate * lax.logistic(gate) * up).astype(hidden_ref.dtype), mask=at < hidden)


def choose_experts(
    logits: Float[Array, "S N E"],
    gate: Float[Array, "Sg N I"],
    up: Float[Array, "Su N I"],
    live: Bool[Array, " N"],
    k: int,
    dtype: Any,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "N k"], Int[Array, "N k"], Float[Array, "N I"]]:
    """Weights, float32 and of sum 1, and numbers, int32, of the `k` experts with the largest softmax of the logits, the
    largest first, of equals that with the lower number; and `silu(gate) * up` in `dtype`. The number of a dead row's experts
    is E, which there is not.

    Args:
        logits, gate, up: float32 parts, added in their order.
        interpret: run as plain `jnp`, on any device.
    """
    rows, hidden = gate.shape[1:]
    return pl.pallas_call(
        partial(_choose_kernel, k=k),
        grid=(rows, 2),
        out_shape=(
            jax.ShapeDtypeStruct((rows, k), jnp.float32),
            jax.ShapeDtypeStruct((rows, k), jnp.int32),
            jax.ShapeDtypeStruct((rows, hidden), dtype),
        ),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(logits, gate, up, live.astype(jnp.int32))
