"""Logits -> token, with noise that belongs to a place in a text, and the rule by which drafts are accepted.

The token at absolute position p of a request is `argmax(logits + T * gumbel(seed, p))`: at T > 0 an exact sample of
softmax(logits / T), at T = 0 the greedy choice, in one formula. The noise depends on (seed, p) alone, and drafter and trunk
use the same, so a draft is right exactly when it is the trunk's own token: the text cannot depend on how many tokens
were drafted nor on the neighbours in the batch. Top-k, top-p and min-p keep to this: they take tokens out of the logits of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jaxtyping import Float, Int, UInt32

from kernels_pallas.platform import platform
from kernels_pallas.top_k_top_p import KERNELS, top_k_top_p_threshold
from mtpjax.decoding.penalties import Penalties

MAX_STOP_TOKENS = 8  # stop tokens a request can have


class TruncationParams(struct.PyTreeNode):
    """Which tokens B requests sample from; see `apply_top_k_top_p_min_p`."""

    top_k: Int[Array, " B"]  # 0: all
    top_p: Float[Array, " B"]  # 1: all
    min_p: Float[Array, " B"]  # 0: all


class BatchSamplingParams(struct.PyTreeNode):
    """What the loop must know of B requests."""

    max_tokens: Int[Array, " B"]
    temperature: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    stops: Int[Array, "B STOPS"]  # -1 where unused
    kept: TruncationParams | None = None  # None: all tokens
    penalties: Penalties | None = None  # None: nobody has any


def gumbel_noise(seed: UInt32[Array, ""], position: Int[Array, ""], vocab: int) -> Float[Array, " V"]:
    """Standard Gumbel noise of the token at `position` of the request with `seed`."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab,))


def choose(
    logits: Float[Array, "B R V"], positions: Int[Array, "B R"], requests: BatchSamplingParams, vocab: int
) -> Int[Array, "B R"]:
    """The token of each row, int32.

    Args:
        logits: float32; row r of request b predicts the token at `positions[b, r]`.
        vocab: ids from here on do not exist (the matrix of a published checkpoint is padded) and are never chosen.
    """
    if vocab < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)

    batch, rows, size = logits.shape

    def sampled(kept: TruncationParams | None, logits: Array) -> Array:
        def some(
            logits: Array, positions: Array, requests: BatchSamplingParams, kept: TruncationParams | None
        ) -> Array:
            """A token for each logits `[N, V]`."""
            noise = jax.vmap(gumbel_noise, (0, 0, None))(requests.seed, positions, size)
            if kept is not None:
                logits = apply_top_k_top_p_min_p(logits, requests.temperature, kept)
            return best(logits + requests.temperature[:, None] * noise)

        if platform() == "cpu":  # row by row: noise of all rows would be written to memory first
            turns = logits.swapaxes(0, 1), positions.T
            return lax.map(lambda row: some(row[0], row[1], requests, kept), turns).T
        each, theirs = jax.tree.map(lambda of_request: jnp.repeat(of_request, rows, axis=0), (requests, kept))
        return some(logits.reshape(-1, size), positions.reshape(-1), each, theirs).reshape(batch, rows)

    # The dearest way that some request needs: the first token, a sample of all tokens, a sample of some.
    ways: list[Callable[[Array], Array]] = [best, partial(sampled, None)]
    need = requests.temperature > 0
    way = jnp.any(need).astype(jnp.int32)
    if (kept := requests.kept) is not None:
        ways.append(partial(sampled, kept))
        way += jnp.any(need & ((kept.top_k > 0) | (kept.top_p < 1) | (kept.min_p > 0)))
    return lax.switch(way, ways, logits).astype(jnp.int32)


def apply_top_k_top_p_min_p(
    logits: Float[Array, "B V"], temperature: Float[Array, " B"], kept: TruncationParams
) -> Float[Array, "B V"]:
    """The logits, -inf where a token is not among those that a request samples from.

    As Hugging Face's logits processors take them out: of softmax(logits / T) the `top_k` most probable tokens; of those,
    renormalised, the fewest that have `top_p` together; of those, the ones at least `min_p` times as probable as the first. Of
    equally probable tokens all stay or none. At T = 0 the first token is the choice in any case.
    """
    heat, first = jnp.where(temperature > 0, temperature, 1), jnp.max(logits, axis=-1)
    least = KERNELS.get(platform(), top_k_top_p_threshold)(logits, first, heat, kept.top_k, kept.top_p)
    least = jnp.maximum(least, first + heat * jnp.log(kept.min_p))
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def best(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """`argmax` over the last axis, the first of equal ones.

    On a CPU as the largest value and then the first place that has it, each of them a reduction that XLA vectorises, as it
    does not that of pairs of value and place.
    """
    if platform() != "cpu":
        return jnp.argmax(logits, axis=-1)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    last = logits.shape[-1] - 1
    return jnp.min(jnp.where(logits >= largest, jnp.arange(last + 1), last), axis=-1)


def agreeing(drafts: Int[Array, "B k"], tokens: Int[Array, "B W"]) -> Int[Array, " B"]:
    """Length of the longest prefix in which every draft is the trunk's own token, 0...k."""
    same = drafts == tokens[:, : drafts.shape[1]]
    return jnp.sum(jnp.cumprod(same.astype(jnp.int32), axis=1), axis=1)


def emitted(
    tokens: Int[Array, "B W"], count: Int[Array, " B"], room: Int[Array, " B"], stops: Int[Array, "B STOPS"]
) -> tuple[Int[Array, " B"], Array]:
    """How many of the first `count` tokens leave the loop, and whether a stop token is the last of them.

    The text ends with its first stop token (included) or after `room` tokens.
    """
    steps = jnp.arange(tokens.shape[1])
    inside = steps < jnp.minimum(count, room)[:, None]
    stop = jnp.any(tokens[:, :, None] == stops[:, None, :], axis=-1) & inside
    first = jnp.argmax(stop, axis=1)
    stopped = jnp.any(stop, axis=1)
    return jnp.where(stopped, first + 1, jnp.minimum(count, room)).astype(jnp.int32), stopped
