"""The two feed-forward blocks: Mixture-of-Experts with a gated shared expert, and dense SwiGLU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float

from kernels_pallas.grouped_matmul import expert_mlp
from kernels_pallas.matmul import linear
from mtpjax.config import ModelConfig
from mtpjax.model.params import Shapes


class Mlp(nnx.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, cfg: ModelConfig, new: Shapes, size: int):
        self.gate = new.matrix(size, cfg.hidden_size)
        self.up = new.matrix(size, cfg.hidden_size)
        self.down = new.matrix(cfg.hidden_size, size)

    def __call__(self, x: Float[Array, "B T D"], layer: Array | int = 0, live: Array | None = None) -> Array:
        gate = linear(x, self.gate[...], out_dtype=jnp.float32)
        up = linear(x, self.up[...], out_dtype=jnp.float32)
        return linear((jax.nn.silu(gate) * up).astype(x.dtype), self.down[...])


class Moe(nnx.Module):
    """softmax over all experts -> top k -> renormalise; the shared expert always runs, behind a sigmoid gate per row."""

    def __init__(self, cfg: ModelConfig, new: Shapes):
        self.cfg = cfg
        self.router = new.matrix(cfg.experts, cfg.hidden_size)
        self.gate_up = new.experts(cfg.experts, 2 * cfg.expert_size, cfg.hidden_size)
        self.down = new.experts(cfg.experts, cfg.hidden_size, cfg.expert_size)
        self.shared = Mlp(cfg, new, cfg.shared_expert_size)
        self.shared_gate = new.matrix(1, cfg.hidden_size)

    def route(self, x: Float[Array, "N D"]) -> tuple[Array, Array, Array]:
        """Weights and indices `[N, K]` of the chosen experts and all probabilities `[N, E]`, float32."""
        p = jax.nn.softmax(linear(x, self.router[...], out_dtype=jnp.float32), axis=-1)
        weights, chosen = lax.top_k(p, self.cfg.experts_per_token)
        return weights / jnp.sum(weights, axis=-1, keepdims=True), chosen, p

    def __call__(self, x: Float[Array, "B T D"], layer: Array | int, live: Bool[Array, "B T"]) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen, _ = self.route(flat)
        index = jnp.asarray(layer, jnp.int32)
        routed = expert_mlp(flat, self.gate_up[...], self.down[...], index, chosen, weights, live.reshape(-1))
        gate = jax.nn.sigmoid(linear(x, self.shared_gate[...], out_dtype=jnp.float32)).astype(x.dtype)
        return routed.reshape(x.shape) + gate * self.shared(x)
