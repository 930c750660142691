"""Logits to tokens, with noise that belongs to a position of a text.

The token at absolute position p of a request is `argmax(logits + T * gumbel(seed, p))`. At temperature T > 0 this is
an exact sample of softmax(logits / T) (Gumbel-max sampling: Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030), and
at T = 0 it is the greedy choice, in one formula. The noise depends on (seed, p) alone, and drafter and trunk use the
same noise (coupled, "drafter-invariant" speculative decoding: Daliri et al., arXiv:2408.07978). A draft is accepted
exactly when it is the token that the trunk samples there. The text therefore cannot depend on the number of drafted
tokens, nor on the other requests in the batch. Top-k, top-p and min-p keep this property: they remove tokens from the
logits of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jaxtyping import Bool, Float, Int, UInt32

from kernels_pallas.row_ops import argmax, map_rows
from kernels_pallas.top_k_top_p import top_k_top_p_threshold
from mtpjax.decoding.automaton import Automata, automata_sizes
from mtpjax.decoding.constraints import Constraints
from mtpjax.decoding.penalties import Penalties

MAX_STOP_TOKENS = 8  # stop tokens that a request can have


class TruncationParams(struct.PyTreeNode):
    """Which tokens B requests sample from; see `apply_top_k_top_p_min_p`."""

    top_k: Int[Array, " B"]  # 0: all
    top_p: Float[Array, " B"]  # 1: all
    min_p: Float[Array, " B"]  # 0: all


class BatchSamplingParams(struct.PyTreeNode):
    """Sampling parameters of B requests, as arrays for the decode loop."""

    max_tokens: Int[Array, " B"]
    temperature: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    stop_token_ids: Int[Array, "B STOPS"]  # -1 where unused
    truncation: TruncationParams | None = None  # None: all requests sample from all tokens
    penalties: Penalties | None = None  # None: no request has any
    constraints: Constraints | None = None  # None: no request has any
    automata: Automata | None = None  # None: no request has a structured output
    num_speculative_tokens: Int[Array, " B"] | None = None  # drafts that may be accepted in a step; None: all

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that `TextState.parts` does not tell apart: each combination has its own program."""
        constraints = () if self.constraints is None else self.constraints.parts
        limits = () if self.num_speculative_tokens is None else ("limits",)
        return constraints + automata_sizes(self.automata) + limits

    def take(self, token_ids: Int[Array, " N"]) -> BatchSamplingParams:
        """Return the parameters for logits of these ids only."""
        return self.replace(constraints=None if self.constraints is None else self.constraints.take(token_ids))


class VocabSubset(NamedTuple):
    """Some token ids of a vocabulary.

    The noise of a subset is that of the same ids in the whole vocabulary: with other noise a draft would agree with the
    trunk by chance only.

    Attributes:
        token_ids: ascending, so that of equally good tokens the subset and the vocabulary choose the same.
        num_logits: of the whole vocabulary.
    """

    token_ids: Int[Array, " N"]
    num_logits: int


