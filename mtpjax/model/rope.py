"""Angles of the partial rotary position embedding; `kernels_pallas.attention.apply_rope` rotates by them.

Only the first `rotary_dim` channels of a head are rotated. With text alone the three position rows of M-RoPE are
equal, so M-RoPE is exactly this one-dimensional form. This is the one place that makes cosines and sines: trunk and MTP
head, kernels and plain JAX take them from `Positions`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from numpy.typing import NDArray

from kernels_pallas.attention import CosSin
from mtpjax.config import RopeScaling


def rope_angles(
    positions: Int[Array, "B T"], rotary_dim: int, theta: float, scaling: RopeScaling | None = None
) -> CosSin:
    """Return cosine and sine, float32 `[B, T, rotary_dim / 2]`, of the angles `position * theta^(-2i / rotary_dim)`.

    The denominator is the number of rotated channels, not the head size. Source: RoFormer (arXiv:2104.09864). With a
    `scaling` the frequencies are those of `scaled_frequencies`, and both results are multiplied by its
    `attention_factor`.
    """
    if scaling is None:
        frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    else:
        frequency = jnp.asarray(scaled_frequencies(rotary_dim, theta, scaling))
    angle: Float[Array, "B T half"] = positions.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is None or scaling.attention_factor == 1:
        return CosSin(cos, sin)
    return CosSin(cos * scaling.attention_factor, sin * scaling.attention_factor)


def scaled_frequencies(rotary_dim: int, theta: float, scaling: RopeScaling) -> NDArray[np.float32]:
    """Return the rotary frequencies, float32 `[rotary_dim / 2]`, under a scaling.

    "linear" divides all of them by the factor. YaRN (arXiv:2309.00071, section 3.2) keeps those that turn `beta_fast`
    times or more within the original length, divides those that turn less than `beta_slow` times, and mixes between;
    the borders are those of `_compute_yarn_parameters` in transformers.
    """
    plain = 1 / theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32)

    def channel(rotations: float) -> float:
        """The channel whose frequency makes so many rotations within the original length."""
        length = scaling.original_max_position / (rotations * 2 * math.pi)
        return rotary_dim * math.log(length) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    last = first + 0.001 if first == last else last
    divided = np.clip((np.arange(rotary_dim // 2) - first) / (last - first), 0, 1)  # share of the divided frequency
    return (plain * (1 - divided) + plain / scaling.factor * divided).astype(np.float32)
