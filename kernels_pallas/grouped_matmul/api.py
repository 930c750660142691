"""`expert_mlp`: the routed half of a Mixture-of-Experts layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.grouped_matmul import triton
from kernels_pallas.grouped_matmul.plan import choose_windows, plan_windows
from kernels_pallas.grouped_matmul.reference import Experts, all_experts_mlp, window_mlp
from kernels_pallas.platform import platform
from kernels_pallas.weights.quantized import QuantizedTensor
from kernels_pallas.weights.transposed import FusedExperts, TransposedWeight

ALL_EXPERTS_ROWS = range(2, 65)  # for which small experts are all multiplied: one row reads too few, more want windows

# Platform -> kernels with the signature of `expert_mlp`, and of `triton.each_expert`. Elsewhere: `lax`.
KERNELS: dict[str, Callable[..., Array]] = {"cuda": triton.grouped_mlp}
EACH_KERNELS: dict[str, Callable[..., Array]] = {"cuda": triton.each_expert}


def expert_mlp(
    x: Float[Array, "N D"],
    gate_up: Experts,
    down: Experts,
    layer: Int[Array, ""],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    live: Bool[Array, " N"] | None = None,
) -> Float[Array, "N D"]:
    """Sum over k of `weights[n, k] * mlp_{chosen[n, k]}(x[n])` with the experts of layer `layer` of the stack.

    The stacks are `[P, E, 2 I, D]` (gate rows, then up rows) and `[P, E, D, I]`, plain or packed. Only chosen experts
    are read, no row is dropped, and a row's result does not depend on the order of the others. Dead rows cost nothing
    and give zero; without `live` they are those that chose expert E, which there is not. The routing weight is applied
    after the down projection, in float32. Small experts that lie abreast are all read by a few rows, and the routing
    weight is applied before the down projection.
    """
    kernel = KERNELS.get(platform())
    if kernel is None:
        live = chosen[:, 0] < gate_up.shape[1] if live is None else live
        if isinstance(gate_up, FusedExperts) and isinstance(down, TransposedWeight) and x.shape[0] in ALL_EXPERTS_ROWS:
            mine = (chosen[..., None] == jnp.arange(gate_up.shape[1])) & live[:, None, None]
            return all_experts_mlp(x, gate_up, down, layer, jnp.sum(jnp.where(mine, weights[..., None], 0), axis=1))
        return _windows(x, gate_up, down, layer, chosen, weights, live)
    if isinstance(gate_up, QuantizedTensor) or isinstance(down, QuantizedTensor):
        return kernel(x, gate_up, down, layer, chosen, weights, live)
    return _plain(kernel, x, gate_up, down, layer, chosen, weights, live)


def _windows(
    x: Array,
    gate_up: Experts,
    down: Experts,
    layer: Array,
    chosen: Array,
    weights: Array,
    live: Array,
) -> Array:
    k = chosen.shape[1]
    sizes = choose_windows(x.shape[0], k, gate_up.shape[1])
    plan = plan_windows(chosen, live, gate_up.shape[1], sizes)
    rows = x.at[plan.source // k].get(mode="fill", fill_value=0)
    y = window_mlp(rows, gate_up, down, layer, plan.expert, plan.start, plan.first, sizes)
    out = jnp.zeros(x.shape, jnp.float32)
    for i in range(k):  # not one gather of [N, K, D], which would be written to memory first
        each = y.at[plan.place[:, i]].get(mode="fill", fill_value=0)
        out = out + each.astype(jnp.float32) * weights[:, i, None].astype(jnp.float32)
    return out.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plain(kernel: Callable[..., Array], *args: Array) -> Array:
    """A kernel on plain stacks; its gradient is that of `_windows`, so that a model trains on a GPU too."""
    return kernel(*args)


_plain.defvjp(
    lambda kernel, *args: (kernel(*args), args),
    lambda kernel, args, grad: jax.vjp(_windows, *args)[1](grad),
)
