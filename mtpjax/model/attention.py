"""Gated attention: query and gate in one projection, QK norm, partial RoPE, grouped queries, sigmoid output gate.

Keys and values are written to the cache first, and attention then reads the cache.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.attention import QkvProjections, attention, norm_rope_update_cache
from kernels_pallas.matmul import linears_split_k
from kernels_pallas.partial_sums import PartialSums
from mtpjax.config import ModelConfig
from mtpjax.model.params import ParamFactory
from mtpjax.model.positions import Positions

KVCache = tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]]  # keys and values of all layers


class Attention(nnx.Module):
    """Weights of one gated attention layer (or a stack of them)."""

    def __init__(self, cfg: ModelConfig, make: ParamFactory) -> None:
        self.cfg = cfg
        width = cfg.q_heads * cfg.head_dim
        self.q = make.matrix(2 * width, cfg.hidden_size)  # per head: query rows, then gate rows
        self.k = make.matrix(cfg.kv_heads * cfg.head_dim, cfg.hidden_size)
        self.v = make.matrix(cfg.kv_heads * cfg.head_dim, cfg.hidden_size)
        self.o = make.matrix(cfg.hidden_size, width)
        self.q_norm = make.vector(cfg.head_dim)
        self.k_norm = make.vector(cfg.head_dim)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: KVCache,
        layer: Int[Array, ""] | int,
        positions: Positions,
        num_output_rows: int,
    ) -> tuple[PartialSums, KVCache]:
        """Write keys and values of all rows to the cache, and attend with the last rows.

        Args:
            x: normalised rows.
            cache: keys and values of all layers.
            layer: index of this layer in the cache.
            positions: positions of the rows.
            num_output_rows: R, how many of the last rows have queries and outputs. With 0 only the cache is updated.

        Returns:
            the output `[P, B * R, D]` and the new cache.
        """
        cfg, rows = self.cfg, x.shape[1]
        last_x, last = x[:, rows - num_output_rows :], positions.last(num_output_rows)
        # Queries of all rows share one launch with keys and values.
        shared = [self.q[...]] if num_output_rows == rows else []
        k, v, *q_gate = linears_split_k(x, self.k[...], self.v[...], *shared)
        if 0 < num_output_rows < rows:
            q_gate = linears_split_k(last_x, self.q[...])
        projections = QkvProjections(k, v, q_gate[0] if num_output_rows else None)
        q, cache = norm_rope_update_cache(
            projections,
            self.k_norm[...],
            self.q_norm[...],
            positions.rope,
            cache,
            layer,
            positions.positions,
            positions.valid,
            eps=cfg.norm_eps,
            dtype=x.dtype,
            implementation=positions.implementation,
        )
        if q is None:
            return PartialSums(jnp.zeros((1, 0, cfg.hidden_size), x.dtype)), cache
        out = attention(
            q,
            *cache,
            layer,
            last.positions,
            last.valid,
            q_gate[0],
            num_kv_blocks=positions.kv_blocks,
            is_prompt=positions.is_prompt,
            implementation=positions.implementation,
        )
        return linears_split_k(out.reshape(*last_x.shape[:2], -1), self.o[...])[0], cache
