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
    """The W rows of a verify window in a stack of layers, before it is known how many are accepted.

    A recurrent state cannot be truncated like keys and values. The rows therefore stay outside of it, as the rank-one
    updates `k delta^T` of the recurrence. When the number of accepted rows is known, exactly these updates are added:
    by `replay_updates`, or by the next window as it reads the state.

    For the second way there are two pages of L layers each, one behind the other. A window reads the updates of the
    window before from page `page` while it writes its own to the other one.
    """

    conv: Float[Array, "*layers B inputs C"]  # convolution inputs: the `past` ones before the window, then W rows
    k: Float[Array, "*layers B W J Dk"]  # float32, normalised
    delta: Float[Array, "*layers B W M Dv"]  # float32
    decay: Float[Array, "*layers B W M"]  # float32, log decay of each row
    accepted: Int[Array, " B"] | None = None  # rows on page `page` that the state lacks; None: there is one page
    page: Int[Array, ""] | None = None


def no_updates(state: DeltaState, rows: int, *, pages: int = 1) -> PendingDeltaUpdates:
    """Make room for the updates of one verify window.

    Args:
        state: the memory of a stack of layers, for its shapes.
        rows: W, rows of the window.
        pages: 2 if the next window adds the updates to the state.
    """
    layers, batch, past, channels = state.conv.shape
    heads, key_size, value_size = state.recurrent.shape[2:]
    key_heads, f32, lead = (channels - heads * value_size) // (2 * key_size), jnp.float32, (pages * layers, batch)
    return PendingDeltaUpdates(
        conv=jnp.zeros((*lead, past + rows, channels), state.conv.dtype),
        k=jnp.zeros((*lead, rows, key_heads, key_size), f32),
        delta=jnp.zeros((*lead, rows, heads, value_size), f32),
        decay=jnp.zeros((*lead, rows, heads), f32),
        accepted=jnp.zeros(batch, jnp.int32) if pages == 2 else None,
        page=jnp.int32(0) if pages == 2 else None,
    )


def page_offsets(page: Array | int | None, num_layers: int) -> tuple[Array | int, Array | int]:
    """Return the index of layer 0 on the page of the window before, and on the page that a window writes.

    Args:
        page: of the window before; None: there is one page.
    """
    return (0, 0) if page is None else (page * num_layers, (1 - page) * num_layers)


def replay(state: DeltaState, updates: PendingDeltaUpdates, accepted: Int[Array, " B"]) -> DeltaState:
    """Advance the memory of all layers by the first `accepted` rows of a verify window; forget the other rows.

    With `G_i` the log decay summed up to row i and n the number of accepted rows, the recurrent state becomes

        S <- exp(G_n) S + sum_{i <= n} exp(G_n - G_i) k_i delta_i^T

    The delta of a row does not depend on later rows, so this equals n steps of the recurrence. The convolution keeps
    the inputs that end at the last accepted row.

    Args:
        state: the memory before the window, with a leading axis of layers.
        updates: one page, with the same axis of layers.
        accepted: number of accepted rows of each sequence, 0...W. With 0 the sequence keeps every bit of its memory.
    """
    past = state.conv.shape[2]
    last_inputs = jax.vmap(lambda inputs, n: lax.dynamic_slice_in_dim(inputs, n, past, axis=1), (1, 0), 1)
    # In an idle window, which is all padding, the earlier inputs stand behind the padding, so a cut at 0 misses them.
    is_active = (accepted > 0)[None, :, None, None]
    conv = jnp.where(is_active, last_inputs(updates.conv, accepted), state.conv)
    return DeltaState(conv, _replay_recurrent(state.recurrent, updates, accepted))


def _replay_recurrent(
    state: Float[Array, "L B M Dk Dv"], updates: PendingDeltaUpdates, accepted: Int[Array, " B"]
) -> Float[Array, "L B M Dk Dv"]:
    """Add the updates one by one. No array of the state's size lies in between: one pass reads and writes it."""
    k, delta, decay = updates.k, updates.delta, jnp.cumsum(updates.decay, axis=2)
    last = jnp.take_along_axis(decay, jnp.maximum(accepted - 1, 0)[None, :, None, None], axis=2)  # [L, B, 1, M]
    is_accepted = (jnp.arange(decay.shape[2]) < accepted[:, None])[None, :, :, None]
    row_decay = jnp.where(is_accepted, jnp.exp(jnp.where(is_accepted, last - decay, 0.0)), 0.0)  # [L, B, W, M]
    state_decay = jnp.where(accepted[:, None] > 0, jnp.exp(last[:, :, 0]), 1.0)  # [L, B, M]
    k = jnp.repeat(k, state.shape[2] // k.shape[3], axis=3)
    operands = state_decay, k, delta * row_decay[..., None]

    def add(state: Array, state_decay: Array, k: Array, delta: Array) -> Array:
        state = state * state_decay[..., None, None]
        for i in range(k.shape[-3]):
            state = state + k[..., i, :, :, None] * delta[..., i, :, None, :]
        return state

    if decay.shape[2] > 1 or platform() != "cpu":
        return add(state, *operands)

    # For a single row, XLA's CPU backend would fuse everything that k and delta are computed from into the pass, and
    # compute it anew for every element of the state. The operands of a loop are computed before the loop.
    def add_to_layer(i: Array, state: Array) -> Array:
        new = add(*(lax.dynamic_index_in_dim(a, i, keepdims=False) for a in (state, *operands)))
        return lax.dynamic_update_index_in_dim(state, new, i, 0)

    return lax.fori_loop(0, state.shape[0], add_to_layer, state)
