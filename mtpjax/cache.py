"""`Cache`: everything a sequence remembers, as one value. Never stored on a module; steps take it and return it.

Holding on to a cache forks the sequence, keeps a prefix, or rolls back. Slots are token positions of the sequence, so
neither batch neighbours nor padding change where anything lies.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from mtpjax.config import ModelConfig

BLOCK = 256  # cache slots that attention reads at a time


@struct.dataclass
class Cache:
    """State of B sequences. A / L count attention and DeltaNet layers of the trunk; W rows wait to be accepted.

    A DeltaNet state cannot be truncated like keys and values. The rows of a verify window therefore stay outside
    `state` as rank-one updates (`pending_*`) until `accepted` says how many of them count; the next step folds exactly
    those in ("replay"). `conv` holds the inputs of the causal convolution before the window and in it.
    """

    k: Float[Array, "A B N S H"]
    v: Float[Array, "A B N S H"]
    state: Float[Array, "L B M K V"]  # float32
    conv: Float[Array, "L B width-1+W C"]
    pending_k: Float[Array, "L B W J K"]  # float32, normalised keys
    pending_d: Float[Array, "L B W M V"]  # float32, the d of the recurrence
    pending_g: Float[Array, "L B W M"]  # float32, log decay summed over the window
    accepted: Int[Array, " B"]  # rows of the window that count
    mtp_k: Float[Array, "1 B N S H"]
    mtp_v: Float[Array, "1 B N S H"]
    length: Int[Array, " B"]  # committed tokens; = position of the next one

    @property
    def slots(self) -> int:
        return self.k.shape[3]

    @property
    def window(self) -> int:
        return self.pending_k.shape[2]


def slots_for(max_len: int, window: int) -> int:
    """Cache slots for sequences of up to `max_len` tokens: room for one more window, in whole attention blocks."""
    return -(-(max_len + window) // BLOCK) * BLOCK


def new_cache(cfg: ModelConfig, batch: int, slots: int, *, window: int = 1, dtype: jnp.dtype = jnp.float32) -> Cache:
    """An empty cache for `batch` sequences of up to `slots` tokens.

    Args:
        window: rows of the verify step, draft length + 1.
        dtype: of keys, values and convolution inputs; the recurrent state is always float32.
    """
    kv = (batch, cfg.kv_heads, slots, cfg.head_dim)
    lin, j, m = (cfg.linear_layers, batch), cfg.linear_k_heads, cfg.linear_v_heads
    f32 = jnp.float32
    return Cache(
        k=jnp.zeros((cfg.full_layers, *kv), dtype),
        v=jnp.zeros((cfg.full_layers, *kv), dtype),
        state=jnp.zeros((*lin, m, cfg.linear_k_dim, cfg.linear_v_dim), f32),
        conv=jnp.zeros((*lin, cfg.conv_width - 1 + window, cfg.conv_size), dtype),
        pending_k=jnp.zeros((*lin, window, j, cfg.linear_k_dim), f32),
        pending_d=jnp.zeros((*lin, window, m, cfg.linear_v_dim), f32),
        pending_g=jnp.zeros((*lin, window, m), f32),
        accepted=jnp.zeros(batch, jnp.int32),
        mtp_k=jnp.zeros((cfg.mtp_layers, *kv), dtype),
        mtp_v=jnp.zeros((cfg.mtp_layers, *kv), dtype),
        length=jnp.zeros(batch, jnp.int32),
    )
