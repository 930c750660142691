"""`MoeOutput`: what a Mixture-of-Experts block adds to the residual stream, before the terms are added."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from kernels_pallas.grouped_matmul import combine_experts
from kernels_pallas.partial_sums import PartialSums


class MoeOutput(NamedTuple):
    """The chosen experts' outputs (`fused_moe_unreduced`) and the shared expert with its gate, of all rows of a step.

    The kernel that normalises the next rows adds them up as it reads them, which saves a launch and a pass over memory.
    """

    expert_outputs: Float[Array, "rows topk D"]  # float32, times the routing weights; undefined in invalid rows
    valid: Bool[Array, " rows"]
    shared: PartialSums  # [P, rows, D]
    shared_gate: PartialSums  # [P, rows, 1]: logits

    def sum(self, dtype: DTypeLike) -> Float[Array, "rows D"]:
        """Return `sum_k expert_outputs_k + sigmoid(shared_gate) * shared`, rounded to `dtype` after every operation.

        The experts of invalid rows count as zero.
        """
        routed = combine_experts(self.expert_outputs, self.valid, dtype)
        gate = jax.nn.sigmoid(self.shared_gate.sum(jnp.float32)).astype(dtype)
        return routed + gate * self.shared.sum(dtype)
