"""Real shapes of `linear`, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.packed.formats import abstract_weight


class LinearShape(NamedTuple):
    """Sizes of one matrix of a model."""

    inputs: int
    outputs: int
    layers: int = 10  # of the stack from which compile checks and benchmarks read one


# The input projection of DeltaNet in Qwen3.5, 3.6 and Qwen3-Next: hidden size -> queries, keys and values.
SHAPES = {
    "0.8b": LinearShape(1024, 6144),
    "2b": LinearShape(2048, 6144),
    "4b": LinearShape(2560, 8192),
    "9b": LinearShape(4096, 8192),
    "27b": LinearShape(5120, 10240),
    "35b-a3b": LinearShape(2048, 8192),
    "122b-a10b": LinearShape(3072, 12288),
    "397b-a17b": LinearShape(4096, 12288),
    "next-80b-a3b": LinearShape(2048, 8192),
}
SQUARE = LinearShape(
    2048, 2048
)  # what compile checks and benchmarks multiply: hidden size to hidden size of the 35B-A3B
ROWS = {"decode": 5, "prefill": 2048}  # rows of a verify window with four drafts, and of a prompt chunk


def matmul_inputs(shape: LinearShape, rows: int, storage_format: str, dtype: DTypeLike) -> tuple[Any, ...]:
    """Return abstract arguments of the kernel `matmul`: rows, a stack of weights, and the layer."""
    stack = abstract_weight((shape.layers, shape.outputs, shape.inputs), storage_format)
    return jax.ShapeDtypeStruct((rows, shape.inputs), dtype), stack, jax.ShapeDtypeStruct((), jnp.int32)
