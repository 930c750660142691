"""`Cache`: everything a sequence remembers, as one value. Never stored on a module; steps take it and return it.

Holding on to a cache forks the sequence, keeps a prefix, or rolls back. Slots are token positions of the sequence, so
neither batch neighbours nor padding change where anything lies.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.attention import KV_BLOCK as BLOCK
from mtpjax.config import ModelConfig


class Cache(struct.PyTreeNode):
    """State of B sequences. A / L count the attention and DeltaNet layers of the trunk."""

    k: Float[Array, "A B N S H"]
    v: Float[Array, "A B N S H"]
    state: Float[Array, "L B M K V"]  # float32
    conv: Float[Array, "L B width-1 C"]  # the last inputs of the causal convolution
    mtp_k: Float[Array, "1 B N S H"]
    mtp_v: Float[Array, "1 B N S H"]
    length: Int[Array, " B"]  # committed tokens; = position of the next one
    mtp_start: Int[
        Array, " B"
    ]  # position of slot 0 of the head's keys and values; 0 unless it skips part of the prompt

    @property
    def slots(self) -> int:
        return self.k.shape[3]


class PendingDeltaUpdates(struct.PyTreeNode):
    """DeltaNet rows of a verify window of W rows that nobody has accepted yet.

    A recurrent state cannot be truncated like keys and values. The rows therefore stay outside it, as the rank-one
    updates k d^T of the recurrence, until it is known how many count; `commit` then adds exactly those ("replay").
    """

    conv: Float[Array, "L B width-1+W C"]  # convolution inputs, those before the window included
    k: Float[Array, "L B W J K"]  # float32, normalised
    d: Float[Array, "L B W M V"]  # float32
    decay: Float[Array, "L B W M"]  # float32, log decay summed over the window


def padded_kv_length(max_len: int, window: int) -> int:
    """Cache slots for sequences of up to `max_len` tokens and one more window of rows, in whole attention blocks."""
    return -(-(max_len + window) // BLOCK) * BLOCK


def new_cache(cfg: ModelConfig, batch: int, slots: int, *, dtype: jnp.dtype = jnp.float32) -> Cache:
    """An empty cache for `batch` sequences of up to `slots` tokens (see `padded_kv_length`).

    `dtype` is that of keys, values and convolution inputs; the recurrent state is always float32.
    """
    kv = (batch, cfg.kv_heads, slots, cfg.head_dim)
    lin = (cfg.linear_layers, batch)
    return Cache(
        k=jnp.zeros((cfg.full_layers, *kv), dtype),
        v=jnp.zeros((cfg.full_layers, *kv), dtype),
        state=jnp.zeros((*lin, cfg.linear_v_heads, cfg.linear_k_dim, cfg.linear_v_dim), jnp.float32),
        conv=jnp.zeros((*lin, cfg.conv_width - 1, cfg.conv_size), dtype),
        mtp_k=jnp.zeros((cfg.mtp_layers, *kv), dtype),
        mtp_v=jnp.zeros((cfg.mtp_layers, *kv), dtype),
        length=jnp.zeros(batch, jnp.int32),
        mtp_start=jnp.zeros(batch, jnp.int32),
    )


def new_pending(cfg: ModelConfig, batch: int, window: int, *, dtype: jnp.dtype = jnp.float32) -> PendingDeltaUpdates:
    """Room for the rows of one verify window; `dtype` as in `new_cache`."""
    lin, f32 = (cfg.linear_layers, batch), jnp.float32
    return PendingDeltaUpdates(
        conv=jnp.zeros((*lin, cfg.conv_width - 1 + window, cfg.conv_size), dtype),
        k=jnp.zeros((*lin, window, cfg.linear_k_heads, cfg.linear_k_dim), f32),
        d=jnp.zeros((*lin, window, cfg.linear_v_heads, cfg.linear_v_dim), f32),
        decay=jnp.zeros((*lin, window, cfg.linear_v_heads), f32),
    )
