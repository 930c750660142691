"""The Multi-Token-Prediction (MTP) head: one attention layer that predicts the token after the next one.

It reads pairs of a trunk hidden state and the token that follows it (DeepSeek-V3, arXiv:2412.19437, section 2.2).
Position t of the head's keys and values holds the pair (hidden state of row t, token t + 1). The hidden state is the
one *after* the trunk's final norm. Applied again, the head reads its own output *after* `mtp.norm` in its place.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from kernels_pallas.matmul import linears_split_k
from kernels_pallas.norm import concatenated_rms_norm, sum_rms_norm
from mtpjax.config import FULL, ModelConfig
from mtpjax.model.cache import Cache
from mtpjax.model.decoder import Layer
from mtpjax.model.params import ParamFactory
from mtpjax.model.positions import Positions

MTP_LAYER = 0  # index of the head's layer in its own keys and values


class Mtp(nnx.Module):
    """Weights of the head. It shares the embedding and the LM head with the trunk."""

    def __init__(self, cfg: ModelConfig, dtype: DTypeLike) -> None:
        self.cfg = cfg
        make = ParamFactory(dtype)
        self.embed_norm = make.vector(cfg.hidden_size)
        self.hidden_norm = make.vector(cfg.hidden_size)
        self.fc = make.matrix(cfg.hidden_size, 2 * cfg.hidden_size)
        self.layer = Layer(cfg, make, FULL)
        self.norm = make.vector(cfg.hidden_size)

    def _combine(
        self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T D"], implementation: str | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Return `fc [norm(embedded), norm(hidden)]`, the input of the head's layer, and the same after its input norm.

        The embedding comes first.
        """

        how: Any = {"implementation": implementation}
        pair = concatenated_rms_norm(
            (embedded, hidden), (self.embed_norm[...], self.hidden_norm[...]), self.cfg.norm_eps, **how
        )
        [product] = linears_split_k(pair, self.fc[...])
        x, normed = sum_rms_norm(product, self.layer.input_norm[...], self.cfg.norm_eps, hidden.dtype, **how)
        return x.reshape(hidden.shape), normed.reshape(hidden.shape)

    def sync(
        self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T D"], cache: Cache, positions: Positions
    ) -> Cache:
        """Write the keys and values of the rows to the cache: no query, attention, expert, final norm or LM head.

        Args:
            embedded: embedding of the token *after* each row.
            hidden: trunk hidden state of each row, after the final norm.
            cache: its `mtp_k` and `mtp_v` change.
            positions: positions of the rows in the head's cache.
        """
        _, normed = self._combine(embedded, hidden, positions.implementation)
        _, (k, v) = self.layer.mixer(normed, (cache.mtp_k, cache.mtp_v), MTP_LAYER, positions, 0)
        return cache.replace(mtp_k=k, mtp_v=v)

    def __call__(
        self, embedded: Float[Array, "B T D"], hidden: Float[Array, "B T D"], cache: Cache, positions: Positions
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Run the whole head; arguments are those of `sync`.

        Returns:
            hidden states after `mtp.norm`, ready for the LM head and for the next step of the head; and the new cache.
        """
        kv_cache = (cache.mtp_k, cache.mtp_v)
        x, normed = self._combine(embedded, hidden, positions.implementation)
        _, y, (k, v) = self.layer.run_attention(x, normed, kv_cache, MTP_LAYER, positions, self.norm[...])
        return y, cache.replace(mtp_k=k, mtp_v=v)
