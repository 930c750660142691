"""The MLPs of experts over windows of rows in plain `lax`.

A loop with a dynamic trip count reads one expert a turn out of the whole stack, so experts that no row chose are never
read, and nothing of the size of the stack is ever copied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.activation import silu_and_mul
from kernels_pallas.matmul.reference import linear
from kernels_pallas.weights import Weight, expert_matrix
from kernels_pallas.weights.bitcast import bitcast


def grouped_mlp(
    x: Float[Array, "places D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    expert_ids: Int[Array, " windows"],
    starts: Int[Array, " windows"],
    first: Int[Array, " bounds"],
    sizes: tuple[int, ...],
) -> Float[Array, "places D"]:
    """Return `down_e(silu(gate_e x) * up_e x)` for the rows of each window in use, and other rows as they are.

    The expert of the window is e.

    Args:
        gate_up: `[L, E, 2 I, D]`: I gate rows, then I up rows of each expert.
        down: `[L, E, D, I]`.
        expert_ids, starts, first: see `WindowLayout`.
        sizes: the rows of the windows of each size.
    """
    store = jnp.uint16 if x.dtype == jnp.bfloat16 else x.dtype  # of bfloat16 a CPU would convert all rows, every turn

    def multiply(size: int, window: Array, rows: Array) -> Array:
        e, start = expert_ids[window], starts[window]
        window_rows = bitcast(slice_rows(rows, start, size), x.dtype)
        hidden = linear(window_rows, expert_matrix(gate_up, layer, e, x.dtype), jnp.float32)
        y = matmul(swiglu(hidden).astype(x.dtype), expert_matrix(down, layer, e, x.dtype))
        return lax.dynamic_update_slice(rows, bitcast(y, store), (start, 0))  # no window reads these rows again

    return bitcast(for_each_window(multiply, first, sizes, bitcast(x, store)), x.dtype)


def matmul(x: Float[Array, "*rows F"], w: Weight) -> Float[Array, "*rows O"]:
    """Return `x @ w.T` in the dtype of `x`."""
    return linear(x, w, x.dtype)


def swiglu(hidden: Float[Array, "*rows two_I"]) -> Float[Array, "*rows I"]:
    """Return `silu(gate) * up` of rows that hold gate, then up; computed in float32."""
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    return silu_and_mul(gate, up).astype(hidden.dtype)


def slice_rows(x: Array, start: Array, size: int) -> Array:
    """Return `size` rows of `x` from `start` on."""
    return lax.dynamic_slice(x, (start, 0), (size, x.shape[1]))


def for_each_window(
    body: Callable[[int, Array, Any], Any], first: Int[Array, " bounds"], sizes: tuple[int, ...], carry: Any
) -> Any:
    """Run `carry = body(size, window, carry)` for every window in use, in one loop for each size."""
    for i, size in enumerate(sizes):
        carry = lax.fori_loop(first[i], first[i + 1], partial(body, size), carry)
    return carry
