"""The gated activation of every MLP."""

from __future__ import annotations

import jax
from jax import Array
from jaxtyping import Float


def silu_and_mul(gate: Float[Array, "*rows I"], up: Float[Array, "*rows I"]) -> Float[Array, "*rows I"]:
    """Return `silu(gate) * up` (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up
