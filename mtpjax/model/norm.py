"""The two RMS norms of Qwen3.5: zero-centred (`1 + w`) everywhere, and plain `w` with a gate behind DeltaNet."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.norm import MoeOutput, pick
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import platform


def rms_norm(x: Float[Array, "*rows D"], w: Float[Array, " D"], eps: float) -> Float[Array, "*rows D"]:
    """`x / rms(x) * (1 + w)` in float32, cast back after the product."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (1.0 + w.astype(jnp.float32))).astype(x.dtype)


def add_norm(
    x: Float[Array, "B T D"], more: PartialSums | MoeOutput | None, w: Float[Array, " D"], eps: float,
    differentiable: bool,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:  # fmt: skip
    """Return `h = x + more` and `rms_norm(h)`. A kernel adds the partial sums of `more` while it reads them."""
    flat, kernels = x.reshape(-1, x.shape[-1]), None if differentiable else pick(platform())
    if kernels is not None:
        h, y = kernels.add(flat, more.parts if isinstance(more, PartialSums) else more, w, eps)
        return h.reshape(x.shape), y.reshape(x.shape)
    if more is not None:
        x = x + (more.whole(x.dtype) if isinstance(more, MoeOutput) else more.sum(x.dtype)).reshape(x.shape)
    return x, rms_norm(x, w, eps)


def gated_rms_norm(
    x: Float[Array, "*rows V"], z: Float[Array, "*rows V"], w: Float[Array, " V"], eps: float, gate: str
) -> Float[Array, "*rows V"]:
    """`x / rms(x) * w * gate(z)`: norm before gate, plain weight, all in float32; returns the dtype of `z`."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * w.astype(jnp.float32)
    act = jax.nn.sigmoid if gate == "sigmoid" else jax.nn.silu
    return (y * act(z.astype(jnp.float32))).astype(z.dtype)


def l2_norm(x: Float[Array, "*rows K"]) -> Float[Array, "*rows K"]:
    """`x / sqrt(sum(x^2) + 1e-6)` in float32: a sum, not a mean, and the epsilon inside the root."""
    y = x.astype(jnp.float32)
    return y * lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)
