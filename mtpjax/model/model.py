"""`Model`: embedding, trunk, final norm, LM head and MTP head."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.matmul import embedding_lookup, linear
from kernels_pallas.norm import rms_norm
from mtpjax.config import ModelConfig
from mtpjax.model.cache import Cache, PendingDeltaUpdates, new_pending
from mtpjax.model.decoder import Decoder
from mtpjax.model.mtp import Mtp
from mtpjax.model.params import ParamFactory
from mtpjax.model.positions import Positions


class Model(nnx.Module):
    """Weights of a Qwen3.5 / Qwen3.6 text model. Split it once, merge it inside the jitted step.

    Args:
        dtype: of the matrices (norms and other vectors are float32).
        compute_dtype: of activations; `dtype` unless told.
    """

    def __init__(
        self, cfg: ModelConfig, dtype: jnp.dtype = jnp.float32, *, compute_dtype: jnp.dtype | None = None
    ) -> None:
        self.cfg = cfg
        self.compute_dtype = jnp.dtype(compute_dtype or dtype)
        new = ParamFactory(dtype)
        self.embedding = new.matrix(cfg.vocab_size, cfg.hidden_size)
        self.decoder = Decoder(cfg, dtype)
        self.norm = new.vector(cfg.hidden_size)
        self.lm_head = None if cfg.tied_embeddings else new.matrix(cfg.vocab_size, cfg.hidden_size)
        self.mtp: Any = Mtp(cfg, dtype) if cfg.mtp_layers else None

    def embed(self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embedding rows in the compute dtype, zero where a row is padding (and zero it stays through every layer)."""
        rows = embedding_lookup(self.embedding[...], tokens, self.compute_dtype)
        return jnp.where(valid[..., None], rows, 0)

    def trunk(
        self, tokens: Int[Array, "B T"], cache: Cache, positions: Positions, keep: int | None = None
    ) -> tuple[Float[Array, "B keep D"], Cache]:
        """All layers. Returns the last `keep` rows (all unless told) *before* the final norm and the cache, `length` still
        that of before."""
        rows, _, (cache, _) = self.decoder(
            self.embed(tokens, positions.valid), (cache, None), positions, self.norm[...], keep
        )
        return rows, cache

    def trunk_pending(
        self, tokens: Int[Array, "B W"], cache: Cache, positions: Positions
    ) -> tuple[Array, Cache, PendingDeltaUpdates]:
        """`trunk` for rows that may yet be rejected: DeltaNet layers leave them in `PendingDeltaUpdates`, for `commit`. All rows, *after* the
        final norm."""
        waiting = new_pending(self.cfg, *tokens.shape, dtype=cache.conv.dtype)
        memory = (cache, waiting)
        _, hidden, (cache, pending) = self.decoder(
            self.embed(tokens, positions.valid), memory, positions, self.norm[...]
        )
        assert pending is not None  # what went in comes out
        return hidden, cache, pending

    def final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self.norm[...], self.cfg.norm_eps)

    def head(self, hidden: Float[Array, "B R D"]) -> Float[Array, "B R V"]:
        """Logits, float32, of rows after the final norm."""
        weight = self.embedding if self.lm_head is None else self.lm_head
        return linear(hidden, weight[...], out_dtype=jnp.float32)

    def mtp_sync(
        self, hidden: Float[Array, "B T D"], following: Int[Array, "B T"], cache: Cache, positions: Positions
    ) -> Cache:
        """`Mtp.sync` for rows whose next tokens are `following`."""
        return self.mtp.sync(self.embed(following, positions.valid), hidden, cache, positions)

    def mtp_step(
        self, hidden: Float[Array, "B T D"], following: Int[Array, "B T"], cache: Cache, positions: Positions
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The whole MTP head for rows whose next tokens are `following`."""
        return self.mtp(self.embed(following, positions.valid), hidden, cache, positions)

    def mtp_head(self, hidden: Float[Array, "B R D"]) -> Float[Array, "B R V"]:
        """Draft logits, float32, of rows that `mtp_step` returned: the trunk's LM head."""
        return self.head(hidden)


def abstract_model(
    cfg: ModelConfig, dtype: jnp.dtype = jnp.float32, *, compute_dtype: jnp.dtype | None = None
) -> Model:
    """A `Model` of shapes only; nothing is allocated."""
    return nnx.eval_shape(lambda: Model(cfg, dtype, compute_dtype=compute_dtype))
