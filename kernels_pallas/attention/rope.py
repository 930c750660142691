"""Rotary position embedding (RoPE): the rotation. Model code computes the angles."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


class CosSin(NamedTuple):
    """Cosine and sine of the rotation angles of each row, float32. `half` is half the number of rotated channels."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def apply_rope(x: Float[Array, "B T heads H"], rope: CosSin) -> Float[Array, "B T heads H"]:
    """Rotate the first `2 * half` channels of every head in float32, and return the dtype of `x`.

    Channel i and channel i + half form a pair ("rotate half"): `(a, b) -> (a cos - b sin, b cos + a sin)`. The channels
    from `2 * half` on pass through. Source: RoFormer (arXiv:2104.09864), in the channel order of GPT-NeoX.
    """
    half = rope.cos.shape[-1]
    cos, sin = rope.cos[:, :, None], rope.sin[:, :, None]
    a = x[..., :half].astype(jnp.float32)
    b = x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
