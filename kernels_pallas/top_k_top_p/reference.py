"""Top-k and top-p in plain JAX: the formula that the kernels are tested against, and the implementation for CPUs."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, UInt32

DIGIT_BITS = 4  # of a threshold that one pass over the logits finds
SORTABLE_MINUS_INF = 0x007FFFFF


def to_sortable_uint(values: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Map float32 values to whole numbers of the same order. Both zeros have the same number."""
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    return jnp.where(bits >> jnp.uint32(31) == jnp.uint32(1), ~bits, bits | jnp.uint32(1 << 31))


def from_sortable_uint(numbers: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Invert `to_sortable_uint`. Numbers below that of -inf, which no value has, give -inf."""
    numbers = jnp.maximum(numbers, jnp.uint32(SORTABLE_MINUS_INF))
    bits = jnp.where(numbers >> jnp.uint32(31) == jnp.uint32(1), numbers ^ jnp.uint32(1 << 31), ~numbers)
    return lax.bitcast_convert_type(bits, jnp.float32)


def relative_prob(logits: Float[Array, "*shape"], max_logit: Array, temperature: Array) -> Float[Array, "*shape"]:
    """Return probabilities under softmax(logits / temperature), divided by that of `max_logit`."""
    return jnp.exp((logits - max_logit) / temperature)


def top_k_top_p_threshold(
    logits: Float[Array, "N V"],
    max_logit: Float[Array, " N"],
    temperature: Float[Array, " N"],
    top_k: Int[Array, " N"],
    top_p: Float[Array, " N"],
) -> Float[Array, " N"]:
    """Compute `kernels_pallas.top_k_top_p.top_k_top_p_threshold` in plain JAX.

    For each row, with logits l_i, temperature T and k = `top_k` (V where it is 0):

        p_i         = exp((l_i - max_logit) / T)                 up to a factor softmax(l / T)
        threshold_k = max {t : #{i : l_i >= t} >= k}             top-k
        q_i         = p_i if l_i >= threshold_k, else 0
        threshold_p = max {t : sum(q_i : l_i >= t) >= top_p * sum(q)}     top-p: nucleus sampling, arXiv:1904.09751
        threshold   = max(threshold_k, threshold_p) if top_p < 1, else threshold_k

    Both maxima are searched digit by digit over the 32 bits of a float's place in the order of all floats. Nothing is
    sorted: the vocabulary has a quarter of a million tokens.
    """
    sortable = to_sortable_uint(logits)
    count = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
    top_k_min = _highest_threshold(sortable, jnp.ones_like(logits), count)
    probs = relative_prob(logits, max_logit[:, None], temperature[:, None])
    probs = jnp.where(sortable >= top_k_min[:, None], probs, 0)
    top_p_min = _highest_threshold(sortable, probs, top_p * jnp.sum(probs, axis=-1))
    return from_sortable_uint(jnp.where(top_p < 1, jnp.maximum(top_k_min, top_p_min), top_k_min))


def _highest_threshold(
    sortable: UInt32[Array, "N V"], weights: Float[Array, "N V"], target: Float[Array, " N"]
) -> UInt32[Array, " N"]:
    """Return the highest threshold at which the tokens at or above it weigh `target` together; 0 where all weigh less.

    Each pass tries every value that the next digit of the threshold can have, and keeps the largest that still leaves
    enough.
    """
    digits = jnp.arange(1, 1 << DIGIT_BITS, dtype=jnp.uint32)
    threshold = jnp.zeros(sortable.shape[:1], jnp.uint32)
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        candidates = threshold[:, None] | digits << shift
        above = jnp.where(sortable[:, None, :] >= candidates[:, :, None], weights[:, None, :], 0)
        enough = jnp.sum(above, axis=-1) >= target[:, None]
        threshold = jnp.max(jnp.where(enough, candidates, threshold[:, None]), axis=-1)
    return threshold
