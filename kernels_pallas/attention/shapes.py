"""Real shapes of both ops, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.attention.projections import QkvProjections
from kernels_pallas.attention.rope import CosSin
from kernels_pallas.partial_sums import PartialSums


class AttentionShape(NamedTuple):
    """Sizes of a model's attention layers and of the cache of one sequence."""

    layers: int  # attention layers, whose keys share one array
    q_heads: int
    kv_heads: int
    head_dim: int = 256
    rotary_dim: int = 64
    kv_len: int = 32768
    batch: int = 1


# Published sizes of Qwen3.5 / Qwen3.6.
SHAPES = {
    "0.8b": AttentionShape(layers=6, q_heads=8, kv_heads=2),
    "2b": AttentionShape(layers=6, q_heads=8, kv_heads=2),
    "4b": AttentionShape(layers=8, q_heads=16, kv_heads=4),
    "9b": AttentionShape(layers=8, q_heads=16, kv_heads=4),
    "27b": AttentionShape(layers=16, q_heads=24, kv_heads=4),
    "35b-a3b": AttentionShape(layers=10, q_heads=16, kv_heads=2),
    "122b-a10b": AttentionShape(layers=12, q_heads=32, kv_heads=2),
    "397b-a17b": AttentionShape(layers=15, q_heads=32, kv_heads=2),
    "next-80b-a3b": AttentionShape(layers=12, q_heads=16, kv_heads=2),
}
ROWS = {"decode": 5, "prefill": 2048}  # rows of a verify window with four drafts, and of a prompt chunk
NUM_PARTIAL_SUMS = {"decode": 8, "prefill": 1}  # of the key and value projections


def norm_rope_update_cache_inputs(
    shape: AttentionShape, rows: int, dtype: DTypeLike, *, num_partial_sums: int = 1
) -> tuple[Any, ...]:
    """Return abstract positional arguments of `norm_rope_update_cache`: arrays of shapes only."""
    spec: Any = jax.ShapeDtypeStruct
    size, f32 = shape.head_dim, jnp.float32
    sum_dtype = dtype if num_partial_sums == 1 else f32
    kv = PartialSums(spec((num_partial_sums, shape.batch * rows, shape.kv_heads * size), sum_dtype))
    q_gate = PartialSums(spec((1, shape.batch * rows, 2 * shape.q_heads * size), dtype))
    norm, angles = spec((size,), f32), spec((shape.batch, rows, shape.rotary_dim // 2), f32)
    cache, where = _cache(shape, dtype), _rows(shape, rows)
    return QkvProjections(kv, kv, q_gate), norm, norm, CosSin(angles, angles), (cache, cache), *where


def attention_inputs(shape: AttentionShape, rows: int, dtype: DTypeLike) -> tuple[Any, ...]:
    """Return abstract positional arguments of `attention`: arrays of shapes only."""
    q = jax.ShapeDtypeStruct((shape.batch, rows, shape.q_heads, shape.head_dim), dtype)
    spec: Any = jax.ShapeDtypeStruct
    gates = PartialSums(spec((1, shape.batch * rows, 2 * shape.q_heads * shape.head_dim), dtype))
    cache = _cache(shape, dtype)
    return q, cache, cache, *_rows(shape, rows), gates


def _cache(shape: AttentionShape, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((shape.layers, shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim), dtype)


def _rows(shape: AttentionShape, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Layer index, positions and valid mask."""
    spec, size = jax.ShapeDtypeStruct, (shape.batch, rows)
    return spec((), jnp.int32), spec(size, jnp.int32), spec(size, jnp.bool_)
