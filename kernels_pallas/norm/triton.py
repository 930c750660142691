"""Residual sums and RMS norms as Pallas kernels through the Triton lowering.

XLA makes a kernel of a sum and its norm, too, but another one for one row than for five, which adds up in another order. Here
a program takes a whole row, so that a row's result does not depend on how many there are, bit for bit. The kernel that
ends a layer begins the next one: it mixes the experts, adds them to the row and normalises it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Bool, Float

from kernels_pallas.grouped_matmul.triton import mixed
from kernels_pallas.partial_sums import PartialSums, load_partial_sum
from kernels_pallas.tiles import next_power_of_2


class MoeOutput(NamedTuple):
    """What the feed-forward block of a Mixture-of-Experts adds to its rows, in pieces: the sum over the chosen experts, and
    the shared expert by the sigmoid of its gate."""

    each: Float[Array, "N K D"]  # float32, weighted; undefined where a row is dead
    live: Bool[Array, " N"]
    shared: Float[Array, "S N D"]  # parts, to be added in their order, as those of the gate
    gate: Float[Array, "Sg N 1"]

    def whole(self, dtype: Any) -> Float[Array, "N D"]:
        """The sum in plain `lax`, rounded to `dtype` after every operation."""
        routed = mixed(self.each, self.live, dtype)
        gate, shared = PartialSums(self.gate).sum(jnp.float32), PartialSums(self.shared).sum(dtype)
        return routed + jax.nn.sigmoid(gate).astype(dtype) * shared


def _add_kernel(x_ref: Any, w_ref: Any, *refs: Any, eps: float) -> None:
    """One row."""
    *more, h_ref, y_ref = refs
    n, size, dtype = pl.program_id(0), x_ref.shape[1], x_ref.dtype
    at = jnp.arange(next_power_of_2(size))
    inside = at < size

    def rounded(x: Array) -> Array:
        return x.astype(dtype).astype(jnp.float32)

    if not more:
        y = jnp.zeros(at.shape, jnp.float32)
    elif len(more) == 1:
        y = rounded(load_partial_sum(more[0], n, at, mask=inside))
    else:
        each_ref, live_ref, shared_ref, gate_ref = more
        routed = jnp.zeros(at.shape, jnp.float32)
        for k in range(each_ref.shape[1]):
            routed = routed + plt.load(each_ref.at[n, jnp.int32(k), at], mask=inside, other=0)
        routed = jnp.where(plt.load(live_ref.at[n]) > 0, routed, 0.0)
        gate = lax.logistic(load_partial_sum(gate_ref, n, jnp.int32(0)))
        y = rounded(
            rounded(routed) + rounded(rounded(gate) * rounded(load_partial_sum(shared_ref, n, at, mask=inside)))
        )
    h = rounded(plt.load(x_ref.at[n, at], mask=inside, other=0).astype(jnp.float32) + y)
    plt.store(h_ref.at[n, at], h.astype(dtype), mask=inside)
    w = plt.load(w_ref.at[at], mask=inside, other=0).astype(jnp.float32)
    y = h * lax.rsqrt(jnp.sum(h * h) / size + eps) * (1.0 + w)
    plt.store(y_ref.at[n, at], y.astype(dtype), mask=inside)


def add_norm(
    x: Float[Array, "N D"],
    more: Float[Array, "S N D"] | MoeOutput | None,
    w: Float[Array, " D"],
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    """Rows with what is added to them, and these normalised: `h = x + more`, `h / rms(h) * (1 + w)`, in the dtype of x.

    Every operation is float32 and its result rounded to the dtype of x, as it would be between two of them.

    Args:
        more: parts, to be added in their order, or a mixture, or nothing.
        interpret: run as plain `jnp`, on any device.
    """
    operands: Any = [] if more is None else [more]
    if isinstance(more, MoeOutput):
        operands = more._replace(live=more.live.astype(jnp.int32))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        partial(_add_kernel, eps=eps),
        grid=x.shape[:1],
        out_shape=(shape, shape),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="norm_add",
    )(x, w, *operands)


def _gated_kernel(x_ref: Any, z_ref: Any, w_ref: Any, y_ref: Any, *, eps: float, gate: str) -> None:
    """One head of one row."""
    _, heads, size = x_ref.shape
    n, m, at = pl.program_id(0), pl.program_id(1), jnp.arange(next_power_of_2(x_ref.shape[2]))
    inside = at < size
    x = plt.load(x_ref.at[n, m, at], mask=inside, other=0).astype(jnp.float32)
    z = load_partial_sum(z_ref, n, m * size + at, mask=inside).astype(y_ref.dtype).astype(jnp.float32)
    w = plt.load(w_ref.at[at], mask=inside, other=0).astype(jnp.float32)
    act = lax.logistic(z) if gate == "sigmoid" else z * lax.logistic(z)
    y = x * lax.rsqrt(jnp.sum(x * x) / size + eps) * w * act
    plt.store(y_ref.at[n, m * size + at], y.astype(y_ref.dtype), mask=inside)


def gated_norm(
    x: Float[Array, "N M V"],
    z: Float[Array, "S N M*V"],
    w: Float[Array, " V"],
    eps: float,
    gate: str,
    *,
    interpret: bool = False,
) -> Float[Array, "N M*V"]:
    """`x / rms(x) * w * gate(z)` for each head, in the dtype of x.

    Args:
        z: parts, to be added in their order and rounded to the dtype of x.
        gate: "sigmoid", or else SiLU.
        interpret: run as plain `jnp`, on any device.
    """
    rows, heads, size = x.shape
    return pl.pallas_call(
        partial(_gated_kernel, eps=eps, gate=gate),
        grid=(rows, heads),
        out_shape=jax.ShapeDtypeStruct((rows, heads * size), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="norm_gated",
    )(x, z, w)
