"""The routed experts in plain JAX: the "xla" implementation, the oracle of the kernels, and the source of gradients."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.grouped_matmul.grad import grouped_mlp_with_gradient
from kernels_pallas.grouped_matmul.plan import align_windows, choose_window_sizes
from kernels_pallas.grouped_matmul.windows import swiglu
from kernels_pallas.matmul.reference import linear
from kernels_pallas.weights import FusedExperts, TransposedWeight, Weight

# Calls of so many rows multiply all experts where these are fused: one row reads too few of them, more want windows.
DENSE_MOE_ROWS = range(2, 65)


def fused_moe(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    topk_ids: Int[Array, "rows topk"],
    topk_weights: Float[Array, "rows topk"],
) -> Float[Array, "rows D"]:
    """Return the weighted sum over the chosen experts (Shazeer et al. 2017, arXiv:1701.06538), in float32:

        y[n] = sum_k topk_weights[n, k] * down_e(silu(gate_e x[n]) * up_e x[n])        with e = topk_ids[n, k]

    The hidden units and the output of an expert are rounded to the dtype of `x`, and the sum over k is float32, in the
    order of k. A few rows of small experts on a CPU (`FusedExperts`) are multiplied by all experts instead, the weight
    of an expert that was not chosen is 0, and it is applied before the down projection.

    Args:
        gate_up, down, layer, topk_ids, topk_weights: as for `kernels_pallas.grouped_matmul.fused_moe`.
    """
    if isinstance(gate_up, FusedExperts) and isinstance(down, TransposedWeight) and x.shape[0] in DENSE_MOE_ROWS:
        chosen = topk_ids[..., None] == jnp.arange(gate_up.shape[1])
        weights = jnp.sum(jnp.where(chosen, topk_weights[..., None], 0), axis=1)
        return _all_experts(x, gate_up, down, layer, weights).astype(jnp.float32)
    topk, num_experts = topk_ids.shape[1], gate_up.shape[1]
    sizes = choose_window_sizes(x.shape[0], topk, num_experts)
    windows = align_windows(topk_ids, num_experts, sizes)
    rows = x.at[windows.sorted_token_ids // topk].get(mode="fill", fill_value=0)
    y = grouped_mlp_with_gradient(rows, gate_up, down, layer, windows.expert_ids, windows.starts, windows.first, sizes)
    out = jnp.zeros(x.shape, jnp.float32)
    for k in range(topk):  # not one gather of [rows, topk, D], which would be written to memory first
        of_expert = y.at[windows.inverse_order[:, k]].get(mode="fill", fill_value=0)
        out = out + of_expert.astype(jnp.float32) * topk_weights[:, k, None].astype(jnp.float32)
    return out


def _all_experts(
    x: Float[Array, "rows D"],
    gate_up: FusedExperts,
    down: TransposedWeight,
    layer: Int[Array, ""],
    weights: Float[Array, "rows E"],
) -> Float[Array, "rows D"]:
    """Return `sum_e weights[n, e] * mlp_e(x[n])` by two products that multiply every row with every expert.

    For few rows of small experts, where choosing an expert costs more than multiplying all.
    """
    inputs, experts, outputs = gate_up.array.shape[1:]

    def of_layer(stack: Array) -> Array:
        return stack[0] if stack.shape[0] == 1 else lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    joined = TransposedWeight(of_layer(gate_up.array).reshape(inputs, experts * outputs))
    hidden = swiglu(linear(x, joined, jnp.float32).reshape(-1, experts, outputs))
    # An expert that was not chosen gives zero even where its product is not finite.
    hidden = jnp.where(weights[..., None] > 0, hidden * weights[..., None], 0)
    hidden = hidden.astype(x.dtype).reshape(x.shape[0], -1)
    return linear(hidden, TransposedWeight(of_layer(down.array).reshape(-1, inputs)), x.dtype)


def combine_experts(
    outputs: Float[Array, "rows chosen D"], valid: Bool[Array, " rows"], dtype: DTypeLike
) -> Float[Array, "rows D"]:
    """Add the outputs of `fused_moe_unreduced` in their order and round the sum to `dtype`.

    Args:
        outputs: float32, weighted.
        valid: rows that have experts; the others give zero, whatever their outputs hold.
    """
    total = outputs[:, 0]
    for k in range(1, outputs.shape[1]):
        total = total + outputs[:, k]
    return jnp.where(valid[:, None], total, 0.0).astype(dtype)
