"""Presence, frequency and repetition penalties: logits changed by the tokens that a text already has.

A row's logits depend on the prompt, the tokens before the row and the request, in drafter and trunk alike: the text stays
the same at every draft length, and in any batch.
"""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int


class Penalties(struct.PyTreeNode):
    """Of B requests, as OpenAI and vLLM define them.

    A frequency has the precision of bfloat16 (`round_to_bfloat16`): times a count it is exact then, and a compiler that contracts product
    and sum gives the same logits as one that does not.
    """

    presence: Float[Array, " B"]  # 0: none
    frequency: Float[Array, " B"]  # 0: none
    repetition: Float[Array, " B"]  # 1: none


class TokenCounts(struct.PyTreeNode):
    """The tokens of B texts."""

    prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]  # of the generated tokens, int32

    def add(self, tokens: Int[Array, "B R"], count: Int[Array, " B"]) -> TokenCounts:
        """With the first `count` of `tokens` generated."""
        batch, vocab = self.counts.shape
        at = jnp.where(jnp.arange(tokens.shape[1]) < count[:, None], tokens, vocab)
        return self.replace(counts=self.counts.at[jnp.arange(batch)[:, None], at].add(1, mode="drop"))


def round_to_bfloat16(frequency: float) -> float:
    """The nearest value that `Penalties.frequency` can have."""
    return float(np.asarray(frequency, ml_dtypes.bfloat16))


def apply_penalties(
    logits: Float[Array, "B R V"],
    penalties: Penalties | None,
    seen: TokenCounts | None,
    drafts: Int[Array, "B k"] | None = None,
) -> Float[Array, "B R V"]:
    """The logits after the penalties, float32; unchanged where there are none.

    With l the logit of a token and n how often it was generated: l / repetition if l > 0, else l * repetition, for
    tokens of prompt and text (Keskar et al. 2019, CTRL; as transformers and vLLM); minus frequency * n, minus presence if n > 0.

    Args:
        drafts: row r comes after the first r of them as well.
    """
    if penalties is None or seen is None:
        return logits
    counts = seen.counts[:, None]
    if drafts is not None:
        row, token = (
            jnp.arange(n).reshape(shape) for n, shape in ((logits.shape[1], (-1, 1)), (logits.shape[2], (1, -1)))
        )
        for j in range(drafts.shape[1]):
            counts = counts + ((drafts[:, j, None, None] == token) & (row > j))
    presence, frequency, repetition = (
        p[:, None, None] for p in (penalties.presence, penalties.frequency, penalties.repetition)
    )
    known = seen.prompt[:, None] | (counts > 0)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return jnp.where(known, repeated, logits) - jnp.where(counts > 0, frequency * counts + presence, 0)
