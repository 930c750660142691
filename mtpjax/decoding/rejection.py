"""The classical rule of speculative sampling: a draft x is accepted with probability min(1, p(x) / q(x)).

p is the trunk's distribution of a row and q the one that the draft was drawn from, both after penalties, temperature,
top-k, top-p and min-p. At the first draft that is not accepted the token is drawn from the positive part of p - q,
normalised; after the last draft, if all were accepted, from p. Tokens then follow p exactly, whatever q is (Leviathan
et al., arXiv:2211.17192, theorem 1; Chen et al., arXiv:2302.01318). At T = 0 both are certain of one token, and a draft
is accepted if it is the trunk's.

The proof needs independent random numbers for three things: to draw a draft, to accept it, and to draw the token in its
place. Each is a function of (seed, position, salt). A position uses those of the round that decides its token; drafts
that a round throws away have influenced nothing, so a later round may draw with their numbers again. The text is hence
a function of the request and of the number of drafts. In contrast to the coupled rule of `sampling.py` another number
of drafts gives another text, of the same distribution.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, UInt32

from kernels_pallas.row_ops import argmax, map_rows
from mtpjax.decoding.sampling import (
    BatchSamplingParams,
    TruncationParams,
    VocabSubset,
    apply_top_k_top_p_min_p,
    gumbel_noise,
)

DRAFT_SALT, UNIFORM_SALT = 0xD4AF7, 0xACCE97  # keep these random numbers apart from the noise of the trunk's tokens


def rejection_rule(
    drafts: Int[Array, "B k"], tokens: Int[Array, "B W"], position: Int[Array, " B"], sampling_params: Any
) -> Int[Array, " B"]:
    """Name this rule where an `Acceptance` is expected. It needs distributions, so the loop calls `accept_or_resample`.

    Raises:
        TypeError: always.
    """
    raise TypeError("the rejection rule cannot decide from tokens alone; call accept_or_resample")


def _salted_key(seed: UInt32[Array, ""], salt: int, position: Int[Array, ""]) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), salt), position)


def draft_noise(seed: UInt32[Array, ""], position: Int[Array, ""], num_logits: int) -> Float[Array, " N"]:
    """Return the drafter's own Gumbel noise for the token at `position`, float32; not that of the trunk."""
    return jax.random.gumbel(_salted_key(seed, DRAFT_SALT, position), (num_logits,))


def filter_logits(
    logits: Float[Array, "B R V"],
    sampling_params: BatchSamplingParams,
    vocab_size: int,
    subset: VocabSubset | None = None,
) -> Float[Array, "B R V"]:
    """Return the logits, with -inf for tokens that are not sampled from.

    Args:
        vocab_size: ids from here on do not exist.
        subset: the ids of the columns, if they are not the whole vocabulary.
    """
    if subset is None and vocab_size < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    truncation, temperature = sampling_params.truncation, sampling_params.temperature
    if truncation is None or not logits.shape[1]:
        return logits

    def truncate(logits: Array) -> Array:
        def rows(rows: Array, sequences: tuple[Array, TruncationParams]) -> Array:
            return apply_top_k_top_p_min_p(rows, *sequences)

        return map_rows(rows, logits, (temperature, truncation))

    is_needed = (temperature > 0) & ((truncation.top_k > 0) | (truncation.top_p < 1) | (truncation.min_p > 0))
    return lax.cond(jnp.any(is_needed), truncate, lambda logits: logits, logits)


def probabilities(filtered: Float[Array, "B R V"], temperature: Float[Array, " B"]) -> Float[Array, "B R V"]:
    """Return the distribution of each row, float32: softmax(filtered / T), at T = 0 all of it on the largest logit."""
    if not filtered.shape[1]:
        return filtered

    def rows(filtered: Array, temperature: Array) -> Array:
        t = temperature[:, None]
        greedy = jnp.arange(filtered.shape[-1]) == argmax(filtered)[:, None]
        return jnp.where(t > 0, jax.nn.softmax(filtered / jnp.where(t > 0, t, 1), axis=-1), greedy)

    return map_rows(rows, filtered, temperature)


