"""Gated DeltaNet (arXiv:2412.06464): the linear-attention layer, from its projections to its output."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.gated_delta_rule import (
    DeltaProjections,
    DeltaState,
    DeltaWeights,
    GatedNorm,
    PendingDeltaUpdates,
    chunk_gated_delta_rule,
    recurrent_gated_delta_rule,
)
from kernels_pallas.matmul import linears_split_k
from kernels_pallas.norm import gated_rms_norm
from kernels_pallas.partial_sums import PartialSums
from mtpjax.config import ModelConfig
from mtpjax.model.cache import Cache
from mtpjax.model.params import ParamFactory
from mtpjax.model.positions import Positions


class DeltaNet(nnx.Module):
    """Weights of one Gated DeltaNet layer."""

    def __init__(self, cfg: ModelConfig, make: ParamFactory) -> None:
        self.cfg = cfg
        self.in_qkv = make.matrix(cfg.conv_channels, cfg.hidden_size)
        self.in_z = make.matrix(cfg.value_size, cfg.hidden_size)
        self.in_b = make.matrix(cfg.linear_v_heads, cfg.hidden_size)
        self.in_a = make.matrix(cfg.linear_v_heads, cfg.hidden_size)
        self.conv = make.vector(cfg.conv_channels, cfg.conv_width)  # tap `width - 1` belongs to the row itself
        self.a_log = make.vector(cfg.linear_v_heads)
        self.dt_bias = make.vector(cfg.linear_v_heads)
        self.norm = make.vector(cfg.linear_v_dim)  # plain weight, not zero-centred
        self.out = make.matrix(cfg.hidden_size, cfg.value_size)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        pending: PendingDeltaUpdates | None,
        layer: Int[Array, ""] | int,
        positions: Positions,
    ) -> tuple[PartialSums, Cache, PendingDeltaUpdates | None]:
        """Run one layer on normalised rows.

        Args:
            cache: the memory of all layers.
            pending: None for the rows of a prompt, which enter the state in the cache. For a verify window, the updates
                of the window before; the rows wait there for `accept`, outside of the cache.
            layer: index of the layer among the DeltaNet layers.
            positions: positions of the rows, which of them are padding, and the implementation of the ops.

        Returns:
            partial sums `[P, B * T, D]` of the output, which is to be added to the residual stream; the cache; and the
            pending rows.
        """
        cfg, f32, implementation = self.cfg, jnp.float32, positions.implementation
        matrices, dtypes = (self.in_qkv, self.in_z, self.in_b, self.in_a), (x.dtype, x.dtype, f32, f32)
        qkv, z, b, a = linears_split_k(x, *(w[...] for w in matrices), out_dtypes=dtypes)
        projections, state = DeltaProjections(qkv, b, a), DeltaState(cache.conv, cache.state)
        weights = DeltaWeights(self.conv[...], self.a_log[...], self.dt_bias[...])
        where: Any = {"layer": layer, "pad": positions.pad, "valid": positions.valid}
        how: Any = {"dtype": x.dtype, "implementation": implementation}
        norm = GatedNorm(z, self.norm[...], cfg.norm_eps, cfg.output_gate_act)
        if pending is None:
            o, state = chunk_gated_delta_rule(projections, weights, state, **where, **how)
            y = gated_rms_norm(o.reshape(-1, *o.shape[2:]), *norm, implementation=implementation)
        else:
            y, state, pending = recurrent_gated_delta_rule(
                projections, weights, state, pending, **where, norm=norm, **how
            )
        cache = cache.replace(state=state.recurrent, conv=state.conv)
        return linears_split_k(y.reshape(*x.shape[:2], -1), self.out[...])[0], cache, pending
