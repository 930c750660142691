"""Sums over features in an order that the number of features alone fixes, from operations on single elements.

A `jnp.sum` is left to XLA, whose order of additions follows the number of rows in the call and whatever it fuses with
the sum. A row would then have other bits among other rows. XLA does not reorder additions of single elements.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.tiles import next_power_of_2


def sum_features(x: Float[Array, "*rows F"]) -> Float[Array, "*rows 1"]:
    """Return the sum over the last axis, which stays as an axis of size 1.

    The second half is added to the first one until one element is left; zeros fill up an F that is no power of two.
    """
    size = x.shape[-1]
    missing = next_power_of_2(size) - size
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


def softmax(logits: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
    """Return the softmax over the last axis, summed by `sum_features`."""
    exp = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    return exp / sum_features(exp)
