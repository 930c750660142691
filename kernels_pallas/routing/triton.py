"""The choice of experts as a Pallas kernel through the Triton lowering, behind a launch that makes the logits.

XLA makes four kernels of what follows the logits, each of which takes longer to start than to run, and its product adds up
in an order that depends on the number of rows: a row could choose other experts in a window than by itself. With the
logits of `kernels_pallas.matmul.triton` it cannot.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Bool, Float, Int

from kernels_pallas.packed_words import power


def _choose_kernel(parts_ref: Any, live_ref: Any, weights_ref: Any, chosen_ref: Any, *, k: int) -> None:
    """One row: the sum of its logits' parts, softmax, and the `k` largest, one after the other."""
    parts, _, experts = parts_ref.shape
    row, expert, place = pl.program_id(0), jnp.arange(power(experts)), jnp.arange(power(k))
    logits = jnp.zeros(expert.shape, jnp.float32)
    for part in range(parts):
        logits = logits + plt.load(parts_ref.at[part, row, expert], mask=expert < experts, other=0)
    logits = jnp.where(expert < experts, logits, -jnp.inf)
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


def choose_experts(
    parts: Float[Array, "S N E"], live: Bool[Array, " N"], k: int, *, interpret: bool = False
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """Weights, float32 and of sum 1, and numbers, int32, of the `k` experts with the largest softmax of the logits, the
    largest first, of equals that with the lower number. The number of a dead row's experts is E, which there is not.

    Args:
        parts: of the logits, added in their order.
        interpret: run as plain `jnp`, on any device.
    """
    rows = parts.shape[1]
    return pl.pallas_call(
        partial(_choose_kernel, k=k),
        grid=(rows,),
        out_shape=(jax.ShapeDtypeStruct((rows, k), jnp.float32), jax.ShapeDtypeStruct((rows, k), jnp.int32)),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(parts, live.astype(jnp.int32))
