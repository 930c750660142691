"""A Gated DeltaNet layer between its projections: `recurrent_gated_delta_rule` and `chunk_gated_delta_rule`; and the
acceptance of a verify window: `accept_updates` and `replay_updates`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.gated_delta_rule import reference, triton, triton_chunks
from kernels_pallas.gated_delta_rule.inputs import (
    DeltaProjections,
    DeltaWeights,
    GatedNorm,
    causal_conv_inputs,
    delta_inputs,
)
from kernels_pallas.gated_delta_rule.state import DeltaState, PendingDeltaUpdates, no_updates, page_offsets, replay
from kernels_pallas.norm import gated_rms_norm
from kernels_pallas.platform import interpret_kernels, platform, resolve_implementation


def recurrent_gated_delta_rule(
    projections: DeltaProjections,
    weights: DeltaWeights,
    state: DeltaState,
    pending: PendingDeltaUpdates,
    layer: Int[Array, ""] | int,
    pad: Int[Array, " B"],
    valid: Bool[Array, "B W"],
    *,
    norm: GatedNorm | None = None,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> tuple[Float[Array, "B W M Dv"], DeltaState, PendingDeltaUpdates]:
    """Run the few rows of a verify window, which may yet be rejected: they do not enter the memory of the layer.

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
        pending: the updates of the window before. If it says how many of its rows are accepted, they enter the memory
            of the layer first.
        layer: index of the layer in `state`.
        pad: number of padding rows in front of each sequence.
        valid: rows that count: from row `pad` on, without a gap. The other rows change nothing.
        norm: a gated norm of the outputs, which saves a launch; None: none.
        dtype: compute dtype.
        implementation: "xla", "triton", or None for the best of the platform that supports the shapes. "triton" has no
            gradient.

    Returns:
        the outputs o in `dtype`, or `gated_rms_norm` of them; the memory, without the rows of this window; and the
        updates, those of this window in place of older ones.

    Raises:
        ValueError: `implementation` is "triton" and the kernels do not support W, Dk or Dv.
    """
    num_layers, _, heads, key_size, value_size = state.recurrent.shape
    supported = triton.supports(valid.shape[1], key_size, value_size)
    if resolve_implementation(implementation, supported=supported) == "triton":
        end = pad + jnp.sum(valid, axis=1)
        args = projections, weights, state, pending, layer, pad, end
        return triton.recurrent_gated_delta_rule(*args, norm=norm, dtype=dtype, interpret=interpret_kernels())
    read, write = (first + layer for first in page_offsets(pending.page, num_layers))
    if pending.accepted is not None:
        of_layer = DeltaState(*(x[layer][None] for x in state))
        updates = _of_layers(pending, read, 1)
        after = replay(of_layer, updates, pending.accepted)
        state = DeltaState(*(x.at[layer].set(new[0]) for x, new in zip(state, after, strict=True)))
    conv_inputs = causal_conv_inputs(projections.qkv, state.conv[layer], pad, valid, dtype)
    inputs = delta_inputs(projections, weights, conv_inputs, valid, (heads, key_size, value_size), dtype)
    outputs = reference.recurrent_gated_delta_rule(inputs, state.recurrent[layer])
    new = {"conv": conv_inputs, "k": inputs.k, "delta": outputs.delta, "decay": inputs.g}
    new = {name: getattr(pending, name).at[write].set(array) for name, array in new.items()}
    o = outputs.o.astype(dtype)
    if norm is not None:
        y = gated_rms_norm(o.reshape(-1, heads, value_size), *norm, implementation="xla")
        o = y.reshape(o.shape)
    return o, state, pending._replace(**new)


def updates_between_windows(
    state: DeltaState, rows: int, *, implementation: str | None = None
) -> PendingDeltaUpdates | None:
    """Return what a loop over verify windows begins with: no updates, or None where `accept_updates` leaves none.

    On a GPU the next window adds the accepted rows as it reads the state, which saves a pass over all states. On a CPU
    one pass over all layers is faster.

    Args:
        state: the memory of all layers, for its shapes.
        rows: W, rows of a window.
        implementation: as in `recurrent_gated_delta_rule`.
    """
    if platform() == "cpu" and resolve_implementation(implementation) == "xla":
        return None
    return no_updates(state, rows, pages=2)


def accept_updates(
    state: DeltaState, pending: PendingDeltaUpdates, accepted: Int[Array, " B"]
) -> tuple[DeltaState, PendingDeltaUpdates | None]:
    """Accept the first `accepted` rows (0...W) of a verify window, and forget the other rows.

    Updates of `updates_between_windows` wait for the next window, or for `replay_updates`. Others enter the memory now.
    """
    if pending.page is None:
        return replay(state, pending, accepted), None
    return state, pending._replace(accepted=accepted, page=1 - pending.page)


def replay_updates(
    state: DeltaState, pending: PendingDeltaUpdates | None, *, implementation: str | None = None
) -> DeltaState:
    """Add the accepted rows that wait in `pending` to the memory of all layers.

    Args:
        state: the memory of all layers.
        pending: what `accept_updates` returned.
        implementation: as in `recurrent_gated_delta_rule`.

    Raises:
        ValueError: `implementation` is "triton" and the kernel does not support W, Dk or Dv.
    """
    num_layers, *_, key_size, value_size = state.recurrent.shape
    if pending is None or pending.accepted is None or not num_layers:
        return state
    updates = _of_layers(pending, page_offsets(pending.page, num_layers)[0], num_layers)
    after = replay(state, updates, pending.accepted)
    supported = triton.supports(pending.k.shape[2], key_size, value_size)
    if resolve_implementation(implementation, supported=supported) == "triton":
        recurrent = triton.replay_recurrent(state.recurrent, pending, interpret=interpret_kernels())
        after = after._replace(recurrent=recurrent)
    return after


def _of_layers(pending: PendingDeltaUpdates, first: Int[Array, ""] | int, layers: int) -> PendingDeltaUpdates:
    """Return the updates of `layers` layers, from index `first` on."""
    arrays = (jax.lax.dynamic_slice_in_dim(stack, first, layers) for stack in pending[:4])
    return PendingDeltaUpdates(*arrays)


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
    """Run the rows of a prompt, in chunks of 64 rows, which are counted from the first valid row of each sequence.

    Formula and arguments are those of `recurrent_gated_delta_rule`; the chunked form is that of arXiv:2406.06484, see
    `reference.py`. The place of a row in its chunk decides the order of sums. It is the place of the row in its
    sequence, however the sequence is cut into calls and whatever follows, if all calls but the last one read a multiple
    of 64 rows of it.

    Returns:
        the outputs o in `dtype`, and the memory with all rows in that of layer `layer`.

    Raises:
        ValueError: `implementation` is "triton" and the kernels do not support Dk or Dv.
    """
    heads, key_size, value_size = state.recurrent.shape[2:]
    rows = valid.shape[1]
    supported = triton_chunks.supports(reference.CHUNK, key_size, value_size)
    if resolve_implementation(implementation, supported=supported) == "triton":
        args = projections, weights, state, layer, pad, pad + jnp.sum(valid, axis=1)
        return triton_chunks.gated_delta_rule(*args, chunk=reference.CHUNK, dtype=dtype, interpret=interpret_kernels())
    conv_inputs = causal_conv_inputs(projections.qkv, state.conv[layer], pad, valid, dtype)
    inputs = delta_inputs(projections, weights, conv_inputs, valid, (heads, key_size, value_size), dtype)
    shift = pad % reference.CHUNK
    inputs = jax.tree.map(lambda x: _roll_rows(x, -shift), inputs)
    o, after = reference.chunk_gated_delta_rule(inputs, state.recurrent[layer])
    conv = state.conv.at[layer].set(conv_inputs[:, rows:])
    return _roll_rows(o.astype(dtype), shift), DeltaState(conv, state.recurrent.at[layer].set(after))


def _roll_rows(x: Float[Array, "B T *axes"], shift: Int[Array, " B"]) -> Float[Array, "B T *axes"]:
    """Move the rows of each sequence to the back by `shift` rows; those beyond the end come to the front."""
    batch, rows = x.shape[:2]
    source = (jnp.arange(rows) - shift[:, None]) % rows + rows * jnp.arange(batch)[:, None]
    return x.reshape(-1, *x.shape[2:]).at[source].get(mode="promise_in_bounds")
