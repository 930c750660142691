"""Allowed tokens, biases, bad words and minimal lengths: logits that some tokens lose, as vLLM defines it.

The logits of a row depend on the request and on the generated tokens before the row. This holds in the drafter and in
the trunk alike, so the text is the same at every draft length and in any batch.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

# How many bad words a request can have, and tokens of each. A program is compiled for each that is used.
BAD_WORD_CAPACITIES = ((8, 4), (32, 8), (128, 32))
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = BAD_WORD_CAPACITIES[-1]
NO_TOKEN = -1  # fills places without a token


class Forbidden(struct.PyTreeNode):
    """Tokens that B requests may not generate at some places."""

    min_tokens: Int[Array, " B"]  # `stop_token_ids` are forbidden until this many tokens are generated
    stop_token_ids: Int[Array, "B STOPS"]  # NO_TOKEN where unused
    bad_words: Int[Array, "B N L"]  # token sequences, at the end of the axis; NO_TOKEN in front, and where unused


class Constraints(struct.PyTreeNode):
    """What `apply_constraints` does to the logits of B requests. A part is None if no request needs it."""

    bias: Float[Array, "B V"] | None = None  # added to the logits; -inf for tokens that are not allowed
    forbidden: Forbidden | None = None
    token_ids: Int[Array, " N"] | None = None  # the ids of the columns, ascending; None: all

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that are there, with sizes: a program is compiled for each combination in use."""
        bias = () if self.bias is None else ("logit_bias",)
        if self.forbidden is None:
            return bias
        number, length = self.forbidden.bad_words.shape[1:]
        return (*bias, f"bad_words_{number}x{length}")

    def take(self, token_ids: Int[Array, " N"]) -> Constraints:
        """Return the constraints for logits of these ids only."""
        return self.replace(bias=None if self.bias is None else self.bias[:, token_ids], token_ids=token_ids)


class RecentTokens(struct.PyTreeNode):
    """The last tokens that B texts have so far, without the prompt, as ids of the whole vocabulary."""

    tokens: Int[Array, "B H"]  # the latest is the last; NO_TOKEN in front of the first
    num_tokens: Int[Array, " B"]  # all that were generated
    token_ids: Int[Array, " N"] | None = None  # ids of the columns that `add` gets; None: it gets ids

    def add(self, tokens: Int[Array, "B R"], num_tokens: Int[Array, " B"]) -> RecentTokens:
        """Append the first `num_tokens` of `tokens`."""
        if self.token_ids is not None:
            tokens = self.token_ids[tokens]
        joined = jnp.concatenate([self.tokens, tokens], axis=1)
        last = num_tokens[:, None] + jnp.arange(self.tokens.shape[1])
        recent = jnp.take_along_axis(joined, last, axis=1)
        return self.replace(tokens=recent, num_tokens=self.num_tokens + num_tokens)

    def take(self, token_ids: Int[Array, " N"]) -> RecentTokens:
        """Return the same for a part of the vocabulary; from then on `add` gets places among `token_ids`."""
        return self.replace(token_ids=token_ids)


def apply_constraints(
    logits: Float[Array, "B R V"],
    constraints: Constraints | None,
    recent_tokens: RecentTokens | None,
    drafts: Int[Array, "B k"] | None = None,
    *,
    is_masked: bool = False,
) -> Float[Array, "B R V"]:
    """Return the logits after the constraints, float32; the logits themselves if there are none.

    In this order, which is that of vLLM's sampler up to the place of the bias, where the order changes nothing:

        tokens outside the allowed ones get -inf, and others their bias
        a token that ends a bad word gets -inf, if the generated tokens before the row end with the rest of that word
        stop tokens get -inf while fewer than `min_tokens` tokens are generated

    Where bad words and stop tokens leave no allowed token, they do not count in that row: the allowed tokens do.

    Args:
        logits: float32; row r follows the text in `recent_tokens` and the first r of `drafts`.
        constraints: of the requests.
        recent_tokens: of the text; None if nothing is forbidden by it.
        drafts: tokens that the rows after the first have before them; None: none.
        is_masked: some logits may be -inf already, because a structured output forbids the token.
    """
    if constraints is None:
        return logits
    if constraints.bias is not None:
        logits = logits + constraints.bias[:, None]
    if constraints.forbidden is None or recent_tokens is None:
        return logits
    batch, num_rows, num_columns = logits.shape
    ids = _forbidden_ids(constraints.forbidden, recent_tokens, drafts, num_rows)
    columns = ids if constraints.token_ids is None else _places(ids, constraints.token_ids)
    columns = jnp.where(columns == NO_TOKEN, num_columns, columns)  # a column that does not exist is dropped
    b, r = jnp.arange(batch)[:, None, None], jnp.arange(num_rows)[:, None]
    masked = logits.at[b, r, columns].set(-jnp.inf, mode="drop")
    if constraints.bias is None and not is_masked:  # without allowed tokens something is always left
        return masked
    nothing_left = jnp.max(masked, axis=-1, keepdims=True) == -jnp.inf
    return jnp.where(nothing_left, logits, masked)


def _forbidden_ids(
    forbidden: Forbidden, recent_tokens: RecentTokens, drafts: Int[Array, "B k"] | None, num_rows: int
) -> Int[Array, "B R N"]:
    """Return the ids that are forbidden in each row; NO_TOKEN where there are fewer."""
    tokens = recent_tokens.tokens
    if drafts is not None:
        tokens = jnp.concatenate([tokens, drafts], axis=1)
    num_before = jnp.minimum(jnp.arange(num_rows), 0 if drafts is None else drafts.shape[1])  # drafts before a row
    prefixes, last = forbidden.bad_words[..., :-1], forbidden.bad_words[..., -1]
    length = prefixes.shape[-1]
    places = recent_tokens.tokens.shape[1] - length + num_before[:, None] + jnp.arange(length)
    before = tokens[:, places]  # [B, R, length]
    same = (prefixes[:, None] == before[:, :, None]) | (prefixes[:, None] == NO_TOKEN)
    words = jnp.where(jnp.all(same, axis=-1), last[:, None], NO_TOKEN)
    too_early = recent_tokens.num_tokens[:, None] + num_before < forbidden.min_tokens[:, None]
    stops = jnp.where(too_early[:, :, None], forbidden.stop_token_ids[:, None], NO_TOKEN)
    return jnp.concatenate([words, stops], axis=-1)


def _places(ids: Int[Array, "B R N"], token_ids: Int[Array, " columns"]) -> Int[Array, "B R N"]:
    """Return the place of each id among `token_ids`; NO_TOKEN where it is not among them."""
    places = jnp.minimum(jnp.searchsorted(token_ids, ids), token_ids.shape[0] - 1)
    return jnp.where(token_ids[places] == ids, places, NO_TOKEN)
