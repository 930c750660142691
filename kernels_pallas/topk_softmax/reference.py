"""The choice of experts in plain JAX: the "xla" implementation, and the oracle of the kernel."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.activation import silu_and_mul
from kernels_pallas.fixed_order import softmax, sum_features
from kernels_pallas.partial_sums import PartialSums


class ExpertChoice(NamedTuple):
    """The experts of each row, and the hidden units of the shared expert."""

    topk_weights: Float[Array, "rows topk"]  # float32, of sum 1
    topk_ids: Int[Array, "rows topk"]  # int32; E for rows that are not valid
    shared_hidden: Float[Array, "rows I"]
    probs: Float[Array, "rows E"] | None  # float32, of all experts; only "xla" returns it, for the losses of training


def topk_softmax(
    logits: PartialSums, gate: PartialSums, up: PartialSums, valid: Bool[Array, " rows"], k: int, dtype: DTypeLike
) -> ExpertChoice:
    """Choose the experts of each row, as Qwen3-MoE does, and activate the shared expert:

        p = softmax(logits);  topk_ids = the k largest p;  topk_weights = p[topk_ids] / sum(p[topk_ids])
        shared_hidden = silu(gate) * up

    Args:
        logits, gate, up, valid, k, dtype: as for `kernels_pallas.topk_softmax.topk_softmax`.
    """
    probs = softmax(logits.sum(jnp.float32))
    weights, topk_ids = lax.top_k(probs, k)
    topk_weights = weights / sum_features(weights)
    topk_ids = jnp.where(valid[:, None], topk_ids, probs.shape[1])
    hidden = silu_and_mul(gate.sum(jnp.float32), up.sum(jnp.float32)).astype(dtype)
    return ExpertChoice(topk_weights, topk_ids, hidden, probs)
