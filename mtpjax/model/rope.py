"""Partial rotary position embedding: the first `rotary_dim` of each head turn, the rest passes through.

With text alone the three position rows of M-RoPE are equal, which makes it exactly this one-dimensional form.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Rotary(NamedTuple):
    """Cosine and sine of the angles at each row, float32."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotary(positions: Int[Array, "B T"], rotary_dim: int, theta: float) -> Rotary:
    """Angles `position * theta^(-2i / rotary_dim)`, i < rotary_dim / 2: the denominator is the rotary size, not the head."""
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    return Rotary(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B T N H"], turn: Rotary) -> Float[Array, "B T N H"]:
    """Rotate-half inside the rotary dims: dimension i pairs with i + rotary_dim / 2."""
    half = turn.cos.shape[-1]
    cos, sin = turn.cos[:, :, None], turn.sin[:, :, None]
    a = x[..., :half].astype(jnp.float32)
    b = x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
