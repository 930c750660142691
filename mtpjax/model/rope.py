"""Angles of the partial rotary position embedding; `kernels_pallas.attention.apply_rope` rotates by them.

Only the first `rotary_dim` channels of a head are rotated. With text alone the three position rows of M-RoPE are
equal, so M-RoPE is exactly this one-dimensional form.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.attention import CosSin


def rope_angles(positions: Int[Array, "B T"], rotary_dim: int, theta: float) -> CosSin:
    """Return cosine and sine, float32 `[B, T, rotary_dim / 2]`, of the angles `position * theta^(-2i / rotary_dim)`.

    The denominator is the number of rotated channels, not the head size. Source: RoFormer (arXiv:2104.09864).
    """
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angle: Float[Array, "B T half"] = positions.astype(jnp.float32)[..., None] * frequency
    return CosSin(jnp.cos(angle), jnp.sin(angle))
