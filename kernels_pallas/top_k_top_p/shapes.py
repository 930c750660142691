"""Real shapes of the op, shared by tests, compile checks and benchmarks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LogitsShape(NamedTuple):
    """Sizes of the logits of one call."""

    rows: int  # tokens to sample: sequences times rows of a verify window
    vocab: int


QWEN_VOCAB = 248_320  # of every published Qwen3.5 / Qwen3.6
SHAPES = {
    "decode": LogitsShape(rows=5, vocab=QWEN_VOCAB),  # one sequence with four drafts
    "draft": LogitsShape(rows=1, vocab=QWEN_VOCAB),
    "decode batch 8": LogitsShape(rows=40, vocab=QWEN_VOCAB),
}


def threshold_inputs(shape: LogitsShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return abstract positional arguments of `top_k_top_p_threshold`."""
    per_row = jax.ShapeDtypeStruct((shape.rows,), jnp.float32)
    logits = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return logits, per_row, per_row, jax.ShapeDtypeStruct((shape.rows,), jnp.int32), per_row
