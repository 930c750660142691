"""The Multi-Token-Prediction head: one full-attention layer that reads (next token, trunk hidden) and predicts the token after.

Cache slot t of the head holds the pair (hidden state of row t, token t + 1), at position t. The hidden state is the one
*after* the trunk's final norm, and when the head is applied again, its own output *after* `mtp.norm`.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from kernels_pallas.matmul import linear
from kernels_pallas.norm import add_rms_norm, rms_norm
from mtpjax.config import FULL, ModelConfig
from mtpjax.model.cache import Cache
from mtpjax.model.decoder import Layer
from mtpjax.model.params import ParamFactory
from mtpjax.model.positions import Positions


class Mtp(nnx.Module):
    """Weights of the head; embedding and LM head are the trunk's."""

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype):
        self.cfg = cfg
        new = ParamFactory(dtype)
        self.embed_norm = new.vector(cfg.hidden_size)
        self.hidden_norm = new.vector(cfg.hidden_size)
        self.fc = new.matrix(cfg.hidden_size, 2 * cfg.hidden_size)
        self.layer = Layer(cfg, new, FULL)
        self.norm = new.vector(cfg.hidden_size)

    def _join(self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        eps = self.cfg.norm_eps
        e, h = rms_norm(embedded, self.embed_norm[...], eps), rms_norm(hidden, self.hidden_norm[...], eps)
        return linear(jnp.concatenate([e, h], axis=-1), self.fc[...])  # embedding first

    def sync(
        self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T D"], cache: Cache, positions: Positions
    ) -> Cache:
        """Leave the keys and values of the rows in the cache and nothing else: no query, attention, expert, norm or head.

        Args:
            embedded: embedding of the token *after* each row.
            hidden: trunk hidden state of each row, after the final norm.
        """
        x = rms_norm(self._join(embedded, hidden), self.layer.input_norm[...], self.cfg.norm_eps)
        _, (k, v) = self.layer.mixer(x, (cache.mtp_k, cache.mtp_v), 0, positions, 0)
        return cache.replace(mtp_k=k, mtp_v=v)

    def __call__(
        self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T D"], cache: Cache, positions: Positions
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The whole head for the rows: hidden states after `mtp.norm`, ready for the LM head and for the next step."""
        kv = (cache.mtp_k, cache.mtp_v)
        x = self._join(embedded, hidden)
        norm, implementation = self.layer.input_norm[...], positions.implementation
        _, normed = add_rms_norm(x, None, norm, self.cfg.norm_eps, implementation=implementation)
        _, y, (k, v) = self.layer.attention(x, normed, kv, 0, positions, self.norm[...])
        return y, cache.replace(mtp_k=k, mtp_v=v)
