"""`recurrent_gated_delta_rule` and `chunk_gated_delta_rule`: a Gated DeltaNet layer between its projections."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.gated_delta_rule import reference, triton, triton_chunks
from kernels_pallas.gated_delta_rule.inputs import DeltaProjections, DeltaWeights, causal_conv_inputs, delta_inputs
from kernels_pallas.gated_delta_rule.state import DeltaState, PendingDeltaUpdates
from kernels_pallas.platform import interpret_kernels, resolve_implementation


def recurrent_gated_delta_rule(
    projections: DeltaProjections,
    weights: DeltaWeights,
    state: DeltaState,
    layer: Int[Array, ""] | int,
    pad: Int[Array, " B"],
    valid: Bool[Array, "B W"],
    *,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> tuple[Float[Array, "B W M Dv"], PendingDeltaUpdates]:
    """Run the few rows of a verify window, which may yet be rejected: the memory of the layer stays as it is.

    The recurrence of Gated DeltaNet (arXiv:2412.06464), for each value head with state S `[Dk, Dv]`:

        q, k, v = split(silu(conv(qkv)));  q = q / |q| / sqrt(Dk);  k = k / |k|;  |y| = sqrt(sum(y^2) + 1e-6)
        beta = sigmoid(b);  g = -exp(a_log) softplus(a + dt_bias)
        S <- exp(g) S;  delta = beta (v - S^T k);  S <- S + k delta^T;  o = S^T q

    `conv` is a causal convolution with one filter for each channel. Value head m reads the query and key of head
    `m // (M / J)`. The projections qkv and the result of the convolution are rounded to `dtype`, the rest is float32.

    Args:
        projections: qkv, b (`beta`) and a (`decay`) of the W rows of each of the B sequences.
        weights: filters of the convolution, a_log and dt_bias.
        state: the memory of all L layers.
        layer: index of the layer in `state`.
        pad: number of padding rows in front of each sequence.
        valid: rows that count: from row `pad` on, without a gap. The other rows change nothing.
        dtype: compute dtype.
        implementation: "xla", "triton", or None for the best of the platform that supports the shapes. "triton" has no
            gradient.

    Returns:
        the outputs o in `dtype`, and what `replay_updates` needs to add the accepted rows to the memory.

    Raises:
        ValueError: `implementation` is "triton" and the kernel does not support W, Dk or Dv.
    """
    heads, key_size, value_size = state.recurrent.shape[2:]
    conv_inputs = causal_conv_inputs(projections.qkv, state.conv[layer], pad, valid, dtype)
    supported = triton.supports(valid.shape[1], key_size, value_size)
    if resolve_implementation(implementation, supported=supported) == "triton":
        end = pad + jnp.sum(valid, axis=1)
        window = triton.recurrent_gated_delta_rule(
            projections, weights, state, layer, pad, end, dtype=dtype, interpret=interpret_kernels()
        )
        return window.o, PendingDeltaUpdates(conv_inputs, window.k, window.delta, window.decay)
    inputs = delta_inputs(projections, weights, conv_inputs, valid, (heads, key_size, value_size), dtype)
    outputs = reference.recurrent_gated_delta_rule(inputs, state.recurrent[layer])
    return outputs.o.astype(dtype), PendingDeltaUpdates(conv_inputs, inputs.k, outputs.delta, outputs.decay)


def chunk_gated_delta_rule(
    projections: DeltaProjections,
    weights: DeltaWeights,
    state: DeltaState,
    layer: Int[Array, ""] | int,
    pad: Int[Array, " B"],
    valid: Bool[Array, "B T"],
    *,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T M Dv"], DeltaState]:
    """Run the rows of a prompt, in chunks of 64 rows, which are counted from the last row.

    Formula and arguments are those of `recurrent_gated_delta_rule`; the chunked form is that of arXiv:2406.06484, see
    `reference.py`.

    Returns:
        the outputs o in `dtype`, and the memory of layer `layer` after all rows.

    Raises:
        ValueError: `implementation` is "triton" and the kernels do not support Dk or Dv.
    """
    heads, key_size, value_size = state.recurrent.shape[2:]
    rows = valid.shape[1]
    conv_inputs = causal_conv_inputs(projections.qkv, state.conv[layer], pad, valid, dtype)
    inputs = delta_inputs(projections, weights, conv_inputs, valid, (heads, key_size, value_size), dtype)
    chunk = reference.CHUNK
    supported = triton_chunks.supports(chunk, key_size, value_size)
    if resolve_implementation(implementation, supported=supported) == "triton":
        q, k, v, beta, g = reference.pad_to_chunks(inputs)
        decay = jnp.cumsum(g.reshape(g.shape[0], -1, chunk, heads), axis=2).reshape(g.shape)
        o, after = triton_chunks.chunk_gated_delta_rule(
            q, k, v, beta, decay, state.recurrent, layer, chunk=chunk, dtype=dtype, interpret=interpret_kernels()
        )
        o = o[:, o.shape[1] - rows :]
    else:
        o, after = reference.chunk_gated_delta_rule(inputs, state.recurrent[layer])
        o = o.astype(dtype)
    return o, DeltaState(conv_inputs[:, rows:], after)
