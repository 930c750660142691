"""A variant of the model whose MTP head reads hidden states *before* the norms, to measure what that costs.

The trunk's logits stay the same. Only the input of the MTP head changes, from the trunk and from the head's own
earlier step. Hidden states are twice as wide here, `[normalised, not normalised]`: the LM head reads the first half,
the MTP head the second half.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model import Model, Positions
from mtpjax.model.cache import Cache, PendingDeltaUpdates, new_pending
from mtpjax.model.decoder import LayerState
from mtpjax.model.mtp import MTP_LAYER, Mtp


class PreNormMtp(Mtp):
    """An MTP head that reads the half of its input that is not normalised, and returns both halves."""

    def _combine(
        self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T 2*D"], implementation: str | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        return super()._combine(embedded, hidden[..., embedded.shape[-1] :], implementation)

    def __call__(
        self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T 2*D"], cache: Cache, positions: Positions
    ) -> tuple[Float[Array, "B T 2*D"], Cache]:
        (x, normed), kv_cache = self._combine(embedded, hidden, positions.implementation), (cache.mtp_k, cache.mtp_v)
        y, y_normed, (k, v) = self.layer.run_attention(x, normed, kv_cache, MTP_LAYER, positions, self.norm[...])
        return jnp.concatenate([y_normed, y], axis=-1), cache.replace(mtp_k=k, mtp_v=v)


class PreNormModel(Model):
    """A model that returns both halves of hidden states."""

    def final_norm(self, x: Float[Array, "B T D"], implementation: str | None = None) -> Float[Array, "B T 2*D"]:
        return jnp.concatenate([super().final_norm(x, implementation), x], axis=-1)

    def trunk_pending(
        self,
        tokens: Int[Array, "B W"],
        cache: Cache,
        positions: Positions,
        pending: PendingDeltaUpdates | None = None,
    ) -> tuple[Float[Array, "B W 2*D"], Cache, PendingDeltaUpdates]:
        state = LayerState(cache, new_pending(cache, tokens.shape[1]) if pending is None else pending)
        rows, hidden, state = self.decoder(self.embed(tokens, positions.valid), state, positions, self.norm[...])
        assert state.pending is not None
        return jnp.concatenate([hidden, rows], axis=-1), state.cache, state.pending

    def head(self, hidden: Float[Array, "B R 2*D"]) -> Float[Array, "B R V"]:
        return super().head(hidden[..., : hidden.shape[-1] // 2])


def pre_norm(model: LoadedModel) -> LoadedModel:
    """Return the pre-norm variant with the same weights. Its config names the width of its hidden states."""
    merged = nnx.merge(model.graph, model.params)
    merged.__class__ = PreNormModel
    merged.mtp.__class__ = PreNormMtp
    graph, params = nnx.split(merged)
    return LoadedModel(replace(model.cfg, hidden_size=2 * model.cfg.hidden_size), graph, params)
