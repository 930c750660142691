"""The expert MLP over blocks of rows in plain `lax`: the oracle of the kernels, the CPU path, and differentiable.

A loop with a dynamic trip count reads one expert a turn out of the whole stack, so experts that nobody chose are never
read and nothing the size of the stack is ever copied.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.matmul import linear
from kernels_pallas.quantized import QuantizedTensor


def _reread(x: Array, dtype: jnp.dtype) -> Array:
    """The same bits as another dtype of that width."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _expert(
    stack: Array | QuantizedTensor, layer: Array, expert: Array, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "O D"]:
    """One expert's matrix, in `dtype` if it is packed. A uint16 stack holds the bit patterns of bfloat16 (see
    `mtpjax.loading.as_bits`)."""
    if isinstance(stack, QuantizedTensor):
        return jax.tree.map(lambda part: _expert(part, layer, expert), stack).dequantize(dtype)
    at = (layer, expert, 0, 0)
    w = lax.dynamic_slice(stack, at, (1, 1, *stack.shape[2:])).reshape(stack.shape[2:])
    return _reread(w, jnp.bfloat16) if w.dtype == jnp.uint16 else w


def _block(x: Array, index: Array, block: int) -> Array:
    return lax.dynamic_slice(x, (index * block, 0), (block, x.shape[1]))


def _swiglu(hidden: Float[Array, "rows 2I"]) -> Float[Array, "rows I"]:
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(hidden.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def block_mlp(
    x: Float[Array, "Z*block D"],
    gate_up: Array | QuantizedTensor,
    down: Array | QuantizedTensor,
    layer: Int[Array, ""],
    expert: Int[Array, " Z"],
    count: Int[Array, ""],
    block: int,
) -> Float[Array, "Z*block D"]:
    """`down_e(silu(gate_e x) * up_e x)` for the first `count` blocks of rows, e the expert of the block; zero elsewhere.

    Rows of the second axis of `gate_up`: I gate rows, then I up rows (as published).
    """
    store = jnp.uint16 if x.dtype == jnp.bfloat16 else x.dtype  # of bfloat16 a CPU would convert all rows, every turn

    def body(i: Array, out: Array) -> Array:
        hidden = linear(_block(x, i, block), _expert(gate_up, layer, expert[i], x.dtype))
        y = linear(_swiglu(hidden), _expert(down, layer, expert[i], x.dtype))
        return lax.dynamic_update_slice(out, _reread(y, store), (i * block, 0))

    return _reread(lax.fori_loop(0, count, body, jnp.zeros(x.shape, store)), x.dtype)


def _forward(x, gate_up, down, layer, expert, count, block):  # type: ignore[no-untyped-def]
    return block_mlp(x, gate_up, down, layer, expert, count, block), (x, gate_up, down, layer, expert, count)


def _backward(block, saved, grad):  # type: ignore[no-untyped-def]
    """One more pass over the blocks: recompute the hidden rows, add each block's share to its expert's gradient."""
    x, gate_up, down, layer, expert, count = saved

    def add(stack: Array, e: Array, update: Array) -> Array:
        new = _expert(stack, layer, e) + update.astype(stack.dtype)
        return lax.dynamic_update_slice(stack, new[None, None], (layer, e, 0, 0))

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dx, d_gate_up, d_down = carry
        e, rows, dy = expert[i], _block(x, i, block), _block(grad, i, block)
        hidden = linear(rows, _expert(gate_up, layer, e))
        act, pull = jax.vjp(_swiglu, hidden)
        (d_hidden,) = pull(linear(dy, _expert(down, layer, e).T))
        dx = lax.dynamic_update_slice(dx, linear(d_hidden, _expert(gate_up, layer, e).T), (i * block, 0))
        return dx, add(d_gate_up, e, linear(d_hidden.T, rows.T)), add(d_down, e, linear(dy.T, act.T))

    start = (jnp.zeros_like(x), jnp.zeros_like(gate_up), jnp.zeros_like(down))
    dx, d_gate_up, d_down = lax.fori_loop(0, count, body, start)
    whole = [np.zeros(np.shape(a), jax.dtypes.float0) for a in (layer, expert, count)]
    return dx, d_gate_up, d_down, *whole


block_mlp.defvjp(_forward, _backward)
