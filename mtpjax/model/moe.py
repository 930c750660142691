"""The two feed-forward blocks: Mixture-of-Experts with a gated shared expert, and dense SwiGLU."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from kernels_pallas.activation import silu_and_mul
from kernels_pallas.grouped_matmul import Router, fused_moe_with_router
from kernels_pallas.matmul import fused_linears, linears_split_k
from kernels_pallas.norm import MoeOutput
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.topk_softmax import ExpertChoice, topk_softmax
from mtpjax.config import ModelConfig
from mtpjax.model.params import ParamFactory


class Mlp(nnx.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, cfg: ModelConfig, make: ParamFactory, size: int) -> None:
        self.gate = make.matrix(size, cfg.hidden_size)
        self.up = make.matrix(size, cfg.hidden_size)
        self.down = make.matrix(cfg.hidden_size, size)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Array | int = 0,
        valid: Bool[Array, "B T"] | None = None,
        implementation: str | None = None,
    ) -> PartialSums:
        """Return the partial sums `[P, B*T, D]` of the block's output. Only `Moe` needs the other arguments."""
        gate, up = fused_linears(x, self.gate[...], self.up[...], out_dtypes=[jnp.float32] * 2)
        return self.down_projection(silu_and_mul(gate, up).astype(x.dtype))

    def down_projection(self, hidden: Float[Array, "*rows I"]) -> PartialSums:
        """Return the partial sums of the output for activated hidden units."""
        return linears_split_k(hidden, self.down[...])[0]


class Moe(nnx.Module):
    """Experts chosen for each row by a router, and a shared expert for every row, behind a sigmoid gate.

    The router takes the softmax over all experts, keeps the `experts_per_token` largest and makes their sum 1.
    """

    def __init__(self, cfg: ModelConfig, make: ParamFactory) -> None:
        self.cfg = cfg
        self.router = make.matrix(cfg.num_experts, cfg.hidden_size)
        self.gate_up = make.experts(cfg.num_experts, 2 * cfg.expert_size, cfg.hidden_size)
        self.down = make.experts(cfg.num_experts, cfg.hidden_size, cfg.expert_size)
        self.shared = Mlp(cfg, make, cfg.shared_expert_size)
        self.shared_gate = make.matrix(1, cfg.hidden_size)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Array | int,
        valid: Bool[Array, "B T"],
        implementation: str | None = None,
    ) -> MoeOutput:
        """Return the terms of the block's output, which the reader adds.

        Args:
            layer: which layer of the expert stacks.
            valid: rows that are not padding; the others have no experts.
            implementation: of the choice of experts. "xla" where gradients are wanted; the experts have theirs in every
                implementation.
        """
        rows, valid, shared = x.reshape(-1, x.shape[-1]), valid.reshape(-1), self.shared
        weights = [w[...] for w in (self.router, self.shared_gate, shared.gate, shared.up)]
        logits, shared_gate, gate, up = linears_split_k(x, *weights, out_dtypes=[jnp.float32] * 4)

        def choose() -> tuple[Array, Array, Array]:
            choice = self.route(logits, gate, up, valid, x.dtype, implementation)
            return choice.topk_weights, choice.topk_ids, choice.shared_hidden.reshape(*x.shape[:-1], -1)

        outputs, shared_out = fused_moe_with_router(
            rows,
            self.gate_up[...],
            self.down[...],
            jnp.asarray(layer, jnp.int32),
            Router(logits, gate, up, valid),
            self.cfg.experts_per_token,
            shared.down[...],
            choose,
            implementation=implementation,
        )
        return MoeOutput(outputs, valid, shared_out, shared_gate)

    def route(
        self,
        logits: PartialSums,
        gate: PartialSums,
        up: PartialSums,
        valid: Bool[Array, " rows"],
        dtype: DTypeLike,
        implementation: str | None = None,
    ) -> ExpertChoice:
        """Choose the experts of each row and activate the shared expert. Training patches this method to record it."""
        k = self.cfg.experts_per_token
        return topk_softmax(logits, gate, up, valid, k, dtype, implementation=implementation)
