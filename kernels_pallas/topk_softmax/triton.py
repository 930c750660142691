"""The choice of experts as a Pallas kernel through the Triton lowering, behind a launch that makes the logits.

XLA makes four kernels of what follows the logits, and each takes longer to start than to run. Its product adds up in an
order that depends on the number of rows, so a row could choose other experts in a verify window than by itself. With
the logits of `kernels_pallas.matmul.triton` it cannot. The same launch activates the shared expert, whose projections
come from the same product.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Bool

from kernels_pallas.partial_sums import PartialSums, load_partial_sum
from kernels_pallas.tiles import next_power_of_2
from kernels_pallas.top_experts import add_in_order, load_logits, nth_largest, relative_weight
from kernels_pallas.topk_softmax.reference import ExpertChoice


def _kernel(
    logits_ref: Any,
    gate_ref: Any,
    up_ref: Any,
    valid_ref: Any,
    weights_ref: Any,
    ids_ref: Any,
    hidden_ref: Any,
    *,
    k: int,
) -> None:
    """For each row, one program takes the k largest logits in turn, and one activates the shared expert."""
    row, num_experts, num_hidden = pl.program_id(0), logits_ref.shape[2], hidden_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def choose() -> None:
        place, logits = jnp.arange(next_power_of_2(k)), load_logits(logits_ref, row)
        experts, left = [], logits
        for _ in range(k):
            experts.append(nth_largest(left, 0))
            left = jnp.where(jnp.arange(left.size) == experts[-1], -jnp.inf, left)
        relative = [relative_weight(logits, expert) for expert in experts]
        total, is_valid = add_in_order(relative), plt.load(valid_ref.at[row]) > 0
        weights, ids = jnp.zeros(place.shape, jnp.float32), jnp.zeros(place.shape, jnp.int32)
        for turn, (expert, weight) in enumerate(zip(experts, relative, strict=True)):
            weights = jnp.where(place == turn, weight / total, weights)
            ids = jnp.where(place == turn, jnp.where(is_valid, expert, num_experts), ids)
        plt.store(weights_ref.at[row, place], weights, mask=place < k)
        plt.store(ids_ref.at[row, place], ids, mask=place < k)

    @pl.when(pl.program_id(1) == 1)
    def activate() -> None:
        at = jnp.arange(next_power_of_2(num_hidden))
        inside = at < num_hidden
        gate, up = (load_partial_sum(ref, row, at, mask=inside) for ref in (gate_ref, up_ref))
        plt.store(hidden_ref.at[row, at], (gate * lax.logistic(gate) * up).astype(hidden_ref.dtype), mask=inside)


def topk_softmax(
    logits: PartialSums,
    gate: PartialSums,
    up: PartialSums,
    valid: Bool[Array, " rows"],
    k: int,
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> ExpertChoice:
    """Choose experts and activate the shared expert, as `kernels_pallas.topk_softmax.topk_softmax`; `probs` is None.

    Args:
        interpret: run as plain `jnp`, on any device.
    """
    rows, num_hidden = gate.parts.shape[1:]
    topk_weights, topk_ids, hidden = pl.pallas_call(
        partial(_kernel, k=k),
        grid=(rows, 2),
        out_shape=(
            jax.ShapeDtypeStruct((rows, k), jnp.float32),
            jax.ShapeDtypeStruct((rows, k), jnp.int32),
            jax.ShapeDtypeStruct((rows, num_hidden), dtype),
        ),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(logits.parts, gate.parts, up.parts, valid.astype(jnp.int32))
    return ExpertChoice(topk_weights, topk_ids, hidden, None)
