"""The expert MLP over windows of rows in plain `lax`: the oracle of the kernels, the CPU path, and differentiable.

A loop with a dynamic trip count reads one expert a turn out of the whole stack, so experts that nobody chose are never
read and nothing the size of the stack is ever copied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.matmul import linear
from kernels_pallas.weights.quantized import QuantizedTensor
from kernels_pallas.weights.transposed import FusedExperts, TransposedWeight

Experts = Array | QuantizedTensor | TransposedWeight | FusedExperts


def _reread(x: Array, dtype: jnp.dtype) -> Array:
    """The same bits as another dtype of that width."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _expert(stack: Any, layer: Array, expert: Array, dtype: jnp.dtype = jnp.float32) -> Any:
    """One expert's matrix `[O, D]`, in `dtype` if it is packed. A uint16 stack holds the bit patterns of bfloat16 (see
    `mtpjax.loading.cpu_layout`)."""
    if isinstance(stack, QuantizedTensor):
        return jax.tree.map(lambda part: _slice(part, layer, expert), stack).dequantize(dtype)
    if isinstance(stack, TransposedWeight):
        return TransposedWeight(_expert(_bits(stack.array), layer, expert))
    if isinstance(stack, FusedExperts):
        return TransposedWeight(_expert(jnp.swapaxes(_bits(stack.array), 1, 2), layer, expert))
    w = _slice(stack, layer, expert)
    return _reread(w, jnp.bfloat16) if w.dtype == jnp.uint16 else w


def _slice(stack: Array, layer: Array, expert: Array) -> Array:
    return lax.dynamic_slice(stack, (layer, expert, 0, 0), (1, 1, *stack.shape[2:])).reshape(stack.shape[2:])


def _bits(stack: Array) -> Array:
    """bfloat16 as uint16: a CPU would slice it by converting all of it."""
    return _reread(stack, jnp.uint16) if stack.dtype == jnp.bfloat16 else stack


def _rows(x: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice(x, (start, 0), (size, x.shape[1]))


def _swiglu(hidden: Float[Array, "*rows 2I"]) -> Float[Array, "*rows I"]:
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(hidden.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def window_mlp(
    x: Float[Array, "Z D"],
    gate_up: Experts,
    down: Experts,
    layer: Int[Array, ""],
    expert: Int[Array, " W"],
    start: Int[Array, " W"],
    first: Int[Array, " C+1"],
    sizes: tuple[int, ...],
) -> Float[Array, "Z D"]:
    """`down_e(silu(gate_e x) * up_e x)` for the rows of each window in use, e its expert; other rows as they are.

    Rows of the second axis of `gate_up`: I gate rows, then I up rows (as published). For the windows see `WindowPlan`.
    """
    store = jnp.uint16 if x.dtype == jnp.bfloat16 else x.dtype  # of bfloat16 a CPU would convert all rows, every turn

    def turn(size: int, i: Array, rows: Array) -> Array:  # a window is read once, so its result can take its place
        hidden = linear(_reread(_rows(rows, start[i], size), x.dtype), _expert(gate_up, layer, expert[i], x.dtype))
        y = linear(_swiglu(hidden), _expert(down, layer, expert[i], x.dtype))
        return lax.dynamic_update_slice(rows, _reread(y, store), (start[i], 0))

    return _reread(_each_window(turn, first, sizes, _reread(x, store)), x.dtype)


def all_experts_mlp(
    x: Float[Array, "N D"],
    gate_up: FusedExperts,
    down: TransposedWeight,
    layer: Int[Array, ""],
    share: Float[Array, "N E"],
) -> Float[Array, "N D"]:
    """Sum over e of `share[n, e] * mlp_e(x[n])`: every expert for every row, as two products.

    For few rows of small experts, where choosing one costs more than multiplying all.
    """
    inputs, experts, wide = gate_up.array.shape[1:]

    def of_layer(stack: Array) -> Array:
        return stack[0] if stack.shape[0] == 1 else lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    joined = TransposedWeight(of_layer(gate_up.array).reshape(inputs, experts * wide))
    act = _swiglu(linear(x, joined, out_dtype=jnp.float32).reshape(-1, experts, wide))
    act = jnp.where(
        share[..., None] > 0, act * share[..., None], 0
    )  # not chosen: zero even where the product is not finite
    return linear(
        act.astype(x.dtype).reshape(x.shape[0], -1), TransposedWeight(of_layer(down.array).reshape(-1, inputs))
    )


def _each_window(turn: Callable[[int, Array, Any], Any], first: Array, sizes: tuple[int, ...], carry: Any) -> Any:
    """`carry = turn(size, number, carry)` for every window in use: one loop a size."""
    for c, size in enumerate(sizes):
        carry = lax.fori_loop(first[c], first[c + 1], partial(turn, size), carry)
    return carry


def _forward(x, gate_up, down, layer, expert, start, first, sizes):  # type: ignore[no-untyped-def]
    args = (x, gate_up, down, layer, expert, start, first)
    return window_mlp(*args, sizes), args


def _backward(sizes, saved, grad):  # type: ignore[no-untyped-def]
    """One more pass over the windows: recompute the hidden rows, add each window's share to its expert's gradient."""
    x, gate_up, down, layer, expert, start, first = saved

    def add(stack: Array, e: Array, update: Array) -> Array:
        new = _expert(stack, layer, e) + update.astype(stack.dtype)
        return lax.dynamic_update_slice(stack, new[None, None], (layer, e, 0, 0))

    def turn(size: int, i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dx, d_gate_up, d_down = carry
        e, rows, dy = expert[i], _rows(x, start[i], size), _rows(grad, start[i], size)
        hidden = linear(rows, _expert(gate_up, layer, e))
        act, pull = jax.vjp(_swiglu, hidden)
        (d_hidden,) = pull(linear(dy, _expert(down, layer, e).T))
        dx = lax.dynamic_update_slice(dx, linear(d_hidden, _expert(gate_up, layer, e).T), (start[i], 0))
        return dx, add(d_gate_up, e, linear(d_hidden.T, rows.T)), add(d_down, e, linear(dy.T, act.T))

    zeros = (jnp.zeros_like(x), jnp.zeros_like(gate_up), jnp.zeros_like(down))
    dx, d_gate_up, d_down = _each_window(turn, first, sizes, zeros)
    whole = [np.zeros(np.shape(a), jax.dtypes.float0) for a in (layer, expert, start, first)]
    return dx, d_gate_up, d_down, *whole


window_mlp.defvjp(_forward, _backward)
