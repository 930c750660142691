"""Real shapes of `topk_softmax`, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.partial_sums import PartialSums


class RouterShape(NamedTuple):
    """Sizes of a model's router and of its shared expert."""

    num_experts: int
    experts_per_token: int
    shared_expert_size: int


# Published sizes of Qwen3.5 / Qwen3.6.
SHAPES = {
    "35b-a3b": RouterShape(num_experts=256, experts_per_token=8, shared_expert_size=512),
    "122b-a10b": RouterShape(num_experts=256, experts_per_token=8, shared_expert_size=1024),
    "397b-a17b": RouterShape(num_experts=512, experts_per_token=10, shared_expert_size=1024),
}
ROWS = {"decode": 5, "prefill": 2048}  # rows of a verify window with four drafts, and of a prompt chunk
LOGIT_PARTS, HIDDEN_PARTS = 16, 8  # partial sums of the two products with few rows


def topk_softmax_inputs(shape: RouterShape, rows: int) -> tuple[Any, ...]:
    """Return abstract arguments of `topk_softmax` but `k` and `dtype`: partial sums and valid rows."""

    def sums(parts: int, size: int) -> Any:
        abstract: Any = jax.ShapeDtypeStruct((parts, rows, size), jnp.float32)
        return PartialSums(abstract)

    hidden = sums(HIDDEN_PARTS, shape.shared_expert_size)
    return sums(LOGIT_PARTS, shape.num_experts), hidden, hidden, jax.ShapeDtypeStruct((rows,), jnp.bool_)
