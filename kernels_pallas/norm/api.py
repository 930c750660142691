"""`rms_norm` and its kin: what lies between matrix products, fused with the sums before it.

A row's result does not depend on the other rows of the call, bit for bit, in every implementation. The implementations
differ in their order of sums.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from kernels_pallas.norm import reference, triton
from kernels_pallas.norm.moe_output import MoeOutput
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import interpret_kernels, resolve_implementation


def rms_norm(
    x: Float[Array, "*rows D"], w: Float[Array, " D"], eps: float, *, implementation: str | None = None
) -> Float[Array, "*rows D"]:
    """Normalise rows: `x / rms(x) * (1 + w)`, computed in float32, in the dtype of `x`.

    Args:
        w: zero-centred norm weight.
        eps: epsilon of the norm, inside the root.
        implementation: "xla", "triton", or None for the best of the platform. "triton" has no gradient.
    """
    if resolve_implementation(implementation) == "xla" or x.size == 0:
        return reference.rms_norm(x, w, eps)
    return triton.rms_norm(x.reshape(-1, x.shape[-1]), w, eps, interpret=interpret_kernels()).reshape(x.shape)


def add_rms_norm(
    x: Float[Array, "*rows D"],
    delta: PartialSums | MoeOutput,
    w: Float[Array, " D"],
    eps: float,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]]:
    """Add a layer's output to the residual stream and normalise the sum: `h = x + delta`, `h / rms(h) * (1 + w)`.

    Every operation is computed in float32 and rounded to the dtype of `x`, as it would be between two kernels.

    Args:
        x: the residual stream.
        delta: what is added to the rows of `x`, whose leading axes are flattened: partial sums, or the terms of a
            Mixture-of-Experts block.
        w: zero-centred norm weight.
        eps: epsilon of the norm, inside the root.
        implementation: "xla", "triton", or None for the best of the platform. "triton" has no gradient.

    Returns:
        `h` and the normalised rows, both in the dtype of `x`.
    """
    if resolve_implementation(implementation) == "xla":
        return reference.add_rms_norm(x, delta, w, eps)
    h, normed = triton.add_rms_norm(x.reshape(-1, x.shape[-1]), delta, w, eps, interpret=interpret_kernels())
    return h.reshape(x.shape), normed.reshape(x.shape)


def sum_rms_norm(
    delta: PartialSums, w: Float[Array, " D"], eps: float, dtype: DTypeLike, *, implementation: str | None = None
) -> tuple[Float[Array, "rows D"], Float[Array, "rows D"]]:
    """Add partial sums, round the total to `dtype` and normalise it: `h = sum`, `h / rms(h) * (1 + w)`.

    Args:
        delta: `[P, rows, D]`.
        w: zero-centred norm weight.
        eps: epsilon of the norm, inside the root.
        dtype: of the results.
        implementation: as in `rms_norm`.

    Returns:
        `h` and the normalised rows.
    """
    if resolve_implementation(implementation) == "xla" or delta.parts.size == 0:
        h = delta.sum(dtype)
        return h, reference.rms_norm(h, w, eps)
    return triton.sum_rms_norm(delta, w, eps, dtype, interpret=interpret_kernels())


def concatenated_rms_norm(
    pair: tuple[Float[Array, "*rows D"], Float[Array, "*rows D"]],
    weights: tuple[Float[Array, " D"], Float[Array, " D"]],
    eps: float,
    *,
    implementation: str | None = None,
) -> Float[Array, "*rows two_D"]:
    """Return `rms_norm` of the rows of two arrays, each with its own weight, side by side.

    Args:
        pair: arrays of one shape and dtype.
        weights: zero-centred norm weights.
        eps: epsilon of the norms, inside the root.
        implementation: as in `rms_norm`.
    """
    if resolve_implementation(implementation) == "xla" or pair[0].size == 0:
        return jnp.concatenate([reference.rms_norm(x, w, eps) for x, w in zip(pair, weights, strict=True)], axis=-1)
    a, b = (x.reshape(-1, x.shape[-1]) for x in pair)
    y = triton.concatenated_rms_norm((a, b), weights, eps, interpret=interpret_kernels())
    return y.reshape(*pair[0].shape[:-1], -1)


def gated_rms_norm(
    x: Float[Array, "rows M Dv"],
    z: PartialSums,
    w: Float[Array, " Dv"],
    eps: float,
    gate: str,
    *,
    implementation: str | None = None,
) -> Float[Array, "rows M*Dv"]:
    """Normalise every head and multiply it with its gate: `x / rms(x) * w * gate(z)`, norm before gate.

    The formula is computed in float32; the result has the dtype of `x`.

    Args:
        x: the outputs of M heads of size Dv.
        z: gate logits `[P, rows, M * Dv]`; their sum is rounded to the dtype of `x`.
        w: plain norm weight, not zero-centred, shared by the heads.
        eps: epsilon of the norm, inside the root.
        gate: "sigmoid"; any other name means SiLU.
        implementation: "xla", "triton", or None for the best of the platform. "triton" has no gradient.
    """
    if resolve_implementation(implementation) == "xla":
        return reference.gated_rms_norm(x, z, w, eps, gate)
    return triton.gated_rms_norm(x, z, w, eps, gate, interpret=interpret_kernels())
