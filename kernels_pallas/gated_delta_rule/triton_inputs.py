"""From a layer's projections of a prompt to the inputs of the recurrence as one Pallas kernel, through the Triton
lowering.

In plain JAX these are a dozen kernels, among them sums over features, whose order XLA chooses. Here a program computes
one head of the queries, keys or values of a few rows. A value head's program also computes the gates of that head. The
program is the same for any number of rows, and so are the bits of a row.
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

from kernels_pallas.gated_delta_rule.inputs import DeltaInputs, DeltaProjections, DeltaWeights, step_gates
from kernels_pallas.partial_sums import load_partial_sum
from kernels_pallas.tiles import index_grid

PROMPT_ROWS = 8  # rows of a program


class _InputRefs(NamedTuple):
    """Refs of the kernel's inputs, with the axes of the arguments of `chunk_gated_delta_rule`."""

    layer: Any  # [1]
    start: Any
    end: Any
    qkv: Any
    beta: Any
    decay: Any
    conv_weight: Any
    a_log: Any
    dt_bias: Any
    conv_state: Any  # of a stack of layers


class _OutputRefs(NamedTuple):
    """Refs of the results."""

    q: Any
    k: Any
    v: Any
    beta: Any
    g: Any
    conv_state: Any  # `[B, past, C]`, the last inputs


def row_of_place(place: Array, start: Array, chunk: int, num_places: int) -> Array:
    """Inside a kernel: return the rows of a call that stand at these places, whose chunks begin at row `start`.

    Places are a multiple of `chunk` rows before `start`, then the valid rows. Behind them stand the other rows of the
    padding, and those that fill the last chunk, which are beyond the rows of the call.

    Args:
        place: in chunks of `chunk` rows.
        start: first valid row of the sequence.
        num_places: a multiple of `chunk`.
    """
    t = place + lax.rem(start, jnp.int32(chunk))
    return jnp.where(t < num_places, t, t - num_places)


def _inputs_kernel(refs: _InputRefs, out: _OutputRefs, *, chunk: int, dtype: DTypeLike) -> None:
    """Compute `PROMPT_ROWS` rows of one head. The second grid axis counts heads of queries, of keys, then of values."""
    (batch, padded_rows, key_heads, key_size), value_size = out.q.shape, out.v.shape[3]
    num_rows, past, num_tiles = refs.qkv.shape[1] // batch, refs.conv_state.shape[2], padded_rows // PROMPT_ROWS
    b, tile_number, head = pl.program_id(0) // num_tiles, pl.program_id(0) % num_tiles, pl.program_id(1)
    place, start, end, layer = (
        tile_number * PROMPT_ROWS + jnp.arange(PROMPT_ROWS),
        refs.start[b],
        refs.end[b],
        refs.layer[0],
    )
    t = row_of_place(place, start, chunk, padded_rows)

    def conv_input(index: Array, channel: Array) -> Array:
        """Load inputs of the convolution: those before the valid rows, then the rows; zeros elsewhere."""
        before, row = index - start, index - past
        is_before, is_row = (before >= 0) & (before < past), (before >= past) & (row < end)
        at = b * num_rows + jnp.clip(row, 0, num_rows - 1), channel
        new = load_partial_sum(refs.qkv, *at, mask=is_row).astype(dtype).astype(refs.conv_state.dtype)
        old = plt.load(refs.conv_state.at[layer, b, jnp.clip(before, 0, past - 1), channel], mask=is_before, other=0)
        return jnp.where(is_row, new, old)

    def silu_conv(first_channel: Array, size: int) -> Array:
        """Return SiLU of the convolution for the channels of a head, rounded to the compute dtype, as float32."""
        row, channel = index_grid(t, first_channel + jnp.arange(size))
        total = jnp.zeros(row.shape, jnp.float32)
        for tap in range(past + 1):
            taps = plt.load(refs.conv_weight.at[first_channel + jnp.arange(size), tap]).astype(jnp.float32)
            total = total + conv_input(row + tap, channel).astype(jnp.float32) * taps[None, :]
        keep_conv_state(first_channel, size)
        return (total * lax.logistic(total)).astype(dtype).astype(jnp.float32)

    def keep_conv_state(first_channel: Array, size: int) -> None:
        """Store the inputs that the next step needs."""
        row, channel = index_grid(jnp.arange(1), first_channel + jnp.arange(size))

        @pl.when(tile_number == num_tiles - 1)
        def store_last() -> None:
            for i in range(past):
                plt.store(out.conv_state.at[b, row + i, channel], conv_input(row + num_rows + i, channel))

    def normalised(first_channel: Array) -> Array:
        y = silu_conv(first_channel, key_size)
        return y * lax.rsqrt(jnp.sum(y * y, axis=1)[:, None] + 1e-6)

    def at_heads(j: Array, size: int) -> tuple[Array, ...]:
        row, channel = index_grid(place, jnp.arange(size))
        return b, row, j, channel

    @pl.when(head < key_heads)
    def store_query() -> None:
        plt.store(out.q.at[at_heads(head, key_size)], normalised(head * key_size) * key_size**-0.5)

    @pl.when((head >= key_heads) & (head < 2 * key_heads))
    def store_key() -> None:
        plt.store(out.k.at[at_heads(head - key_heads, key_size)], normalised(head * key_size))

    @pl.when(head >= 2 * key_heads)
    def store_value_and_gates() -> None:
        m = head - 2 * key_heads
        v = silu_conv(2 * key_heads * key_size + m * value_size, value_size)
        plt.store(out.v.at[at_heads(m, value_size)], v.astype(out.v.dtype))
        is_valid, n = (t >= start) & (t < end), b * num_rows + jnp.clip(t, 0, num_rows - 1)
        b_logit, a = load_partial_sum(refs.beta, n, m), load_partial_sum(refs.decay, n, m)
        beta, g = step_gates(b_logit, a, plt.load(refs.a_log.at[m]), plt.load(refs.dt_bias.at[m]))
        plt.store(out.beta.at[b, place, m], jnp.where(is_valid, beta, 0.0))
        plt.store(out.g.at[b, place, m], jnp.where(is_valid, g, 0.0))


