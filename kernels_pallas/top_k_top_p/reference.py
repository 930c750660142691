"""Top-k and top-p in plain `lax`: the oracle of the kernels, and the CPU path."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, UInt32

DIGIT = 4  # bits of a threshold found by one pass over the logits


def order(values: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Whole numbers in the order of the float32 `values`; the two zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    return jnp.where(bits >> jnp.uint32(31) == jnp.uint32(1), ~bits, bits | jnp.uint32(1 << 31))


def value(number: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 whose `order` is `number`; -inf for all numbers below that of -inf."""
    number = jnp.maximum(number, jnp.uint32(0x007FFFFF))
    bits = jnp.where(number >> jnp.uint32(31) == jnp.uint32(1), number ^ jnp.uint32(1 << 31), ~number)
    return lax.bitcast_convert_type(bits, jnp.float32)


def mass(logits: Float[Array, "*shape"], first: Array, heat: Array) -> Float[Array, "*shape"]:
    """Probability under softmax(logits / heat) as a multiple of that of the largest logit, `first`."""
    return jnp.exp((logits - first) / heat)


def top_k_top_p_threshold(
    logits: Float[Array, "N V"],
    first: Float[Array, " N"],
    heat: Float[Array, " N"],
    top_k: Int[Array, " N"],
    top_p: Float[Array, " N"],
) -> Float[Array, " N"]:
    """As `kernels_pallas.top_k_top_p.triton.top_k_top_p_threshold`."""
    numbers = order(logits)
    count = jnp.where(top_k > 0, top_k, logits.shape[-1]).astype(jnp.float32)
    least = _highest(numbers, jnp.ones_like(logits), count)
    masses = jnp.where(numbers >= least[:, None], mass(logits, first[:, None], heat[:, None]), 0)
    nucleus = _highest(numbers, masses, top_p * jnp.sum(masses, axis=-1))
    return value(jnp.where(top_p < 1, jnp.maximum(least, nucleus), least))


def _highest(
    numbers: UInt32[Array, "N V"], weights: Float[Array, "N V"], wanted: Float[Array, " N"]
) -> UInt32[Array, " N"]:
    """The highest threshold such that the tokens at or above it weigh `wanted` together; 0 where all weigh less.

    Found digit by digit, without sorting: each pass weighs what lies above every value that the next digit can have.
    """
    digits = jnp.arange(1, 1 << DIGIT, dtype=jnp.uint32)
    least = jnp.zeros(numbers.shape[:1], jnp.uint32)
    for shift in range(32 - DIGIT, -1, -DIGIT):
        tried = least[:, None] | digits << shift
        above = jnp.where(numbers[:, None, :] >= tried[:, :, None], weights[:, None, :], 0)
        enough = jnp.sum(above, axis=-1) >= wanted[:, None]
        least = jnp.max(jnp.where(enough, tried, least[:, None]), axis=-1)
    return least
