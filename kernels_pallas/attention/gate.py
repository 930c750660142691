"""The sigmoid gate on the output of every head, inside a kernel."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from kernels_pallas.partial_sums import load_partial_sum


def apply_gate(
    out: Float[Array, "..."], gate_ref: Any, at: tuple[Array, ...], y_ref: Any, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """Multiply float32 values with the sigmoid of their gates, and return the dtype of `y_ref`.

    Args:
        out: values of heads.
        gate_ref: the projection `[P, B * T, Q * 2 * H]`: for each head the query, then the gate.
        at: sequence, row, head and channel of each value.
        y_ref: the result `[B, T, Q, H]`, whose dtype the values have before and after the gate.
        mask: values whose gates exist; None: all.
    """
    b, row, head, channel = at
    _, rows, _, size = y_ref.shape
    gate = load_partial_sum(gate_ref, b * rows + row, (2 * head + 1) * size + channel, mask=mask).astype(y_ref.dtype)
    return (out.astype(y_ref.dtype).astype(jnp.float32) * lax.logistic(gate.astype(jnp.float32))).astype(y_ref.dtype)
