"""`Model`: embedding, trunk, final norm, LM head and MTP head."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.matmul import embedding_lookup, linear
from kernels_pallas.norm import rms_norm
from mtpjax.config import ModelConfig
from mtpjax.model.cache import Cache, PendingDeltaUpdates, new_pending
from mtpjax.model.decoder import Decoder, LayerState
from mtpjax.model.mtp import Mtp
from mtpjax.model.params import Dense, ParamFactory, TokenIds
from mtpjax.model.positions import Positions


class Model(nnx.Module):
    """Weights of a Qwen3.5 / Qwen3.6 text model; a new one has only their shapes.

    Split it once, and merge it inside the jitted step.

    Args:
        cfg: sizes of the model.
        dtype: dtype of the matrices. Norms and other vectors are float32.
        compute_dtype: dtype of activations. None: `dtype`.
    """

    def __init__(
        self, cfg: ModelConfig, dtype: DTypeLike = jnp.float32, *, compute_dtype: DTypeLike | None = None
    ) -> None:
        self.cfg = cfg
        self.compute_dtype = jnp.dtype(compute_dtype or dtype)
        make = ParamFactory(dtype)
        self.embedding = make.matrix(cfg.vocab_size, cfg.hidden_size)
        self.decoder = Decoder(cfg, dtype)
        self.norm = make.vector(cfg.hidden_size)
        self.lm_head = None if cfg.tied_embeddings else make.matrix(cfg.vocab_size, cfg.hidden_size)
        self.mtp: Any = Mtp(cfg, dtype) if cfg.mtp_layers else None
        # A `DraftHead`, if drafts come from a part of the vocabulary or the MTP head has an LM head of its own.
        self.draft_head: Any = None
        self.mtp_embedding: Any = None  # a matrix, if the MTP head has an embedding of its own

    def embed(self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up embeddings in the compute dtype. Padding rows are zero, and stay zero through every layer."""
        rows = embedding_lookup(self.embedding[...], tokens, self.compute_dtype)
        return jnp.where(valid[..., None], rows, 0)

    def trunk(
        self, tokens: Int[Array, "B T"], cache: Cache, positions: Positions, num_output_rows: int | None = None
    ) -> tuple[Float[Array, "B R D"], Cache]:
        """Run all layers on rows that are final, such as those of a prompt.

        Args:
            tokens: token ids of the rows.
            cache: state of the sequences.
            positions: positions of the rows.
            num_output_rows: R, how many of the last rows are returned. None: all.

        Returns:
            the last rows *before* the final norm, and the new cache. Its `length` is still the old one.
        """
        embedded, state = self.embed(tokens, positions.valid), LayerState(cache, None)
        rows, _, state = self.decoder(embedded, state, positions, self.norm[...], num_output_rows)
        return rows, state.cache

    def trunk_pending(
        self,
        tokens: Int[Array, "B W"],
        cache: Cache,
        positions: Positions,
        pending: PendingDeltaUpdates | None = None,
    ) -> tuple[Float[Array, "B W D"], Cache, PendingDeltaUpdates]:
        """Run all layers on rows that may yet be rejected.

        Args:
            tokens: token ids of the rows.
            cache: state of the sequences.
            positions: positions of the rows.
            pending: the accepted rows of the window before that the cache lacks. None: it lacks none.

        Returns:
            all rows *after* the final norm, the cache, and the updates of the DeltaNet layers, which `accept` or
            `commit` takes once the number of accepted rows is known.
        """
        pending = new_pending(cache, tokens.shape[1]) if pending is None else pending
        embedded, state = self.embed(tokens, positions.valid), LayerState(cache, pending)
        _, hidden, state = self.decoder(embedded, state, positions, self.norm[...])
        assert state.pending is not None  # every layer returns the kind of state that it received
        return hidden, state.cache, state.pending

    def final_norm(self, x: Float[Array, "B T D"], implementation: str | None = None) -> Float[Array, "B T D"]:
        """Apply the norm that follows the last layer; `implementation` as in `kernels_pallas.norm.rms_norm`."""
        return rms_norm(x, self.norm[...], self.cfg.norm_eps, implementation=implementation)

    def head(self, hidden: Float[Array, "B R D"]) -> Float[Array, "B R V"]:
        """Return float32 logits of rows after the final norm, or draft logits of rows that `mtp_step` returned."""
        weight = self.embedding if self.lm_head is None else self.lm_head
        return linear(hidden, weight[...], out_dtype=jnp.float32)

    @property
    def draft_token_ids(self) -> Int[Array, " N"] | None:
        """Ids of the columns of `draft_logits`, ascending; None: the whole vocabulary."""
        return None if self.draft_head is None else self.draft_head.token_ids[...]

    def draft_logits(self, hidden: Float[Array, "B R D"]) -> Float[Array, "B R N"]:
        """Return float32 logits, of `draft_token_ids` only, of rows that `mtp_step` returned."""
        return self.head(hidden) if self.draft_head is None else self.draft_head(hidden)

    def mtp_sync(
        self, hidden: Float[Array, "B T D"], next_tokens: Int[Array, "B T"], cache: Cache, positions: Positions
    ) -> Cache:
        """Write keys and values of the MTP head for rows whose next tokens are `next_tokens`; see `Mtp.sync`."""
        return self.mtp.sync(self._embed_for_mtp(next_tokens, positions.valid), hidden, cache, positions)

    def mtp_step(
        self, hidden: Float[Array, "B T D"], next_tokens: Int[Array, "B T"], cache: Cache, positions: Positions
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Run the whole MTP head on rows whose next tokens are `next_tokens`; see `Mtp.__call__`."""
        return self.mtp(self._embed_for_mtp(next_tokens, positions.valid), hidden, cache, positions)

    def _embed_for_mtp(self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """Look up the embeddings that the MTP head reads; see `embed`."""
        if self.mtp_embedding is None:
            return self.embed(tokens, valid)
        rows = embedding_lookup(self.mtp_embedding[...], tokens, self.compute_dtype)
        return jnp.where(valid[..., None], rows, 0)


class DraftHead(nnx.Module):
    """A copy of those rows of the LM head that belong to the tokens that drafts come from.

    Args:
        weight: the rows `[N, D]`, plain or packed.
        token_ids: of the rows, int32 `[N]`, ascending.
    """

    def __init__(self, weight: Any, token_ids: Int[Array, " N"]) -> None:
        self.weight = Dense(weight)
        self.token_ids = TokenIds(token_ids)

    def __call__(self, hidden: Float[Array, "B R D"]) -> Float[Array, "B R N"]:
        """Return float32 logits."""
        return linear(hidden, self.weight[...], out_dtype=jnp.float32)


def abstract_model(
    cfg: ModelConfig, dtype: DTypeLike = jnp.float32, *, compute_dtype: DTypeLike | None = None
) -> Model:
    """Return a `Model` of shapes only; nothing is allocated."""
    return Model(cfg, dtype, compute_dtype=compute_dtype)