def sample_draft(
    logits: Float[Array, "B 1 N"],
    positions: Int[Array, "B 1"],
    sampling_params: BatchSamplingParams,
    vocab_size: int,
    subset: VocabSubset | None = None,
) -> tuple[Int[Array, "B 1"], Float[Array, "B V"]]:
    """Draw the draft of one row with the drafter's own noise.

    Returns:
        its column (its id, without a subset), and the filtered logits of the whole vocabulary, -inf outside the subset.
    """
    filtered = filter_logits(logits, sampling_params, vocab_size, subset)[:, 0]
    noise = jax.vmap(draft_noise, (0, 0, None))(sampling_params.seed, positions[:, 0], filtered.shape[1])
    column = argmax(filtered + sampling_params.temperature[:, None] * noise).astype(jnp.int32)
    if subset is not None:
        nowhere = jnp.full((filtered.shape[0], subset.num_logits), -jnp.inf, filtered.dtype)
        filtered = nowhere.at[:, subset.token_ids].set(filtered)
    return column[:, None], filtered


def accept_draft(p: Float[Array, "B k"], q: Float[Array, "B k"], uniform: Float[Array, "B k"]) -> Bool[Array, "B k"]:
    """Return which drafts are accepted if all before them are; p and q are their probabilities, `uniform` in [0, 1)."""
    return uniform * q < p


def residual(p: Float[Array, "B V"], q: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Return what the token in place of a draft that was not accepted is drawn from, up to its sum.

    p itself if p - q has no positive part: then only rounding can have rejected the draft.
    """
    positive = jnp.maximum(p - q, 0)
    return jnp.where(jnp.any(positive > 0, axis=-1, keepdims=True), positive, p)


def decide(
    p: Float[Array, "B W V"],
    q: Float[Array, "B k V"],
    drafts: Int[Array, "B k"],
    uniform: Float[Array, "B k"],
    max_accepted: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, "B V"]]:
    """Return how many drafts are accepted, int32, and what the token after them is drawn from, up to its sum.

    Args:
        p: the trunk's distributions.
        q: the drafter's.
        uniform: random numbers in [0, 1).
        max_accepted: drafts from here on do not exist for a request, 0...k.
    """
    k = drafts.shape[1]

    def of_drafts(x: Array) -> Array:
        return jnp.take_along_axis(x, drafts[:, :, None], axis=2)[:, :, 0]

    is_accepted = accept_draft(of_drafts(p[:, :k]), of_drafts(q), uniform) & (jnp.arange(k) < max_accepted[:, None])
    num_accepted = jnp.sum(jnp.cumprod(is_accepted.astype(jnp.int32), axis=1), axis=1)

    def row(x: Array) -> Array:
        return jnp.take_along_axis(x, num_accepted[:, None, None], axis=1)[:, 0]

    was_rejected = num_accepted < max_accepted
    q_row = row(jnp.concatenate([q, jnp.zeros_like(p[:, :1])], axis=1))
    return num_accepted, residual(row(p), jnp.where(was_rejected[:, None], q_row, 0))


def accept_or_resample(
    logits: Float[Array, "B W V"],
    drafts: Int[Array, "B k"],
    draft_logits: Float[Array, "B k V"],
    positions: Int[Array, "B W"],
    sampling_params: BatchSamplingParams,
    vocab_size: int,
) -> tuple[Int[Array, "B W"], Int[Array, " B"]]:
    """Decide about the drafts of a window, and draw the token after the accepted ones.

    Args:
        logits: the trunk's, float32, after penalties; row r predicts the token at `positions[:, r]`.
        draft_logits: filtered logits that the drafts were drawn from.
        vocab_size: ids from here on do not exist.

    Returns:
        the accepted drafts and the token after them, int32 (tokens behind that mean nothing), and how many drafts are
        accepted, int32.
    """
    k, temperature, seed = drafts.shape[1], sampling_params.temperature, sampling_params.seed
    p = probabilities(filter_logits(logits, sampling_params, vocab_size), temperature)
    q = probabilities(draft_logits, temperature)

    def draw(seed: Array, position: Array) -> Array:
        return jax.random.uniform(_salted_key(seed, UNIFORM_SALT, position))

    uniform = jax.vmap(jax.vmap(draw, (None, 0)))(seed, positions[:, :k])
    depth = sampling_params.num_speculative_tokens
    max_accepted = jnp.full_like(drafts[:, 0] if k else seed, k, jnp.int32)
    if depth is not None:
        max_accepted = jnp.minimum(max_accepted, depth)
    num_accepted, weights = decide(p, q, drafts, uniform, max_accepted)
    position = jnp.take_along_axis(positions, num_accepted[:, None], axis=1)[:, 0]
    noise = jax.vmap(gumbel_noise, (0, 0, None))(seed, position, weights.shape[-1])
    token = argmax(jnp.log(weights) + noise).astype(jnp.int32)
    rows = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(k + 1) < num_accepted[:, None], rows, token[:, None]), num_accepted
