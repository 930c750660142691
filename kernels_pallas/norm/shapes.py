"""Real shapes of both ops, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.norm.moe_output import MoeOutput
from kernels_pallas.partial_sums import PartialSums


class NormShape(NamedTuple):
    """Sizes of a model's rows."""

    hidden_size: int
    value_heads: int  # DeltaNet heads, which the gated norm normalises one by one
    experts_per_token: int = 0  # 0: a dense model
    value_dim: int = 128


# Published sizes of Qwen3.5 / Qwen3.6.
SHAPES = {
    "0.8b": NormShape(hidden_size=1024, value_heads=16),
    "2b": NormShape(hidden_size=2048, value_heads=16),
    "4b": NormShape(hidden_size=2560, value_heads=32),
    "9b": NormShape(hidden_size=4096, value_heads=32),
    "27b": NormShape(hidden_size=5120, value_heads=48),
    "35b-a3b": NormShape(hidden_size=2048, value_heads=32, experts_per_token=8),
    "122b-a10b": NormShape(hidden_size=3072, value_heads=64, experts_per_token=8),
    "397b-a17b": NormShape(hidden_size=4096, value_heads=64, experts_per_token=10),
}
ROWS = {"decode": 5, "prefill": 2048}  # rows of a verify window with four drafts, and of a prompt chunk


def add_rms_norm_inputs(shape: NormShape, rows: int, dtype: DTypeLike) -> tuple[Any, ...]:
    """Return abstract positional arguments of `add_rms_norm` but `eps`, as they are after a feed-forward block."""
    spec: Any = jax.ShapeDtypeStruct
    f32, sums = jnp.float32, PartialSums(spec((2, rows, shape.hidden_size), jnp.float32))
    delta: PartialSums | MoeOutput = sums
    if shape.experts_per_token:
        experts = spec((rows, shape.experts_per_token, shape.hidden_size), f32)
        delta = MoeOutput(experts, spec((rows,), jnp.bool_), sums, PartialSums(spec((16, rows, 1), f32)))
    return spec((rows, shape.hidden_size), dtype), delta, spec((shape.hidden_size,), f32)


def gated_rms_norm_inputs(shape: NormShape, rows: int, dtype: DTypeLike) -> tuple[Any, ...]:
    """Return abstract positional arguments of `gated_rms_norm` but `eps` and `gate`."""
    spec: Any = jax.ShapeDtypeStruct
    f32 = jnp.float32
    z = PartialSums(spec((2, rows, shape.value_heads * shape.value_dim), f32))
    return spec((rows, shape.value_heads, shape.value_dim), dtype), z, spec((shape.value_dim,), f32)
