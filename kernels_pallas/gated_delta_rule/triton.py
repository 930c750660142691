"""The rows of a verify window through Gated DeltaNet, from the projections to the output, as one Pallas kernel through
the Triton lowering.

In the chunked form a window of five rows is twenty small products a layer. Each is a kernel that takes longer to start
than to run, and so do the convolution and the gates before them. Here a program holds some columns of a head's state,
steps through the rows, and computes their q, k and v itself. The state is read once. It is not written, since it is
not known yet how many rows will be accepted. A row's result does not depend on the rows after it or on the other
sequences, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas.gated_delta_rule.inputs import DeltaProjections, DeltaWeights
from kernels_pallas.gated_delta_rule.state import DeltaState
from kernels_pallas.partial_sums import load_partial_sum
from kernels_pallas.tiles import index_grid

DECODE_ROWS = 16  # largest window; with more rows the chunked form is faster
STATE_COLUMNS = 32  # columns of the state that a program holds


class WindowOutputs(NamedTuple):
    """Results of the kernel for W rows."""

    o: Float[Array, "B W M Dv"]  # in the compute dtype
    delta: Float[Array, "B W M Dv"]  # float32, updates of the state
    k: Float[Array, "B W J Dk"]  # float32, normalised keys
    decay: Float[Array, "B W M"]  # float32, log decay summed over the window


class _InputRefs(NamedTuple):
    """Refs of the kernel's inputs, with the axes of the arguments of `recurrent_gated_delta_rule`."""

    layer: Any  # [1]
    start: Any
    end: Any
    qkv: Any
    beta: Any
    decay: Any
    conv_weight: Any
    a_log: Any
    dt_bias: Any
    conv_state: Any
    state: Any


class _OutputRefs(NamedTuple):
    """Refs of `WindowOutputs`."""

    o: Any
    delta: Any
    k: Any
    decay: Any


def _window_kernel(refs: _InputRefs, out: _OutputRefs, *, columns: int, dtype: DTypeLike) -> None:
    """Step through all rows of one sequence, for `columns` columns of the state of one value head."""
    _, num_rows, value_heads, value_size = out.o.shape
    key_heads, key_size = out.k.shape[2:]
    past = refs.conv_state.shape[2]
    b, m = pl.program_id(0) // value_heads, pl.program_id(0) % value_heads
    j = m // (value_heads // key_heads)
    channel, column = jnp.arange(key_size), pl.program_id(1) * columns + jnp.arange(columns)
    state_row, state_column = index_grid(channel, column)
    start, end, layer = refs.start[b], refs.end[b], refs.layer[0]

    def silu_conv(t: Array, channels: Array) -> Array:
        """Return SiLU of the convolution at row t. The last inputs of the step before stand behind the padding."""
        total = jnp.zeros(channels.shape, jnp.float32)
        for tap in range(past + 1):
            index = t + tap  # among the `past` inputs and the rows
            before, row = index - start, index - past
            is_before, is_row = (before >= 0) & (before < past), (before >= past) & (row < end)
            all_channels = jnp.ones(channels.shape, bool)
            at = b * num_rows + jnp.maximum(row, 0), channels
            new = load_partial_sum(refs.qkv, *at, mask=all_channels & is_row).astype(dtype)
            new = new.astype(refs.conv_state.dtype).astype(jnp.float32)
            old_ref = refs.conv_state.at[layer, b, jnp.clip(before, 0, past - 1), channels]
            x = new + plt.load(old_ref, mask=all_channels & is_before, other=0).astype(jnp.float32)
            total = total + x * plt.load(refs.conv_weight.at[channels, tap]).astype(jnp.float32)
        return (total * lax.logistic(total)).astype(dtype).astype(jnp.float32)

    def normalised(t: Array, first_channel: Array) -> Array:
        y = silu_conv(t, first_channel + channel)
        return y * lax.rsqrt(jnp.sum(y * y) + 1e-6)

    rate = -jnp.exp(plt.load(refs.a_log.at[m]).astype(jnp.float32))

    def step(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, decay = carry
        valid, n = (t >= start) & (t < end), b * num_rows + t
        q, k = normalised(t, j * key_size) * key_size**-0.5, normalised(t, (key_heads + j) * key_size)
        v = silu_conv(t, 2 * key_heads * key_size + m * value_size + column)
        a = load_partial_sum(refs.decay, n, m) + plt.load(refs.dt_bias.at[m]).astype(jnp.float32)
        softplus = jnp.maximum(a, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(a)))
        g = jnp.where(valid, rate * softplus, 0.0)
        beta = jnp.where(valid, lax.logistic(load_partial_sum(refs.beta, n, m)), 0.0)
        state, decay = state * jnp.exp(g), decay + g
        delta = beta * (v - jnp.sum(state * k[:, None], axis=0))
        state = state + k[:, None] * delta[None, :]
        plt.store(out.delta.at[b, t, m, column], delta)
        plt.store(out.o.at[b, t, m, column], jnp.sum(state * q[:, None], axis=0).astype(out.o.dtype))
        plt.store(out.k.at[b, t, j, channel], k)  # all programs of the key head store the same bits
        plt.store(out.decay.at[b, t, m], decay)
        return state, decay

    # Keep the trip count opaque to the compiler, which would otherwise specialise the one-row program: one row and
    # five rows must round alike.
    iterations = jnp.where(end >= 0, jnp.int32(num_rows), jnp.int32(0))
    state = plt.load(refs.state.at[layer, b, m, state_row, state_column])
    lax.fori_loop(0, iterations, step, (state, jnp.float32(0)))


