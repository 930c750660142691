"""Presence, frequency and repetition penalties: logits that depend on the tokens that a text already has.

The logits of a row depend on the prompt, the tokens before the row, and the request. This holds in the drafter and in
the trunk alike, so the text is the same at every draft length and in any batch.
"""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int


class Penalties(struct.PyTreeNode):
    """Penalties of B requests, as OpenAI and vLLM define them; `apply_penalties` has the formula.

    `frequency` has the precision of bfloat16 (`round_to_bfloat16`). Its product with a count is then exact, and a
    compiler that fuses product and sum into one rounding gives the same logits as one that does not.
    """

    presence: Float[Array, " B"]  # 0: none
    frequency: Float[Array, " B"]  # 0: none
    repetition: Float[Array, " B"]  # 1: none


class TokenCounts(struct.PyTreeNode):
    """The tokens that B texts have so far."""

    in_prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]  # how often each token was generated, int32

    def add(self, tokens: Int[Array, "B R"], num_tokens: Int[Array, " B"]) -> TokenCounts:
        """Count the first `num_tokens` of `tokens` as generated."""
        batch, vocab = self.counts.shape
        counted = jnp.arange(tokens.shape[1]) < num_tokens[:, None]
        ids = jnp.where(counted, tokens, vocab)  # an id that does not exist is dropped
        return self.replace(counts=self.counts.at[jnp.arange(batch)[:, None], ids].add(1, mode="drop"))

    def take(self, token_ids: Int[Array, " N"]) -> TokenCounts:
        """Return the columns of these ids; from then on "tokens" are their places among `token_ids`."""
        return TokenCounts(self.in_prompt[:, token_ids], self.counts[:, token_ids])


def round_to_bfloat16(frequency: float) -> float:
    """Return the value that `Penalties.frequency` stores for a frequency penalty."""
    return float(np.asarray(frequency, ml_dtypes.bfloat16))


def apply_penalties(
    logits: Float[Array, "B R V"],
    penalties: Penalties | None,
    token_counts: TokenCounts | None,
    drafts: Int[Array, "B k"] | None = None,
) -> Float[Array, "B R V"]:
    """Return the logits after the penalties, float32; the logits themselves if there are no penalties.

    For a token with logit l that was generated n times:

        l <- l / repetition  if l > 0, else  l * repetition      for tokens in the prompt or with n > 0
        l <- l - frequency * n - presence                        for tokens with n > 0

    The repetition penalty is that of CTRL (Keskar et al. 2019, arXiv:1909.05858), as in transformers and vLLM.

    Args:
        logits: float32; row r follows the text in `token_counts` and the first r of `drafts`.
        token_counts: prompt and text; None: there are no penalties.
        drafts: tokens that the rows after the first have before them; None: none.
    """
    if penalties is None or token_counts is None:
        return logits
    counts = token_counts.counts[:, None]  # [B, R or 1, V]
    if drafts is not None:
        rows = jnp.arange(logits.shape[1]).reshape(-1, 1)
        ids = jnp.arange(logits.shape[2]).reshape(1, -1)
        for j in range(drafts.shape[1]):
            counts = counts + ((drafts[:, j, None, None] == ids) & (rows > j))
    presence, frequency, repetition = (
        x[:, None, None] for x in (penalties.presence, penalties.frequency, penalties.repetition)
    )
    occurs = token_counts.in_prompt[:, None] | (counts > 0)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return jnp.where(occurs, repeated, logits) - jnp.where(counts > 0, frequency * counts + presence, 0)
