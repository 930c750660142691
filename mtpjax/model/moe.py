"""The two feed-forward blocks: Mixture-of-Experts with a gated shared expert, and dense SwiGLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float

from kernels_pallas.grouped_matmul import EACH_KERNELS, expert_mlp
from kernels_pallas.matmul import Packed, fused_linears, linears_split_k
from kernels_pallas.norm import MoeOutput
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import platform
from kernels_pallas.topk_softmax import KERNELS
from mtpjax.config import ModelConfig
from mtpjax.model.params import ParamFactory


class Mlp(nnx.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, cfg: ModelConfig, new: ParamFactory, size: int):
        self.gate = new.matrix(size, cfg.hidden_size)
        self.up = new.matrix(size, cfg.hidden_size)
        self.down = new.matrix(cfg.hidden_size, size)

    def __call__(self, x: Float[Array, "B T D"], layer: Array | int = 0, valid: Array | None = None) -> PartialSums:
        """Return the partial sums `[P, B*T, D]` of the down projection."""
        gate, up = fused_linears(x, self.gate[...], self.up[...], out_dtypes=[jnp.float32] * 2)
        return self.ending(gate, up, x.dtype)

    def ending(self, gate: Float[Array, "B T I"], up: Float[Array, "B T I"], dtype: jnp.dtype) -> PartialSums:
        """What follows the two projections, whose results are float32."""
        return linears_split_k((jax.nn.silu(gate) * up).astype(dtype), self.down[...])[0]


class Moe(nnx.Module):
    """softmax over all experts -> top k -> renormalise; the shared expert always runs, behind a sigmoid gate per row."""

    def __init__(self, cfg: ModelConfig, new: ParamFactory):
        self.cfg = cfg
        self.router = new.matrix(cfg.num_experts, cfg.hidden_size)
        self.gate_up = new.experts(cfg.num_experts, 2 * cfg.expert_size, cfg.hidden_size)
        self.down = new.experts(cfg.num_experts, cfg.hidden_size, cfg.expert_size)
        self.shared = Mlp(cfg, new, cfg.shared_expert_size)
        self.shared_gate = new.matrix(1, cfg.hidden_size)

    def route(self, logits: Float[Array, "N E"]) -> tuple[Array, Array, Array]:
        """Weights and indices `[N, K]` of the chosen experts and all probabilities `[N, E]`, float32."""
        p = jax.nn.softmax(logits, axis=-1)
        weights, chosen = lax.top_k(p, self.cfg.experts_per_token)
        return weights / jnp.sum(weights, axis=-1, keepdims=True), chosen, p

    def __call__(
        self, x: Float[Array, "B T D"], layer: Array | int, valid: Bool[Array, "B T"]
    ) -> PartialSums | MoeOutput:
        """Return the output as partial sums `[P, B*T, D]`, or as the unadded outputs of the experts."""
        flat, index = x.reshape(-1, x.shape[-1]), jnp.asarray(layer, jnp.int32)
        alive, shared = valid.reshape(-1), self.shared
        weights = [w[...] for w in (self.router, self.shared_gate, shared.gate, shared.up)]
        parts = linears_split_k(x, *weights, out_dtypes=[jnp.float32] * 4)
        kernel = KERNELS.get(platform()) if isinstance(weights[-1], Packed) else None  # plain models train, too
        if kernel is None:
            logits, shared_gate, gate, up = (
                y.sum(jnp.float32).reshape(*x.shape[:-1], y.parts.shape[-1]) for y in parts
            )
            weight, chosen, _ = self.route(logits.reshape(-1, self.cfg.num_experts))
            routed = expert_mlp(flat, self.gate_up[...], self.down[...], index, chosen, weight, alive)
            beside = shared.ending(gate, up, x.dtype).sum(x.dtype).reshape(x.shape)
            y = routed.reshape(x.shape) + jax.nn.sigmoid(shared_gate).astype(x.dtype) * beside
            return PartialSums(y.reshape(1, -1, y.shape[-1]))
        logits, shared_gate, gate, up = (y.parts for y in parts)
        weight, chosen, hidden = kernel(
            logits, gate, up, alive, self.cfg.experts_per_token, x.dtype
        )  # of dead rows: none
        each = EACH_KERNELS[platform()](flat, self.gate_up[...], self.down[...], index, chosen, weight)
        return MoeOutput(each, alive, linears_split_k(hidden, shared.down[...])[0], PartialSums(shared_gate))
