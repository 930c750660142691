"""The memory of DeltaNet layers, what the rows of a verify window would change in it, and the replay of those rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.platform import platform


class DeltaState(NamedTuple):
    """The memory of B sequences in one layer, or, with a leading axis, in a stack of layers."""

    conv: Float[Array, "*layers B past C"]  # the last `past` = `width - 1` inputs of the causal convolution
    recurrent: Float[Array, "*layers B M Dk Dv"]  # float32


class PendingDeltaUpdates(NamedTuple):
    """The W rows of a verify window in one layer or a stack of layers, before it is known how many are accepted.

    A recurrent state cannot be truncated like keys and values. The rows therefore stay outside of it, as the rank-one
    updates `k delta^T` of the recurrence. When the number of accepted rows is known, `replay_updates` adds exactly
    these updates.
    """

    conv: Float[Array, "*layers B inputs C"]  # convolution inputs: the `past` ones before the window, then W rows
    k: Float[Array, "*layers B W J Dk"]  # float32, normalised
    delta: Float[Array, "*layers B W M Dv"]  # float32
    decay: Float[Array, "*layers B W M"]  # float32, log decay summed over the window


def replay_updates(state: DeltaState, pending: PendingDeltaUpdates, accepted: Int[Array, " B"]) -> DeltaState:
    """Advance the memory of all layers by the first `accepted` rows of a verify window; forget the other rows.

    With `G_i` the log decay summed up to row i and n the number of accepted rows, the recurrent state becomes

        S <- exp(G_n) S + sum_{i <= n} exp(G_n - G_i) k_i delta_i^T

    The delta of a row does not depend on later rows, so this equals n steps of the recurrence. The convolution keeps
    the inputs that end at the last accepted row.

    Args:
        state: the memory before the window, with a leading axis of layers.
        pending: what `recurrent_gated_delta_rule` returned for each layer, stacked.
        accepted: number of accepted rows of each sequence, 0...W. With 0 the sequence keeps every bit of its memory.
    """
    past = state.conv.shape[2]
    last_inputs = jax.vmap(lambda inputs, n: lax.dynamic_slice_in_dim(inputs, n, past, axis=1), (1, 0), 1)
    # In an idle window, which is all padding, the earlier inputs stand behind the padding, so a cut at 0 misses them.
    is_active = (accepted > 0)[None, :, None, None]
    conv = jnp.where(is_active, last_inputs(pending.conv, accepted), state.conv)
    return DeltaState(conv, _replay_recurrent(state.recurrent, pending, accepted))


def _replay_recurrent(
    state: Float[Array, "L B M Dk Dv"], pending: PendingDeltaUpdates, accepted: Int[Array, " B"]
) -> Float[Array, "L B M Dk Dv"]:
    """Add the updates one by one. No array of the state's size lies in between: one pass reads and writes it."""
    k, delta, decay = pending.k, pending.delta, pending.decay
    last = jnp.take_along_axis(decay, jnp.maximum(accepted - 1, 0)[None, :, None, None], axis=2)  # [L, B, 1, M]
    is_accepted = (jnp.arange(decay.shape[2]) < accepted[:, None])[None, :, :, None]
    row_decay = jnp.where(is_accepted, jnp.exp(jnp.where(is_accepted, last - decay, 0.0)), 0.0)  # [L, B, W, M]
    state_decay = jnp.where(accepted[:, None] > 0, jnp.exp(last[:, :, 0]), 1.0)  # [L, B, M]
    k = jnp.repeat(k, state.shape[2] // k.shape[3], axis=3)
    updates = state_decay, k, delta * row_decay[..., None]

    def add(state: Array, state_decay: Array, k: Array, delta: Array) -> Array:
        state = state * state_decay[..., None, None]
        for i in range(k.shape[-3]):
            state = state + k[..., i, :, :, None] * delta[..., i, :, None, :]
        return state

    if decay.shape[2] > 1 or platform() != "cpu":
        return add(state, *updates)

    # For a single row, XLA's CPU backend would fuse everything that k and delta are computed from into the pass, and
    # compute it anew for every element of the state. The operands of a loop are computed before the loop.
    def add_to_layer(i: Array, state: Array) -> Array:
        new = add(*(lax.dynamic_index_in_dim(a, i, keepdims=False) for a in (state, *updates)))
        return lax.dynamic_update_index_in_dim(state, new, i, 0)

    return lax.fori_loop(0, state.shape[0], add_to_layer, state)
