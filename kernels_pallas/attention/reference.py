"""Attention over a key/value cache and the update of that cache, in plain JAX ("xla")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.projections import QkvProjections
from kernels_pallas.attention.rope import CosSin, apply_rope
from kernels_pallas.norm.reference import rms_norm
from kernels_pallas.partial_sums import PartialSums

KV_BLOCK = 256  # cache positions that one iteration of `attention` reads
MASK_VALUE = -1e30  # score of a masked key; it is finite because a row without any key would give NaN with -inf


def update_kv_cache(
    cache: tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]],
    layer: Int[Array, ""] | int,
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]]:
    """Write the keys and values of valid rows to their positions in `layer`; drop invalid rows."""
    keys, values = cache
    index = jnp.where(valid, positions, keys.shape[3])  # beyond the cache: "drop" leaves this row out
    b = jnp.arange(k.shape[0])[:, None]
    return (
        keys.at[layer, b, :, index].set(k.astype(keys.dtype), mode="drop"),
        values.at[layer, b, :, index].set(v.astype(values.dtype), mode="drop"),
    )


def norm_rope_update_cache(
    projections: QkvProjections,
    k_norm: Float[Array, " H"],
    q_norm: Float[Array, " H"],
    rope: CosSin,
    cache: tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    eps: float,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B R Q H"] | None, tuple[Float[Array, "A B N S H"], Float[Array, "A B N S H"]]]:
    """Return `rope(rms_norm(q)) / sqrt(H)` and the cache with `rope(rms_norm(k))` and v in it.

    Arguments as in `kernels_pallas.attention.norm_rope_update_cache`.
    """
    batch, rows = positions.shape
    size = k_norm.shape[0]
    k = projections.k.sum(dtype).reshape(batch, rows, -1, size)
    v = projections.v.sum(dtype).reshape(batch, rows, -1, size)
    k = apply_rope(rms_norm(k, k_norm, eps), rope)
    cache = update_kv_cache(cache, layer, k, v, positions, valid)
    if projections.q_gate is None:
        return None, cache
    heads = projections.q_gate.sum(dtype)
    last = heads.shape[0] // batch  # queries belong to the last rows
    heads = heads.reshape(batch, last, -1, 2 * size)
    q, _ = jnp.split(heads, 2, axis=-1)
    q = apply_rope(rms_norm(q, q_norm, eps), CosSin(rope.cos[:, rows - last :], rope.sin[:, rows - last :]))
    return (q.astype(jnp.float32) * size**-0.5).astype(q.dtype), cache


def attention(
    q: Float[Array, "B T Q H"],
    keys: Float[Array, "A B N S H"],
    values: Float[Array, "A B N S H"],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    gates: PartialSums,
    *,
    num_kv_blocks: Int[Array, ""] | int | None = None,
) -> Float[Array, "B T Q H"]:
    """Return `sigmoid(gate_t) * sum_{s <= position_t} softmax_s(q_t . k_s) v_s` for every row t and head.

    Arguments as in `kernels_pallas.attention.attention`. An iteration reads `KV_BLOCK` cache positions s. The loop
    keeps, for every row and head, the largest score m so far, the sum l of the weights and the weighted sum o of the
    values (online softmax, as in FlashAttention, arXiv:2205.14135):

        m' = max(m, max_s score_s)              p_s = exp(score_s - m')
        l' = l exp(m - m') + sum_s p_s          o' = o exp(m - m') + sum_s p_s v_s

    Memory is therefore O(T * KV_BLOCK), and one program serves every context length. A block in which a row sees no key
    leaves the sums of this row as they are, bit for bit: a result does not depend on how long other sequences are.
    """
    batch, rows, q_heads, size = q.shape
    kv_heads = keys.shape[2]
    group = q_heads // kv_heads
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    if num_kv_blocks is None:
        num_kv_blocks = jnp.max(jnp.where(valid, positions, -1)) // KV_BLOCK + 1
    grouped = q.reshape(batch, rows, kv_heads, group, size).transpose(0, 2, 3, 1, 4)  # [B, N, G, T, H]

    def add_block(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        running_max, total, out = sums
        start = (layer, 0, 0, i * KV_BLOCK, 0)
        k, v = (
            lax.dynamic_slice(c, start, (1, batch, kv_heads, KV_BLOCK, size))[0].astype(q.dtype) for c in (keys, values)
        )
        mask = valid[..., None] & (i * KV_BLOCK + jnp.arange(KV_BLOCK) <= positions[..., None])  # [B, T, KV_BLOCK]
        mask = mask[:, None, None]
        # The keys are the first operand, because XLA's CPU backend would begin with a transposed copy of a second one.
        score = jnp.einsum("bnsh,bngth->bnsgt", k, grouped, precision=precision, preferred_element_type=jnp.float32)
        score = jnp.where(mask, jnp.moveaxis(score, 2, -1), MASK_VALUE)
        new_max = jnp.maximum(running_max, jnp.max(score, axis=-1, keepdims=True))
        rescale = jnp.exp(running_max - new_max)
        p = jnp.where(mask, jnp.exp(score - new_max), 0.0)
        weighted = jnp.einsum(
            "bngts,bnsh->bngth", p.astype(q.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return new_max, total * rescale + jnp.sum(p, axis=-1, keepdims=True), out * rescale + weighted

    shape = (batch, kv_heads, group, rows)
    empty = (jnp.full((*shape, 1), MASK_VALUE), jnp.zeros((*shape, 1)), jnp.zeros((*shape, size)))
    _, total, out = lax.fori_loop(0, num_kv_blocks, add_block, empty)
    out = out / jnp.where(total > 0, total, 1.0)
    out = out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
    gate = gates.sum(q.dtype).reshape(batch, rows, q_heads, 2, size)[..., 1, :]
    return (out.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(q.dtype)
