"""Real shapes of `fused_moe`, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.grouped_matmul.triton_shared import SharedExpert
from kernels_pallas.packed.formats import abstract_weight
from kernels_pallas.weights import LayerView


class MoeShape(NamedTuple):
    """Sizes of a model's routed experts."""

    hidden_size: int
    expert_size: int
    num_experts: int
    experts_per_token: int
    layers: int = 10  # of the stacks from which compile checks and benchmarks read one


# Published sizes of Qwen3.5, 3.6 and Qwen3-Next.
SHAPES = {
    "35b-a3b": MoeShape(hidden_size=2048, expert_size=512, num_experts=256, experts_per_token=8),
    "122b-a10b": MoeShape(hidden_size=3072, expert_size=1024, num_experts=256, experts_per_token=8),
    "397b-a17b": MoeShape(hidden_size=4096, expert_size=1024, num_experts=512, experts_per_token=10),
    "next-80b-a3b": MoeShape(hidden_size=2048, expert_size=512, num_experts=512, experts_per_token=10),
}
ROWS = {"decode": 5, "prefill": 2048}  # rows of a verify window with four drafts, and of a prompt chunk


def fused_moe_inputs(shape: MoeShape, rows: int, storage_format: str, dtype: DTypeLike) -> tuple[Any, ...]:
    """Return abstract positional arguments of `fused_moe`: arrays of shapes only."""
    spec, lead, topk = jax.ShapeDtypeStruct, (shape.layers, shape.num_experts), (rows, shape.experts_per_token)
    return (
        spec((rows, shape.hidden_size), dtype),
        abstract_weight((*lead, 2 * shape.expert_size, shape.hidden_size), storage_format),
        abstract_weight((*lead, shape.hidden_size, shape.expert_size), storage_format),
        spec((), jnp.int32),
        spec(topk, jnp.int32),
        spec(topk, jnp.float32),
        spec((rows,), jnp.bool_),
    )


def shared_expert_inputs(shape: MoeShape, rows: int, storage_format: str, dtype: DTypeLike) -> SharedExpert:
    """Return an abstract shared expert of the size of a routed one, as `fused_moe_unreduced` takes it."""
    spec = cast(Any, jax.ShapeDtypeStruct)
    down = abstract_weight((shape.layers, shape.hidden_size, shape.expert_size), storage_format)
    return SharedExpert(spec((rows, shape.expert_size), dtype), LayerView(down, spec((), jnp.int32)))
