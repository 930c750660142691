"""Real shapes of both ops, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.gated_delta_rule.inputs import DeltaProjections, DeltaWeights
from kernels_pallas.gated_delta_rule.state import DeltaState, no_updates
from kernels_pallas.partial_sums import PartialSums


class DeltaShape(NamedTuple):
    """Sizes of a model's DeltaNet layers."""

    layers: int  # DeltaNet layers, whose states share one array
    value_heads: int
    key_heads: int = 16
    key_size: int = 128
    value_size: int = 128
    conv_width: int = 4

    @property
    def channels(self) -> int:
        """Channels of the convolution, C."""
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size


# Published sizes of Qwen3.5 / Qwen3.6.
SHAPES = {
    "0.8b": DeltaShape(layers=18, value_heads=16),
    "2b": DeltaShape(layers=18, value_heads=16),
    "4b": DeltaShape(layers=24, value_heads=32),
    "9b": DeltaShape(layers=24, value_heads=32),
    "27b": DeltaShape(layers=48, value_heads=48),
    "35b-a3b": DeltaShape(layers=30, value_heads=32),
    "122b-a10b": DeltaShape(layers=36, value_heads=64),
    "397b-a17b": DeltaShape(layers=45, value_heads=64),
    "next-80b-a3b": DeltaShape(layers=36, value_heads=32),
}
ROWS = {"decode": 5, "prefill": 2048}  # rows of a verify window with four drafts, and of a prompt chunk
NUM_PARTIAL_SUMS = {"decode": 16, "prefill": 1}  # of the projections of the gates; those of qkv are one sum


def gated_delta_rule_inputs(
    shape: DeltaShape, rows: int, dtype: DTypeLike, *, batch: int = 1, num_partial_sums: int = 1
) -> tuple[Any, ...]:
    """Return abstract positional arguments of `chunk_gated_delta_rule`; see `with_updates` for those of a window.

    Args:
        shape: sizes of the layers.
        rows: token rows of each sequence.
        dtype: compute dtype.
        batch: number of sequences.
        num_partial_sums: partial sums of the projections of the gates; qkv is one sum, in `dtype`.
    """
    f32 = jnp.float32
    spec: Any = jax.ShapeDtypeStruct
    qkv = PartialSums(spec((1, batch * rows, shape.channels), dtype))
    gates = PartialSums(spec((num_partial_sums, batch * rows, shape.value_heads), f32))
    of_heads = spec((shape.value_heads,), f32)
    weights = DeltaWeights(spec((shape.channels, shape.conv_width), f32), of_heads, of_heads)
    lead = (shape.layers, batch)
    state = DeltaState(
        conv=spec((*lead, shape.conv_width - 1, shape.channels), dtype),
        recurrent=spec((*lead, shape.value_heads, shape.key_size, shape.value_size), f32),
    )
    pad, valid = spec((batch,), jnp.int32), spec((batch, rows), jnp.bool_)
    return DeltaProjections(qkv, gates, gates), weights, state, spec((), jnp.int32), pad, valid


def with_updates(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of `recurrent_gated_delta_rule` in a loop over windows from those of a prompt."""
    projections, weights, state, *where, valid = args
    pending = jax.eval_shape(lambda: no_updates(state, valid.shape[1], pages=2))
    return projections, weights, state, pending, *where, valid