def _shapes(
    projections: DeltaProjections, batch: int, rows: int, sizes: tuple[int, int, int], dtype: DTypeLike
) -> dict[str, Any]:
    """Return the shapes of q, k, v, beta and g for `rows` rows of each of `batch` sequences."""
    heads, key_size, value_size = sizes
    key_heads = (projections.qkv.parts.shape[2] - heads * value_size) // (2 * key_size)
    of_keys = jax.ShapeDtypeStruct((batch, rows, key_heads, key_size), jnp.float32)
    gates = jax.ShapeDtypeStruct((batch, rows, heads), jnp.float32)
    v = jax.ShapeDtypeStruct((batch, rows, heads, value_size), dtype)  # rounded to `dtype` in any case
    return {"q": of_keys, "k": of_keys, "v": v, "beta": gates, "g": gates}


def prompt_inputs(
    projections: DeltaProjections,
    weights: DeltaWeights,
    conv_state: Float[Array, "L B past C"],
    layer: Int[Array, ""] | int,
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    rows: int,
    chunk: int,
    sizes: tuple[int, int, int],
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[DeltaInputs, Float[Array, "B past C"]]:
    """Compute the inputs of the recurrence for the rows of a prompt.

    Args:
        conv_state: of all layers.
        layer: index of the layer in it.
        start, end: the range of valid rows of each sequence.
        rows: rows of the results, a multiple of `chunk` and of `PROMPT_ROWS`. They are in the order of `row_of_place`.
        chunk: rows of a chunk. The first valid row begins one.
        sizes: M, Dk and Dv.
        dtype: compute dtype.
        interpret: run the kernel in interpret mode, on any device.

    Returns:
        the inputs, v in `dtype` and the rest in float32, and the convolution state of the layer after the rows.
    """
    _, batch, past, channels = conv_state.shape
    after = jax.ShapeDtypeStruct((batch, past, channels), conv_state.dtype)
    outputs = _OutputRefs(**_shapes(projections, batch, rows, sizes, dtype), conv_state=after)
    (results,) = pl.pallas_call(
        partial(_inputs_kernel, chunk=chunk, dtype=dtype),
        grid=(batch * rows // PROMPT_ROWS, 2 * outputs.q.shape[2] + sizes[0]),
        out_shape=(outputs,),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="gated_delta_rule_prompt_inputs",
    )(_inputs(projections, weights, conv_state, layer, start, end))
    return DeltaInputs(results.q, results.k, results.v, results.beta, results.g), results.conv_state


def _inputs(
    projections: DeltaProjections, weights: DeltaWeights, conv_state: Array, layer: Any, start: Array, end: Array
) -> _InputRefs:
    qkv, beta, decay = (sums.parts for sums in projections)
    return _InputRefs(jnp.asarray(layer, jnp.int32).reshape(1), start, end, qkv, beta, decay, *weights, conv_state)
