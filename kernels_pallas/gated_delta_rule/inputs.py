"""From a layer's projections to the inputs of the recurrence: causal convolution, gates and normalisation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.norm import l2_norm
from kernels_pallas.partial_sums import PartialSums


class DeltaProjections(NamedTuple):
    """Projections of the T rows of each of B sequences, as partial sums."""

    qkv: PartialSums  # [P, B * T, C] with C = 2 J Dk + M Dv: queries of all J heads, then keys, then values of M heads
    beta: PartialSums  # [P, B * T, M], float32: logits of the step size
    decay: PartialSums  # [P, B * T, M], float32: the decay before bias and softplus


class DeltaWeights(NamedTuple):
    """The small weights of a layer."""

    conv: Float[Array, "C width"]  # taps of the convolution; the last one belongs to the row itself
    a_log: Float[Array, " M"]
    dt_bias: Float[Array, " M"]


class GatedNorm(NamedTuple):
    """The norm and gate of the outputs; see `kernels_pallas.norm.gated_rms_norm`."""

    z: PartialSums  # [P, B * T, M * Dv]: logits of the gate
    weight: Float[Array, " Dv"]
    eps: float
    gate: str


class DeltaInputs(NamedTuple):
    """Inputs of the recurrence, float32. Queries are normalised and scaled, keys are normalised."""

    q: Float[Array, "B T J Dk"]
    k: Float[Array, "B T J Dk"]
    v: Float[Array, "B T M Dv"]
    beta: Float[Array, "B T M"]  # step size, 0...1
    g: Float[Array, "B T M"]  # log decay, <= 0


def causal_conv_inputs(
    qkv: PartialSums,
    conv_state: Float[Array, "B past C"],
    pad: Int[Array, " B"],
    valid: Bool[Array, "B T"],
    dtype: DTypeLike,
) -> Float[Array, "B past+T C"]:
    """Return the inputs of the convolution: those before the valid rows, then the rows; zeros replace the padding.

    The earlier inputs move up to the first valid row. Padding in front is therefore a no-op for continued sequences,
    too, and the last `past` entries are always the ones that the next step needs.

    Args:
        qkv: projections `[P, B * T, C]`; their sum is rounded to `dtype`.
        conv_state: the inputs before the step; the result has their dtype.
        pad: number of padding rows in front of each sequence.
        valid: rows that count, of which the first one is row `pad`.
        dtype: compute dtype.
    """
    rows = qkv.sum(dtype).reshape(*valid.shape, -1).astype(conv_state.dtype)
    rows = jnp.where(valid[..., None], rows, 0)
    inputs = jnp.concatenate([jnp.zeros_like(conv_state), rows], axis=1)
    insert = jax.vmap(lambda inputs, before, pad: lax.dynamic_update_slice(inputs, before, (pad, 0)))
    return insert(inputs, conv_state, pad)


def delta_inputs(
    projections: DeltaProjections,
    weights: DeltaWeights,
    conv_inputs: Float[Array, "B inputs C"],
    valid: Bool[Array, "B T"],
    head_sizes: tuple[int, int, int],
    dtype: DTypeLike,
) -> DeltaInputs:
    """Compute the inputs of the recurrence from the projections `qkv`, `b` and `a` of a layer.

        q, k, v = split(silu(conv(qkv)));  q = l2_norm(q) / sqrt(Dk);  k = l2_norm(k)
        beta = sigmoid(b);  g = -exp(a_log) softplus(a + dt_bias)

    The convolution is causal and has one filter for each channel. Its result is rounded to `dtype`; everything else is
    float32. Rows that are not valid get beta = 0 and g = 0, with which the recurrence changes nothing.

    Args:
        conv_inputs: the result of `causal_conv_inputs`, `past + T` inputs of each sequence.
        head_sizes: M, Dk and Dv.
    """
    heads, key_size, value_size = head_sizes
    u = _silu_conv(conv_inputs, weights.conv, dtype)
    key_channels = (u.shape[2] - heads * value_size) // 2
    q, k, v = jnp.split(u, [key_channels, 2 * key_channels], axis=-1)
    q, k = (l2_norm(x.reshape(*valid.shape, -1, key_size)) for x in (q, k))
    b, a = (x.sum(jnp.float32).reshape(*valid.shape, heads) for x in (projections.beta, projections.decay))
    g = -jnp.exp(weights.a_log.astype(jnp.float32)) * jax.nn.softplus(a + weights.dt_bias)
    beta, g = (jnp.where(valid[..., None], x, 0.0) for x in (jax.nn.sigmoid(b), g))
    return DeltaInputs(q * key_size**-0.5, k, v.reshape(*valid.shape, heads, value_size), beta, g)


def _silu_conv(
    inputs: Float[Array, "B inputs C"], weight: Float[Array, "C width"], dtype: DTypeLike
) -> Float[Array, "B T C"]:
    """Return SiLU of the convolution, rounded to `dtype`, as float32."""
    width = weight.shape[1]
    rows = inputs.shape[1] - width + 1
    taps, x = weight.astype(jnp.float32), inputs.astype(jnp.float32)
    u: Array = sum(x[:, i : i + rows] * taps[:, i] for i in range(width))  # type: ignore[assignment]
    return jax.nn.silu(u).astype(dtype).astype(jnp.float32)


def step_gates(b: Array, a: Array, a_log: Array, dt_bias: Array) -> tuple[Array, Array]:
    """Inside a kernel: return `sigmoid(b)` and `-exp(a_log) softplus(a + dt_bias)`, step size and log decay."""
    a = a + dt_bias.astype(jnp.float32)
    softplus = jnp.maximum(a, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(a)))
    return lax.logistic(b), -jnp.exp(a_log.astype(jnp.float32)) * softplus
