"""`Cache`: everything that a sequence remembers, as one value. Steps take it and return it; no module stores it.

Whoever holds on to a cache can fork the sequence, keep a prefix, or roll back. Keys and values are indexed by the
position of the token in its own sequence, so neither batch neighbours nor padding change where anything lies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.attention import KV_BLOCK
from kernels_pallas.gated_delta_rule import (
    DeltaState,
    PendingDeltaUpdates,
    accept_updates,
    no_updates,
    replay_updates,
    updates_between_windows,
)
from mtpjax.config import ModelConfig


class Cache(struct.PyTreeNode):
    """State of B sequences, for the A attention layers and the L DeltaNet layers of the trunk, and for the MTP head."""

    __no_type_check__ = True  # `jax.eval_shape` and `jax.tree.map` rebuild it with leaves that are not arrays

    k: Float[Array, "A B N S H"]
    v: Float[Array, "A B N S H"]
    state: Float[Array, "L B M Dk Dv"]  # float32
    conv: Float[Array, "L B past C"]  # the last `past` = `conv_width - 1` inputs of the causal convolutions
    mtp_k: Float[Array, "mtp_layers B N S H"]
    mtp_v: Float[Array, "mtp_layers B N S H"]
    length: Int[Array, " B"]  # number of committed tokens, which is the position of the next one
    mtp_start_pos: Int[Array, " B"]  # token position at index 0 of `mtp_k`; > 0 if the head skips part of the prompt

    @property
    def kv_len(self) -> int:
        """Positions that keys and values have room for."""
        return self.k.shape[3]


def padded_kv_length(max_len: int, window: int) -> int:
    """Return the cache length, in whole blocks, for sequences of up to `max_len` tokens and one more window of rows."""
    return -(-(max_len + window) // KV_BLOCK) * KV_BLOCK


def new_cache(cfg: ModelConfig, batch: int, kv_len: int, *, dtype: jnp.dtype = jnp.float32) -> Cache:
    """Make an empty cache.

    Args:
        cfg: sizes of the model.
        batch: number of sequences B.
        kv_len: positions of keys and values, S; see `padded_kv_length`.
        dtype: of keys, values and convolution inputs. The recurrent state is always float32.
    """
    kv = (batch, cfg.kv_heads, kv_len, cfg.head_dim)
    linear = (cfg.linear_layers, batch)
    return Cache(
        k=jnp.zeros((cfg.full_layers, *kv), dtype),
        v=jnp.zeros((cfg.full_layers, *kv), dtype),
        state=jnp.zeros((*linear, cfg.linear_v_heads, cfg.linear_k_dim, cfg.linear_v_dim), jnp.float32),
        conv=jnp.zeros((*linear, cfg.conv_width - 1, cfg.conv_channels), dtype),
        mtp_k=jnp.zeros((cfg.mtp_layers, *kv), dtype),
        mtp_v=jnp.zeros((cfg.mtp_layers, *kv), dtype),
        length=jnp.zeros(batch, jnp.int32),
        mtp_start_pos=jnp.zeros(batch, jnp.int32),
    )


def new_pending(cache: Cache, window: int) -> PendingDeltaUpdates:
    """Make room for the updates of one verify window of `window` rows."""
    return no_updates(DeltaState(cache.conv, cache.state), window)


def pending_between_windows(cache: Cache, window: int) -> PendingDeltaUpdates | None:
    """Return what a loop over verify windows of `window` rows begins with; see `updates_between_windows`."""
    return updates_between_windows(DeltaState(cache.conv, cache.state), window)


def accept(
    cache: Cache, pending: PendingDeltaUpdates, accepted: Int[Array, " B"]
) -> tuple[Cache, PendingDeltaUpdates | None]:
    """Accept the first `accepted` rows (0...W) of a verify window; forget the other rows.

    Inside a loop that began with `pending_between_windows` the accepted rows may wait for the next window. Before
    anything but a verify window reads the cache, it goes through `flush`.

    Returns:
        the cache, and the accepted rows that its states lack, if any.
    """
    state, pending_rows = accept_updates(DeltaState(cache.conv, cache.state), pending, accepted)
    return cache.replace(state=state.recurrent, conv=state.conv, length=cache.length + accepted), pending_rows


def flush(cache: Cache, pending: PendingDeltaUpdates | None) -> Cache:
    """Take the accepted rows that wait in `pending` into the cache."""
    state = replay_updates(DeltaState(cache.conv, cache.state), pending)
    return cache.replace(state=state.recurrent, conv=state.conv)


def commit(cache: Cache, pending: PendingDeltaUpdates, accepted: Int[Array, " B"]) -> Cache:
    """Take the first `accepted` rows (0...W) of a verify window into the cache; forget the other rows."""
    return flush(*accept(cache, pending, accepted))


PUT_SEQUENCE_DONATED = ("cache",)


def take_sequence(cache: Cache, index: Int[Array, ""], *, kv_len: int) -> Cache:
    """Return a copy of what one sequence remembers, as a cache of one sequence.

    Args:
        cache: of B sequences.
        index: of the sequence.
        kv_len: positions of keys and values to copy, from the first one on.
    """

    def take(array: Array) -> Array:  # [B], [layers, B, ...], or keys and values [layers, B, N, S, H]
        one = lax.dynamic_slice_in_dim(array, index, 1, min(array.ndim - 1, 1))
        return one[:, :, :, :kv_len] if _has_positions(array, cache) else one

    return jax.tree.map(take, cache)


def put_sequence(cache: Cache, sequence: Cache, index: Int[Array, ""]) -> Cache:
    """Let sequence `index` of a cache remember what `take_sequence` copied; further keys and values stay as they are.

    Args:
        cache: of B sequences; changed in place, if donated.
        sequence: of one sequence, with room for no more positions than `cache`.
    """

    def put(target: Array, source: Array) -> Array:
        start = [jnp.int32(0)] * target.ndim
        start[min(target.ndim - 1, 1)] = index
        return lax.dynamic_update_slice(target, source, start)

    return jax.tree.map(put, cache, sequence)


def put_hidden(hidden: Float[Array, "B D"], row: Float[Array, "1 D"], index: Int[Array, ""]) -> Float[Array, "B D"]:
    """Replace the hidden state of one sequence."""
    return lax.dynamic_update_slice_in_dim(hidden, row, index, 0)


def _has_positions(array: Array, cache: Cache) -> bool:
    return array.ndim == 5 and any(array is x for x in (cache.k, cache.v, cache.mtp_k, cache.mtp_v))