def gumbel_noise(seed: UInt32[Array, ""], position: Int[Array, ""], vocab_size: int) -> Float[Array, " V"]:
    """Return standard Gumbel noise for the token at `position` of the request with `seed`, float32 `[vocab_size]`."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab_size,))


def sample(
    logits: Float[Array, "B R V"],
    positions: Int[Array, "B R"],
    sampling_params: BatchSamplingParams,
    vocab_size: int,
    subset: VocabSubset | None = None,
) -> Int[Array, "B R"]:
    """Return the token of each row, int32.

    Args:
        logits: float32; row r of request b predicts the token at `positions[b, r]`.
        vocab_size: ids from here on do not exist and are never chosen: the matrices of published checkpoints are
            padded.
        subset: the ids of the columns, if they are not the whole vocabulary. Then the result is a column, and top-k,
            top-p and min-p are those of the subset.
    """
    if subset is None and vocab_size < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    num_logits = logits.shape[-1] if subset is None else subset.num_logits
    temperature, seed = sampling_params.temperature, sampling_params.seed
    truncation = sampling_params.truncation

    def sample_rows(rows: tuple[Array, Array], sequences: tuple[Array, Array, TruncationParams | None]) -> Array:
        """Return a token for each of N logits `[N, V]`."""
        (logits, positions), (temperature, seed, truncation) = rows, sequences
        noise = jax.vmap(gumbel_noise, (0, 0, None))(seed, positions, num_logits)
        if subset is not None:
            noise = noise[:, subset.token_ids]
        if truncation is not None:
            logits = apply_top_k_top_p_min_p(logits, temperature, truncation)
        return argmax(logits + temperature[:, None] * noise)

    def sample_all(truncation: TruncationParams | None, logits: Array) -> Array:
        return map_rows(sample_rows, (logits, positions), (temperature, seed, truncation))

    # The batch takes the most expensive method that any of its requests needs.
    methods: list[Callable[[Array], Array]] = [argmax, partial(sample_all, None)]
    is_sampled = temperature > 0
    method = jnp.any(is_sampled).astype(jnp.int32)
    if truncation is not None:
        methods.append(partial(sample_all, truncation))
        method += jnp.any(is_sampled & ((truncation.top_k > 0) | (truncation.top_p < 1) | (truncation.min_p > 0)))
    return lax.switch(method, methods, logits).astype(jnp.int32)


def apply_top_k_top_p_min_p(
    logits: Float[Array, "B V"], temperature: Float[Array, " B"], truncation: TruncationParams
) -> Float[Array, "B V"]:
    """Return the logits, with -inf for the tokens that a request does not sample from.

    The conditions apply one after the other, as Hugging Face's logits processors do, with p = softmax(logits / T):

        top-k: the `top_k` most probable tokens
        top-p: of those, renormalised, the fewest that have probability `top_p` together (nucleus, arXiv:1904.09751)
        min-p: of those, the tokens with p >= min_p * max(p) (arXiv:2407.01082)

    Equally probable tokens are kept or removed together. At T = 0 the conditions use T = 1; the most probable token,
    which is the choice there, is always kept.
    """
    temperature = jnp.where(temperature > 0, temperature, 1)
    max_logit = jnp.max(logits, axis=-1)
    threshold = top_k_top_p_threshold(logits, max_logit, temperature, truncation.top_k, truncation.top_p)
    threshold = jnp.maximum(threshold, max_logit + temperature * jnp.log(truncation.min_p))
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def accepted_prefix_length(drafts: Int[Array, "B k"], tokens: Int[Array, "B W"]) -> Int[Array, " B"]:
    """Return the length of the longest prefix of `drafts` whose tokens are the trunk's own, 0...k.

    Args:
        tokens: sampled from the trunk's logits, W > k or W = k of them.
    """
    is_same = drafts == tokens[:, : drafts.shape[1]]
    return jnp.sum(jnp.cumprod(is_same.astype(jnp.int32), axis=1), axis=1)


def truncate_at_stop(
    tokens: Int[Array, "B W"],
    num_tokens: Int[Array, " B"],
    num_tokens_left: Int[Array, " B"],
    stop_token_ids: Int[Array, "B STOPS"],
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Return how many of the first `num_tokens` tokens belong to the text, int32, and whether a stop token is the last
    of them.

    A text ends with its first stop token, which belongs to it, or when `num_tokens_left` more tokens have been
    generated.
    """
    limit = jnp.minimum(num_tokens, num_tokens_left)
    in_limit = jnp.arange(tokens.shape[1]) < limit[:, None]
    is_stop = jnp.any(tokens[:, :, None] == stop_token_ids[:, None, :], axis=-1) & in_limit
    first_stop = jnp.argmax(is_stop, axis=1)
    stopped = jnp.any(is_stop, axis=1)
    return jnp.where(stopped, first_stop + 1, limit).astype(jnp.int32), stopped
