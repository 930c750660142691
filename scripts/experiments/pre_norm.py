"""Test-only variant of the model whose MTP head reads hidden states *before* the norms, to measure what that costs.

The trunk's own logits stay the same; only what the head is fed changes, from the trunk and from its own earlier step.
"""

from __future__ import annotations

from flax import nnx
from jax import Array

from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model import Model
from mtpjax.model.cache import new_pending
from mtpjax.model.mtp import Mtp
from mtpjax.model.norm import rms_norm


class PreNormMtp(Mtp):
    """Hands on its rows before `mtp.norm`."""

    def __call__(self, embedded, hidden, cache, where):  # type: ignore[no-untyped-def]
        x, layer = self._join(embedded, hidden), self.layer
        normed = rms_norm(x, layer.input_norm[...], self.cfg.norm_eps)
        y, _, (k, v) = layer.attention(x, normed, (cache.mtp_k, cache.mtp_v), 0, 0, where, self.norm[...])
        return y, cache.replace(mtp_k=k, mtp_v=v)


class PreNormModel(Model):
    """Hands the MTP head rows before the final norm; the norms move into the heads."""

    def final_norm(self, x: Array) -> Array:
        return x

    def trunk_pending(self, tokens, cache, where):  # type: ignore[no-untyped-def]
        memory = cache, new_pending(self.cfg, *tokens.shape, dtype=cache.conv.dtype)
        rows, _, (cache, pending) = self.decoder(self.embed(tokens, where.live), memory, where, self.norm[...])
        return rows, cache, pending

    def head(self, hidden: Array) -> Array:
        return super().head(super().final_norm(hidden))

    def mtp_head(self, hidden: Array) -> Array:
        return super().head(rms_norm(hidden, self.mtp.norm[...], self.cfg.norm_eps))


def pre_norm(model: LoadedModel) -> LoadedModel:
    """The same weights in the pre-norm variant."""
    merged = nnx.merge(model.graph, model.params)
    merged.__class__ = PreNormModel
    merged.mtp.__class__ = PreNormMtp
    graph, params = nnx.split(merged)
    return LoadedModel(model.cfg, graph, params)
