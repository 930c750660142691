"""The two feed-forward blocks: Mixture-of-Experts with a gated shared expert, and dense SwiGLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float

from kernels_pallas.grouped_matmul import expert_mlp
from kernels_pallas.matmul import Packed, linear, linears, with_first_in_parts
from kernels_pallas.routing import KERNELS
from kernels_pallas.target import target
from mtpjax.config import ModelConfig
from mtpjax.model.params import Shapes


class Mlp(nnx.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, cfg: ModelConfig, new: Shapes, size: int):
        self.gate = new.matrix(size, cfg.hidden_size)
        self.up = new.matrix(size, cfg.hidden_size)
        self.down = new.matrix(cfg.hidden_size, size)

    def __call__(self, x: Float[Array, "B T D"], layer: Array | int = 0, live: Array | None = None) -> Array:
        gate, up = linears(x, self.gate[...], self.up[...], out_dtypes=[jnp.float32] * 2)
        return self.ending(gate, up, x.dtype)

    def ending(self, gate: Float[Array, "B T I"], up: Float[Array, "B T I"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        """What follows the two projections, whose results are float32."""
        return linear((jax.nn.silu(gate) * up).astype(dtype), self.down[...])


class Moe(nnx.Module):
    """softmax over all experts -> top k -> renormalise; the shared expert always runs, behind a sigmoid gate per row."""

    def __init__(self, cfg: ModelConfig, new: Shapes):
        self.cfg = cfg
        self.router = new.matrix(cfg.experts, cfg.hidden_size)
        self.gate_up = new.experts(cfg.experts, 2 * cfg.expert_size, cfg.hidden_size)
        self.down = new.experts(cfg.experts, cfg.hidden_size, cfg.expert_size)
        self.shared = Mlp(cfg, new, cfg.shared_expert_size)
        self.shared_gate = new.matrix(1, cfg.hidden_size)

    def route(self, logits: Float[Array, "N E"]) -> tuple[Array, Array, Array]:
        """Weights and indices `[N, K]` of the chosen experts and all probabilities `[N, E]`, float32."""
        p = jax.nn.softmax(logits, axis=-1)
        weights, chosen = lax.top_k(p, self.cfg.experts_per_token)
        return weights / jnp.sum(weights, axis=-1, keepdims=True), chosen, p

    def __call__(self, x: Float[Array, "B T D"], layer: Array | int, live: Bool[Array, "B T"]) -> Array:
        flat, index = x.reshape(-1, x.shape[-1]), jnp.asarray(layer, jnp.int32)
        shared, alive = [w[...] for w in (self.shared_gate, self.shared.gate, self.shared.up)], live.reshape(-1)
        kernel = KERNELS.get(target()) if isinstance(shared[-1], Packed) else None  # plain models train, too
        if kernel is None:
            logits, shared_gate, gate, up = linears(x, self.router[...], *shared, out_dtypes=[jnp.float32] * 4)
            weights, chosen, _ = self.route(logits.reshape(-1, self.cfg.experts))
            routed = expert_mlp(flat, self.gate_up[...], self.down[...], index, chosen, weights, alive)
        else:
            parts, (shared_gate, gate, up) = with_first_in_parts(x, self.router[...], *shared)
            weights, chosen = kernel(parts, alive, self.cfg.experts_per_token)  # of dead rows: none there is
            routed = expert_mlp(flat, self.gate_up[...], self.down[...], index, chosen, weights)
        return routed.reshape(x.shape) + jax.nn.sigmoid(shared_gate).astype(x.dtype) * self.shared.ending(gate, up, x.dtype)
