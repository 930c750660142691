"""Residual sums and RMS norms as Pallas kernels through the Triton lowering.

XLA, too, makes one kernel of a sum and its norm, but its kernel for one row adds up in another order than its kernel
for five rows. Here a program computes a whole row, so a row's result does not depend on the number of rows, bit for
bit. The kernel that ends a layer begins the next one: it adds the experts' outputs to the row and normalises the sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas.norm.moe_output import MoeOutput
from kernels_pallas.partial_sums import PartialSums, load_partial_sum
from kernels_pallas.tiles import next_power_of_2

NUM_WARPS = 8  # of a program that computes a whole row


def _rms_norm_kernel(x_ref: Any, w_ref: Any, y_ref: Any, *, eps: float) -> None:
    """Compute one row."""
    n, channel = pl.program_id(0), jnp.arange(next_power_of_2(x_ref.shape[1]))
    mask = channel < x_ref.shape[1]
    x = plt.load(x_ref.at[n, channel], mask=mask, other=0).astype(jnp.float32)
    plt.store(y_ref.at[n, channel], _normalise(x, w_ref, channel, eps).astype(y_ref.dtype), mask=mask)


def _normalise(x: Float[Array, " channels"], w_ref: Any, channel: Int[Array, " channels"], eps: float) -> Array:
    """Return a row divided by its root mean square, times the norm weight. Channels beyond the row are 0."""
    size = w_ref.shape[0]
    w = plt.load(w_ref.at[channel], mask=channel < size, other=0).astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x * x) / size + eps) * (1.0 + w)


def _add_rms_norm_kernel(x_ref: Any, w_ref: Any, *refs: Any, eps: float) -> None:
    """Compute one row. Between weight and outputs `refs` hold an array of partial sums or a `MoeOutput`."""
    *delta_refs, h_ref, y_ref = refs
    n, size, dtype = pl.program_id(0), x_ref.shape[1], x_ref.dtype
    channel = jnp.arange(next_power_of_2(size))
    mask = channel < size

    def rounded(x: Array) -> Array:
        return x.astype(dtype).astype(jnp.float32)

    if len(delta_refs) == 1:
        delta = rounded(load_partial_sum(delta_refs[0], n, channel, mask=mask))
    else:
        experts_ref, valid_ref, shared_ref, gate_ref = delta_refs
        routed = jnp.zeros(channel.shape, jnp.float32)
        for k in range(experts_ref.shape[1]):
            routed = routed + plt.load(experts_ref.at[n, jnp.int32(k), channel], mask=mask, other=0)
        routed = jnp.where(plt.load(valid_ref.at[n]) > 0, routed, 0.0)
        gate = rounded(lax.logistic(load_partial_sum(gate_ref, n, jnp.int32(0))))
        shared = rounded(gate * rounded(load_partial_sum(shared_ref, n, channel, mask=mask)))
        delta = rounded(rounded(routed) + shared)
    h = rounded(plt.load(x_ref.at[n, channel], mask=mask, other=0).astype(jnp.float32) + delta)
    plt.store(h_ref.at[n, channel], h.astype(dtype), mask=mask)
    plt.store(y_ref.at[n, channel], _normalise(h, w_ref, channel, eps).astype(dtype), mask=mask)


def rms_norm(
    x: Float[Array, "rows D"], w: Float[Array, " D"], eps: float, *, interpret: bool = False
) -> Float[Array, "rows D"]:
    """See `kernels_pallas.norm.rms_norm`.

    Args:
        interpret: run the kernel in interpret mode, on any device.
    """
    return pl.pallas_call(
        partial(_rms_norm_kernel, eps=eps),
        grid=x.shape[:1],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="norm",
    )(x, w)


def add_rms_norm(
    x: Float[Array, "rows D"],
    delta: PartialSums | MoeOutput,
    w: Float[Array, " D"],
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "rows D"], Float[Array, "rows D"]]:
    """See `kernels_pallas.norm.add_rms_norm`.

    Args:
        interpret: run the kernel in interpret mode, on any device.
    """
    if isinstance(delta, MoeOutput):
        delta = delta._replace(valid=delta.valid.astype(jnp.int32))  # the kernel compares integers
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    h, normed = pl.pallas_call(
        partial(_add_rms_norm_kernel, eps=eps),
        grid=x.shape[:1],
        out_shape=(shape, shape),
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="norm_add",
    )(x, w, *jax.tree.leaves(delta))
    return h, normed


def _sum_rms_norm_kernel(delta_ref: Any, w_ref: Any, h_ref: Any, y_ref: Any, *, eps: float) -> None:
    """Compute one row."""
    n, channel = pl.program_id(0), jnp.arange(next_power_of_2(h_ref.shape[1]))
    mask = channel < h_ref.shape[1]
    h = load_partial_sum(delta_ref, n, channel, mask=mask).astype(h_ref.dtype)
    plt.store(h_ref.at[n, channel], h, mask=mask)
    y = _normalise(h.astype(jnp.float32), w_ref, channel, eps)
    plt.store(y_ref.at[n, channel], y.astype(y_ref.dtype), mask=mask)


def sum_rms_norm(
    delta: PartialSums, w: Float[Array, " D"], eps: float, dtype: DTypeLike, *, interpret: bool = False
) -> tuple[Float[Array, "rows D"], Float[Array, "rows D"]]:
    """See `kernels_pallas.norm.sum_rms_norm`.

    Args:
        interpret: run the kernel in interpret mode, on any device.
    """
    _, rows, size = delta.parts.shape
    shape = jax.ShapeDtypeStruct((rows, size), dtype)
    h, normed = pl.pallas_call(
        partial(_sum_rms_norm_kernel, eps=eps),
        grid=(rows,),
        out_shape=(shape, shape),
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="norm_sum",
    )(delta.parts, w)
    return h, normed


def _concatenated_rms_norm_kernel(
    a_ref: Any, b_ref: Any, a_weight_ref: Any, b_weight_ref: Any, y_ref: Any, *, eps: float
) -> None:
    """Compute one row of one of the arrays."""
    n, size = pl.program_id(0), a_ref.shape[1]
    channel = jnp.arange(next_power_of_2(size))
    mask = channel < size
    for which, (x_ref, w_ref) in enumerate(((a_ref, a_weight_ref), (b_ref, b_weight_ref))):

        @pl.when(pl.program_id(1) == which)
        def store(which: int = which, x_ref: Any = x_ref, w_ref: Any = w_ref) -> None:
            x = plt.load(x_ref.at[n, channel], mask=mask, other=0).astype(jnp.float32)
            y = _normalise(x, w_ref, channel, eps)
            plt.store(y_ref.at[n, which * size + channel], y.astype(y_ref.dtype), mask=mask)


def concatenated_rms_norm(
    pair: tuple[Float[Array, "rows D"], Float[Array, "rows D"]],
    weights: tuple[Float[Array, " D"], Float[Array, " D"]],
    eps: float,
    *,
    interpret: bool = False,
) -> Float[Array, "rows two_D"]:
    """See `kernels_pallas.norm.concatenated_rms_norm`.

    Args:
        interpret: run the kernel in interpret mode, on any device.
    """
    rows, size = pair[0].shape
    return pl.pallas_call(
        partial(_concatenated_rms_norm_kernel, eps=eps),
        grid=(rows, 2),
        out_shape=jax.ShapeDtypeStruct((rows, 2 * size), pair[0].dtype),
        compiler_params=plt.CompilerParams(num_warps=NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="norm_pair",
    )(*pair, *weights)


def _gated_rms_norm_kernel(x_ref: Any, z_ref: Any, w_ref: Any, y_ref: Any, *, eps: float, gate: str) -> None:
    """Compute one head of one row."""
    size = x_ref.shape[2]
    n, m, channel = pl.program_id(0), pl.program_id(1), jnp.arange(next_power_of_2(size))
    mask = channel < size
    x = plt.load(x_ref.at[n, m, channel], mask=mask, other=0).astype(jnp.float32)
    z = load_partial_sum(z_ref, n, m * size + channel, mask=mask).astype(y_ref.dtype).astype(jnp.float32)
    w = plt.load(w_ref.at[channel], mask=mask, other=0).astype(jnp.float32)
    activation = lax.logistic(z) if gate == "sigmoid" else z * lax.logistic(z)
    y = x * lax.rsqrt(jnp.sum(x * x) / size + eps) * w * activation
    plt.store(y_ref.at[n, m * size + channel], y.astype(y_ref.dtype), mask=mask)


def gated_rms_norm(
    x: Float[Array, "rows M Dv"],
    z: PartialSums,
    w: Float[Array, " Dv"],
    eps: float,
    gate: str,
    *,
    interpret: bool = False,
) -> Float[Array, "rows M*Dv"]:
    """See `kernels_pallas.norm.gated_rms_norm`.

    Args:
        interpret: run the kernel in interpret mode, on any device.
    """
    rows, heads, size = x.shape
    return pl.pallas_call(
        partial(_gated_rms_norm_kernel, eps=eps, gate=gate),
        grid=(rows, heads),
        out_shape=jax.ShapeDtypeStruct((rows, heads * size), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="norm_gated",
    )(x, z.parts, w)
