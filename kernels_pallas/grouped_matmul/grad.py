"""Gradients of the routed experts with plain (not packed) weights; only training uses them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.grouped_matmul.windows import for_each_window, grouped_mlp, matmul, slice_rows, swiglu
from kernels_pallas.weights import Weight, expert_matrix


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def grouped_mlp_with_gradient(
    x: Float[Array, "places D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    expert_ids: Int[Array, " windows"],
    starts: Int[Array, " windows"],
    first: Int[Array, " bounds"],
    sizes: tuple[int, ...],
) -> Float[Array, "places D"]:
    """Return `grouped_mlp`, whose loops JAX cannot differentiate, with its gradient for `x`, `gate_up` and `down`."""
    return grouped_mlp(x, gate_up, down, layer, expert_ids, starts, first, sizes)


def _forward(*args: Any) -> tuple[Array, tuple[Any, ...]]:
    return grouped_mlp(*args), args[:-1]


def _backward(sizes: tuple[int, ...], saved: tuple[Any, ...], grad: Array) -> tuple[Any, ...]:
    """Run over the windows once more: recompute hidden rows, and add each window's share to its expert's gradient."""
    x, gate_up, down, layer, expert_ids, starts, first = saved

    def expert_of(stack: Array, expert: Array) -> Any:
        return expert_matrix(stack, layer, expert, jnp.float32)

    def add(stack: Array, expert: Array, update: Array) -> Array:
        new = expert_of(stack, expert) + update.astype(stack.dtype)
        return lax.dynamic_update_slice(stack, new[None, None], (layer, expert, 0, 0))

    def add_window(size: int, window: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dx, d_gate_up, d_down = carry
        e, start = expert_ids[window], starts[window]
        rows, dy = slice_rows(x, start, size), slice_rows(grad, start, size)
        hidden = matmul(rows, expert_of(gate_up, e))
        act, pull_back = jax.vjp(swiglu, hidden)
        (d_hidden,) = pull_back(matmul(dy, expert_of(down, e).T))
        dx = lax.dynamic_update_slice(dx, matmul(d_hidden, expert_of(gate_up, e).T), (start, 0))
        return dx, add(d_gate_up, e, matmul(d_hidden.T, rows.T)), add(d_down, e, matmul(dy.T, act.T))

    zeros = (jnp.zeros_like(x), jnp.zeros_like(gate_up), jnp.zeros_like(down))
    dx, d_gate_up, d_down = for_each_window(add_window, first, sizes, zeros)
    of_integers = [np.zeros(np.shape(a), jax.dtypes.float0) for a in (layer, expert_ids, starts, first)]
    return dx, d_gate_up, d_down, *of_integers


grouped_mlp_with_gradient.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_gradient_of(kernel: Callable[..., Array], reference: Callable[..., Array], *args: Array) -> Array:
    """Return `kernel(*args)`, with the gradient of `reference(*args)`: so a model trains on a GPU, too."""
    return kernel(*args)


def _kernel_forward(
    kernel: Callable[..., Array], reference: Callable[..., Array], *args: Array
) -> tuple[Array, tuple[Array, ...]]:
    return kernel(*args), args


def _kernel_backward(
    kernel: Callable[..., Array], reference: Callable[..., Array], args: tuple[Array, ...], grad: Array
) -> tuple[Any, ...]:
    return jax.vjp(reference, *args)[1](grad)


with_gradient_of.defvjp(_kernel_forward, _kernel_backward)
