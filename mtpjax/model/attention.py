"""Gated attention: per-head query|gate projection, QK norm, partial RoPE, grouped queries, sigmoid gate on the output.

Keys and values go to the cache first; attention then reads the cache block by block with an online softmax and a
dynamic trip count. Memory is O(rows x block) and one program serves every context length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.attention import Entering, pick
from kernels_pallas.matmul import linears_split_k
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import platform
from mtpjax.config import ModelConfig
from mtpjax.model.cache import KV_BLOCK
from mtpjax.model.norm import rms_norm
from mtpjax.model.params import ParamFactory
from mtpjax.model.positions import Positions
from mtpjax.model.rope import rotate

KV = tuple[Array, Array]  # keys and values of all layers, each [A, B, N, S, H]
NEGATIVE = -1e30  # finite, so that a row without any key stays free of NaN


def write_kv(
    cache: KV, layer: Array | int, k: Float[Array, "B T N H"], v: Float[Array, "B T N H"], where: Positions
) -> KV:
    """Put rows at their positions; padding and rows beyond the cache are dropped."""
    slots = cache[0].shape[3]
    slot = jnp.where(where.live, where.positions, slots)
    b = jnp.arange(k.shape[0])[:, None]
    keys, values = cache
    return (
        keys.at[layer, b, :, slot].set(k.astype(keys.dtype), mode="drop"),
        values.at[layer, b, :, slot].set(v.astype(values.dtype), mode="drop"),
    )


def attend(q: Float[Array, "B T Q H"], cache: KV, layer: Array | int, where: Positions) -> Float[Array, "B T Q H"]:
    """Causal attention of the rows over the cache, scale `H ** -0.5`, softmax in float32; query head h reads h // G.

    Blocks in which a row sees nothing leave its sums bit for bit as they are, so a result does not depend on how long
    the other sequences of the batch are.
    """
    batch, rows, q_heads, size = q.shape
    kv_heads = cache[0].shape[2]
    group = q_heads // kv_heads
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)
    q = q.reshape(batch, rows, kv_heads, group, size)
    q = q.transpose(0, 2, 3, 1, 4)  # [B, N, G, T, H]

    def block(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = sums
        at = (layer, 0, 0, i * KV_BLOCK, 0)
        k, v = (lax.dynamic_slice(c, at, (1, batch, kv_heads, KV_BLOCK, size))[0].astype(q.dtype) for c in cache)
        seen = where.live[..., None] & (i * KV_BLOCK + jnp.arange(KV_BLOCK) <= where.positions[..., None])  # [B, T, S]
        seen = seen[:, None, None]
        # Keys first: a product whose second operand they are would begin with a transposed copy of them on a CPU.
        score = jnp.einsum("bnsh,bngth->bnsgt", k, q, precision=precision, preferred_element_type=jnp.float32)
        score = jnp.where(seen, jnp.moveaxis(score, 2, -1), NEGATIVE)
        new_top = jnp.maximum(top, jnp.max(score, axis=-1, keepdims=True))
        keep = jnp.exp(top - new_top)
        p = jnp.where(seen, jnp.exp(score - new_top), 0.0)
        add = jnp.einsum(
            "bngts,bnsh->bngth", p.astype(q.dtype), v, precision=precision, preferred_element_type=jnp.float32
        )
        return new_top, total * keep + jnp.sum(p, axis=-1, keepdims=True), out * keep + add

    shape = (batch, kv_heads, group, rows)
    first = (jnp.full((*shape, 1), NEGATIVE), jnp.zeros((*shape, 1)), jnp.zeros((*shape, size)))
    _, total, out = lax.fori_loop(0, where.blocks, block, first)
    out = out / jnp.where(total > 0, total, 1.0)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, rows, q_heads, size).astype(q.dtype)


class Attention(nnx.Module):
    """Weights of one gated attention layer (or a stack of them)."""

    def __init__(self, cfg: ModelConfig, new: ParamFactory):
        self.cfg = cfg
        width = cfg.q_heads * cfg.head_dim
        self.q = new.matrix(2 * width, cfg.hidden_size)  # per head: query rows, then gate rows
        self.k = new.matrix(cfg.kv_heads * cfg.head_dim, cfg.hidden_size)
        self.v = new.matrix(cfg.kv_heads * cfg.head_dim, cfg.hidden_size)
        self.o = new.matrix(cfg.hidden_size, width)
        self.q_norm = new.vector(cfg.head_dim)
        self.k_norm = new.vector(cfg.head_dim)

    def __call__(
        self, x: Float[Array, "B T D"], cache: KV, layer: Array | int, where: Positions, keep: int
    ) -> tuple[PartialSums, KV]:
        """Keys and values of all rows go to the cache; queries, attention and output are those of the last `keep`. The output
        is the partial sums of the last product, `[P, B*keep, D]`."""
        cfg, rows, size = self.cfg, x.shape[1], self.cfg.head_dim
        k_sums, v_sums, *queries = linears_split_k(
            x, self.k[...], self.v[...], *([self.q[...]] if keep == rows else [])
        )
        last, seen = x[:, rows - keep :], where.last(keep)
        if 0 < keep < rows:
            queries = linears_split_k(last, self.q[...])
        kernels = None if where.differentiable else pick(platform(), size, cache[0].shape[3])
        if kernels is not None:
            entering, norms = (
                Entering(k_sums.parts, v_sums.parts, queries[0].parts if keep else None),
                (self.k_norm[...], self.q_norm[...]),
            )
            q, cache = kernels.enter(
                entering,
                *norms,
                *where.turn,
                cache,
                layer,
                where.positions,
                where.live,
                eps=cfg.norm_eps,
                dtype=x.dtype,
            )
        else:
            k, v = (y.sum(x.dtype).reshape(*x.shape[:2], cfg.kv_heads, size) for y in (k_sums, v_sums))
            k = rotate(rms_norm(k, self.k_norm[...], cfg.norm_eps), where.turn)
            cache = write_kv(cache, layer, k, v, where)
        if keep == 0:
            return PartialSums(last.reshape(1, -1, x.shape[-1])), cache
        if kernels is not None:
            out = kernels.attend(q, *cache, layer, seen.positions, seen.live, queries[0].parts)
        else:
            heads = queries[0].sum(x.dtype).reshape(*last.shape[:2], cfg.q_heads, 2 * size)
            q, gate = jnp.split(heads, 2, axis=-1)
            out = attend(rotate(rms_norm(q, self.q_norm[...], cfg.norm_eps), seen.turn), cache, layer, seen)
            out = (out.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(x.dtype)
        return linears_split_k(out.reshape(*last.shape[:2], -1), self.o[...])[0], cache