def supports(rows: int, key_size: int, value_size: int) -> bool:
    """Return whether the kernel supports windows of `rows` rows and heads of these sizes."""

    def is_power_of_2(size: int) -> bool:
        return size >= 16 and size & (size - 1) == 0

    return rows <= DECODE_ROWS and is_power_of_2(key_size) and is_power_of_2(value_size)


def recurrent_gated_delta_rule(
    projections: DeltaProjections,
    weights: DeltaWeights,
    state: DeltaState,
    layer: Int[Array, ""] | int,
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    dtype: DTypeLike,
    interpret: bool = False,
) -> WindowOutputs:
    """Run W rows of B sequences after the state of layer `layer`, which stays as it is.

    The formula is that of `kernels_pallas.gated_delta_rule.recurrent_gated_delta_rule`, one row after the other.

    Args:
        state: the memory of a stack of layers. Dk and Dv are powers of two, at least 16.
        start, end: the range of valid rows of each sequence; the other rows change nothing. W is at most `DECODE_ROWS`.
        dtype: compute dtype, to which qkv and the result of the convolution are rounded.
        interpret: run the kernel in interpret mode, on any device.

    Raises:
        ValueError: the kernel does not support W, Dk or Dv.
    """
    batch, value_heads, key_size, value_size = state.recurrent.shape[1:]
    _, total_rows, channels = projections.qkv.parts.shape
    rows = total_rows // batch
    if not supports(rows, key_size, value_size):
        expected = f"expected at most {DECODE_ROWS} rows, and sizes that are powers of two from 16 on"
        raise ValueError(f"{rows} rows of heads of {key_size} x {value_size}; {expected}")
    key_heads, columns = (channels - value_heads * value_size) // (2 * key_size), min(STATE_COLUMNS, value_size)
    of_values = (batch, rows, value_heads, value_size)
    out_shape = _OutputRefs(
        o=jax.ShapeDtypeStruct(of_values, dtype),
        delta=jax.ShapeDtypeStruct(of_values, jnp.float32),
        k=jax.ShapeDtypeStruct((batch, rows, key_heads, key_size), jnp.float32),
        decay=jax.ShapeDtypeStruct((batch, rows, value_heads), jnp.float32),
    )
    qkv, beta, decay = (sums.parts for sums in projections)
    inputs = _InputRefs(jnp.asarray(layer, jnp.int32).reshape(1), start, end, qkv, beta, decay, *weights, *state)
    (outputs,) = pl.pallas_call(
        partial(_window_kernel, columns=columns, dtype=dtype),
        grid=(batch * value_heads, value_size // columns),
        out_shape=(out_shape,),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="gated_delta_rule_recurrent",
    )(inputs)
    return WindowOutputs(*outputs)
