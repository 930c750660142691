"""A variant of the model whose MTP head reads hidden states *before* the norms, to measure what that costs.

The trunk's own logits stay the same. Only the head's inputs change, from the trunk and from the head's own earlier
step.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array

from mtpjax.loading.weight_map import LoadedModel
from mtpjax.model import Model
from mtpjax.model.cache import new_pending
from mtpjax.model.mtp import Mtp
from mtpjax.model.norm import rms_norm


class PreNormMtp(Mtp):
    """An MTP head that returns its rows before `mtp.norm`."""

    def __call__(self, embedded: Any, hidden: Any, cache: Any, where: Any) -> Any:
        x, layer = self._join(embedded, hidden), self.layer
        normed = rms_norm(x, layer.input_norm[...], self.cfg.norm_eps)
        y, _, (k, v) = layer.attention(x, normed, (cache.mtp_k, cache.mtp_v), 0, where, self.norm[...])
        return y, cache.replace(mtp_k=k, mtp_v=v)


class PreNormModel(Model):
    """A model that gives the MTP head rows before the final norm; the norms move into the heads."""

    def final_norm(self, x: Array) -> Array:
        return x

    def trunk_pending(self, tokens: Any, cache: Any, where: Any) -> Any:
        memory = cache, new_pending(self.cfg, *tokens.shape, dtype=cache.conv.dtype)
        rows, _, (cache, pending) = self.decoder(self.embed(tokens, where.live), memory, where, self.norm[...])
        return rows, cache, pending

    def head(self, hidden: Array) -> Array:
        return super().head(super().final_norm(hidden))

    def mtp_head(self, hidden: Array) -> Array:
        return super().head(rms_norm(hidden, self.mtp.norm[...], self.cfg.norm_eps))


def pre_norm(model: LoadedModel) -> LoadedModel:
    """Return the pre-norm variant with the same weights."""
    merged = nnx.merge(model.graph, model.params)
    merged.__class__ = PreNormModel
    merged.mtp.__class__ = PreNormMtp
    graph, params = nnx.split(merged)
    return LoadedModel(model.cfg, graph, params)
