"""The routed experts in plain JAX: the "xla" implementation, the oracle of the kernels, and the source of gradients."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.grouped_matmul.grad import grouped_mlp_with_gradient
from kernels_pallas.grouped_matmul.plan import align_windows, choose_window_sizes
from kernels_pallas.grouped_matmul.windows import swiglu
from kernels_pallas.matmul.reference import dot_in_fixed_order, linear, num_pieces
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

    The activated hidden units and the output of an expert are rounded to the dtype of `x`, and the sum over k is
    float32, in the order of k. A few rows of small experts on a CPU (`FusedExperts`) are multiplied by all experts, of
    which only the chosen ones are added. The order of all sums is the same.

    Args:
        gate_up, down, layer, topk_ids, topk_weights: as for `kernels_pallas.grouped_matmul.fused_moe`.
    """
    if isinstance(gate_up, FusedExperts) and isinstance(down, TransposedWeight) and x.shape[0] in DENSE_MOE_ROWS:
        outputs = _from_all_experts(x, gate_up, down, layer, topk_ids)
        return _add_chosen(lambda k: outputs[:, k], topk_weights)
    topk, num_experts = topk_ids.shape[1], gate_up.shape[1]
    sizes = choose_window_sizes(x.shape[0], topk, num_experts)
    windows = align_windows(topk_ids, num_experts, sizes)
    rows = x.at[windows.sorted_token_ids // topk].get(mode="fill", fill_value=0)
    y = grouped_mlp_with_gradient(rows, gate_up, down, layer, windows.expert_ids, windows.starts, windows.first, sizes)

    def output_of_choice(k: int) -> Array:  # not one gather of [rows, topk, D], which would be written to memory first
        return y.at[windows.inverse_order[:, k]].get(mode="fill", fill_value=0)

    return _add_chosen(output_of_choice, topk_weights)


def _add_chosen(
    output_of_choice: Callable[[int], Float[Array, "rows D"]], topk_weights: Float[Array, "rows topk"]
) -> Float[Array, "rows D"]:
    """Return the weighted sum of `output_of_choice(k)` over k, float32, in the order of k."""
    total = jnp.float32(0)
    for k in range(topk_weights.shape[1]):
        total = total + output_of_choice(k).astype(jnp.float32) * topk_weights[:, k, None].astype(jnp.float32)
    return total


def _from_all_experts(
    x: Float[Array, "rows D"],
    gate_up: FusedExperts,
    down: TransposedWeight,
    layer: Int[Array, ""],
    topk_ids: Int[Array, "rows topk"],
) -> Float[Array, "rows topk D"]:
    """Return the output of each chosen expert, rounded to the dtype of `x`, by products with the weights of all.

    For few rows of small experts, where choosing an expert costs more than multiplying all.
    """
    (rows, _), (inputs, experts, outputs) = x.shape, gate_up.array.shape[1:]

    def of_layer(stack: Array) -> Array:
        return stack[0] if stack.shape[0] == 1 else lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    joined, down_matrices = of_layer(gate_up.array).reshape(inputs, experts * outputs), of_layer(down.array)
    hidden = swiglu(linear(x, TransposedWeight(joined), jnp.float32).reshape(rows, experts, outputs)).astype(x.dtype)
    units = experts * hidden.shape[2]
    if x.dtype == jnp.bfloat16 and num_pieces(units, inputs) == 1:
        # One row for each choice: the hidden units of its expert among zeros, which add nothing to its sum.
        is_chosen = topk_ids[..., None, None] == jnp.arange(experts)[:, None]
        placed = jnp.where(is_chosen, hidden[:, None], 0).reshape(topk_ids.size, units)
        return linear(placed, TransposedWeight(down_matrices.reshape(units, inputs)), x.dtype).reshape(
            rows, topk_ids.shape[1], inputs
        )
    if x.dtype == jnp.bfloat16:  # not one batched product: XLA would convert it to float32, with another order of sums
        y = jnp.stack([linear(hidden[:, e], TransposedWeight(down_matrices[e]), x.dtype) for e in range(experts)])
    else:
        y = jax.vmap(dot_in_fixed_order)(jnp.swapaxes(hidden, 0, 1), down_matrices).astype(x.dtype)
    chosen = [jnp.take_along_axis(y, ids[None, :, None], 0, mode="fill", fill_value=0)[0] for ids in topk_ids.T]
    return jnp.stack(chosen, axis=1)


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
