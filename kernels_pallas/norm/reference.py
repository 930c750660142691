"""Norms in plain JAX ("xla"), computed in float32, with sums in a fixed order: a row has the same bits in any call.

RMS norm: Zhang and Sennrich (arXiv:1910.07467). Qwen3.5 stores its norm weights zero-centred, so the factor is `1 + w`;
only the gated norm after Gated DeltaNet (arXiv:2412.06464) has a plain weight `w`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.fixed_order import sum_features
from kernels_pallas.norm.moe_output import MoeOutput
from kernels_pallas.partial_sums import PartialSums


def rms_norm(x: Float[Array, "*rows D"], w: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """Return `x / rms(x) * (1 + w)` with `rms(x) = sqrt(mean(x^2) + eps)`, computed in float32, in the dtype of `x`."""
    return (_divide_by_rms(x.astype(jnp.float32), eps) * (1.0 + w.astype(jnp.float32))).astype(x.dtype)


def _divide_by_rms(y: Float[Array, "*rows D"], eps: float) -> Float[Array, "*rows D"]:
    return y * lax.rsqrt(sum_features(y * y) / y.shape[-1] + eps)


def l2_norm(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Return `x / sqrt(sum(x^2) + 1e-6)` in float32: a sum, not a mean, with the epsilon inside the root."""
    y = x.astype(jnp.float32)
    return y * lax.rsqrt(sum_features(y * y) + 1e-6)


def add_rms_norm(
    x: Float[Array, "*rows D"], delta: PartialSums | MoeOutput, w: Float[Array, " D"], eps: float
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """Return `h = x + delta` and `h / rms(h) * (1 + w)`. Arguments as in `kernels_pallas.norm.add_rms_norm`."""
    h = x + delta.sum(x.dtype).reshape(x.shape)
    return h, rms_norm(h, w, eps)


def gated_rms_norm(
    x: Float[Array, "rows M Dv"], z: PartialSums, w: Float[Array, " Dv"], eps: float, gate: str
) -> Float[Array, "rows M*Dv"]:
    """Return `x / rms(x) * w * gate(z)` for each head. Arguments as in `kernels_pallas.norm.gated_rms_norm`."""
    y = _divide_by_rms(x.astype(jnp.float32), eps) * w.astype(jnp.float32)
    activation = jax.nn.sigmoid if gate == "sigmoid" else jax.nn.silu
    z_rows = z.sum(x.dtype)
    y = y * activation(z_rows.reshape(x.shape).astype(jnp.float32))
    return y.astype(x.dtype).reshape(z_rows.shape)
