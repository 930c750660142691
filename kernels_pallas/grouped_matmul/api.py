"""`expert_mlp`: the routed half of a Mixture-of-Experts layer."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.grouped_matmul.plan import choose_block, plan_blocks
from kernels_pallas.grouped_matmul.reference import block_mlp


def expert_mlp(
    x: Float[Array, "N D"],
    gate_up: Float[Array, "P E 2I D"],
    down: Float[Array, "P E D I"],
    layer: Int[Array, ""],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    live: Bool[Array, " N"],
) -> Float[Array, "N D"]:
    """Sum over k of `weights[n, k] * mlp_{chosen[n, k]}(x[n])` with the experts of layer `layer` of the stack.

    Only chosen experts are read, no row is dropped, and a row's result does not depend on the order of the others. Dead
    rows cost nothing and give zero. The routing weight is applied after the down projection, in float32.
    """
    k = chosen.shape[1]
    block = choose_block(x.shape[0], k, gate_up.shape[1])
    plan = plan_blocks(chosen, live, gate_up.shape[1], block)
    rows = x.at[plan.source // k].get(mode="fill", fill_value=0)
    y = block_mlp(rows, gate_up, down, layer, plan.expert, plan.count, block)
    each = y.at[plan.place].get(mode="fill", fill_value=0)  # [N, K, D]
    return jnp.sum(each.astype(jnp.float32) * weights[..., None].astype(jnp.float32), axis=1).astype(x.dtype)
