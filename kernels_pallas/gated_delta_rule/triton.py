"""The rows of a verify window through Gated DeltaNet, from the projections to the output, as two Pallas kernels through
the Triton lowering.

In the chunked form a window of five rows is twenty small products a layer. Each is a kernel that takes longer to start
than to run, and so do the convolution and the gates before them. Here one kernel (`triton_inputs.py`) computes q, k, v
and the gates of all rows at once. In a second one a program holds some columns of a head's state and steps through the
rows, which is a chain. It first adds the accepted rows of the window before, so a state is read once and written once
a round. The rows of the window itself stay out of it, since it is not known yet how many will be accepted.

Accepted rows are added by the same operations that step through a window (XLA merges no product and addition of a
kernel into one). A row's result therefore does not depend on the rows after it, on the other sequences, or on the
windows that its text is cut into, bit for bit.
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
from kernels_pallas.gated_delta_rule.state import DeltaState, PendingDeltaUpdates, page_offsets
from kernels_pallas.gated_delta_rule.triton_inputs import window_inputs
from kernels_pallas.tile_tables import tile_constants
from kernels_pallas.tiles import index_grid

DECODE_ROWS = 16  # largest window; with more rows the chunked form is faster


class _UpdateRefs(NamedTuple):
    """Refs of the updates of the window before, in stacks of layers."""

    accepted: Any
    pages: Any  # [2], index of layer 0 on the page of the window before, and on the page of this window
    k: Any
    delta: Any
    decay: Any


def _load_state(state_ref: Any, at: tuple[Array, ...], key_size: int, column: Array) -> tuple[Array, tuple[Any, ...]]:
    """Return some columns of a state, and where they are."""
    at = *at, *index_grid(jnp.arange(key_size), column)
    return plt.load(state_ref.at[at]), at


def _add_accepted(
    state: Float[Array, "Dk cols"],
    updates: _UpdateRefs,
    at: tuple[Array, Array, Array, Array],
    column: Int[Array, " cols"],
) -> Float[Array, "Dk cols"]:
    """Add the accepted rows to a state, one after the other, with the operations that step through a window.

    Args:
        at: index of the layer on its page, the sequence, value head and key head.
    """
    layer, b, m, j = at
    channel = jnp.arange(state.shape[0])

    def load(i: Array) -> tuple[Array, Array, Array]:
        k = plt.load(updates.k.at[layer, b, i, j, channel])
        return k, plt.load(updates.delta.at[layer, b, i, m, column]), plt.load(updates.decay.at[layer, b, i, m])

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        state, (k, delta, g) = carry
        following = load(jnp.minimum(i + 1, updates.k.shape[2] - 1))  # on its way while this row is added
        return state * jnp.exp(g) + k[:, None] * delta[None, :], following

    return lax.fori_loop(jnp.int32(0), updates.accepted[b], step, (state, load(jnp.int32(0))))[0]


class _WindowRefs(NamedTuple):
    """Refs of the rows of a window, and of the state."""

    layer: Any  # [1]
    q: Any
    v: Any
    beta: Any
    state: Any


class _OutputRefs(NamedTuple):
    """Refs of the results; the stacks `delta` and `state` are changed in place."""

    o: Any
    delta: Any
    state: Any


def _window_kernel(refs: _WindowRefs, updates: _UpdateRefs, out: _OutputRefs, *, columns: int) -> None:
    """Add accepted rows and step through all rows of a sequence, for `columns` columns of the state of a value head."""
    _, num_rows, value_heads, _ = out.o.shape
    key_heads, key_size = refs.q.shape[2:]
    b, m = pl.program_id(0) // value_heads, pl.program_id(0) % value_heads
    j = m // (value_heads // key_heads)
    channel, column = jnp.arange(key_size), pl.program_id(1) * columns + jnp.arange(columns)
    accepted, layer = updates.accepted[b], refs.layer[0]
    read, write = updates.pages[0] + layer, updates.pages[1] + layer

    def load(t: Array) -> tuple[Array, ...]:
        q, k = plt.load(refs.q.at[b, t, j, channel]), plt.load(updates.k.at[write, b, t, j, channel])
        v = plt.load(refs.v.at[b, t, m, column]).astype(jnp.float32)
        return q, k, v, plt.load(refs.beta.at[b, t, m]), plt.load(updates.decay.at[write, b, t, m])

    def step(t: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        state, (q, k, v, beta, g) = carry
        following = load(jnp.minimum(t + 1, num_rows - 1))  # on its way while this row is computed
        state = state * jnp.exp(g)
        delta = beta * (v - jnp.sum(state * k[:, None], axis=0))
        state = state + k[:, None] * delta[None, :]
        plt.store(out.delta.at[write, b, t, m, column], delta)
        plt.store(out.o.at[b, t, m, column], jnp.sum(state * q[:, None], axis=0).astype(out.o.dtype))
        return state, following

    first = load(jnp.int32(0))
    state, at = _load_state(refs.state, (layer, b, m), key_size, column)
    state = _add_accepted(state, updates, (read, b, m, j), column)

    @pl.when(accepted > 0)
    def store_state() -> None:
        plt.store(out.state.at[at], state)

    # Keep the trip count opaque to the compiler, which would otherwise specialise the one-row program: one row and
    # five rows must round alike.
    iterations = jnp.where(accepted >= 0, jnp.int32(num_rows), jnp.int32(0))
    lax.fori_loop(jnp.int32(0), iterations, step, (state, first))


def _replay_kernel(updates: _UpdateRefs, state_ref: Any, out_ref: Any, *, columns: int) -> None:
    """Add accepted rows to `columns` columns of the state of a value head, of any layer."""
    num_layers, batch, value_heads, key_size, _ = out_ref.shape
    layer, b, m = pl.program_id(0), pl.program_id(1) // value_heads, pl.program_id(1) % value_heads
    j = m // (value_heads // updates.k.shape[3])
    column = pl.program_id(2) * columns + jnp.arange(columns)

    @pl.when(updates.accepted[b] > 0)
    def replay() -> None:
        state, at = _load_state(state_ref, (layer, b, m), key_size, column)
        state = _add_accepted(state, updates, (updates.pages[0] + layer, b, m, j), column)
        plt.store(out_ref.at[at], state)


def supports(rows: int, key_size: int, value_size: int) -> bool:
    """Return whether the kernels support windows of `rows` rows and heads of these sizes."""

    def is_power_of_2(size: int) -> bool:
        return size >= 16 and size & (size - 1) == 0

    return rows <= DECODE_ROWS and is_power_of_2(key_size) and is_power_of_2(value_size)


def _check(rows: int, key_size: int, value_size: int) -> None:
    if not supports(rows, key_size, value_size):
        expected = f"expected at most {DECODE_ROWS} rows, and sizes that are powers of two from 16 on"
        raise ValueError(f"{rows} rows of heads of {key_size} x {value_size}; {expected}")


def _state_columns(value_size: int) -> int:
    """Return the columns of a state that a program holds, as the tile table has them.

    A program is one warp, so that no sum waits at a barrier.
    """
    return min(tile_constants("gated_delta_rule").state_columns, value_size)


def _accepted(pending: PendingDeltaUpdates) -> Int[Array, " B"]:
    return jnp.zeros(pending.k.shape[1], jnp.int32) if pending.accepted is None else pending.accepted


def recurrent_gated_delta_rule(
    projections: DeltaProjections,
    weights: DeltaWeights,
    state: DeltaState,
    pending: PendingDeltaUpdates,
    layer: Int[Array, ""] | int,
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "B W M Dv"], DeltaState, PendingDeltaUpdates]:
    """Run W rows of B sequences after the state of layer `layer` and the accepted rows of the window before.

    The formula is that of `kernels_pallas.gated_delta_rule.recurrent_gated_delta_rule`, one row after the other.

    Args:
        state: the memory of a stack of layers, given up (donated). Dk and Dv are powers of two, at least 16.
        pending: the updates of the window before, given up.
        start, end: the range of valid rows of each sequence; the other rows change nothing. W is at most `DECODE_ROWS`.
        dtype: compute dtype, to which qkv and the result of the convolution are rounded.
        interpret: run the kernels in interpret mode, on any device.

    Returns:
        the outputs in `dtype`, the memory with the accepted rows, and the updates of this window.

    Raises:
        ValueError: the kernels do not support W, Dk or Dv.
    """
    num_layers, batch, *sizes = state.recurrent.shape
    value_heads, key_size, value_size = sizes
    rows, columns = projections.qkv.parts.shape[1] // batch, _state_columns(value_size)
    _check(rows, key_size, value_size)
    accepted = _accepted(pending)
    pages = page_offsets(pending, num_layers)
    q, v, beta, conv, pending = window_inputs(
        projections,
        weights,
        state.conv,
        pending,
        accepted,
        pages,
        layer,
        start,
        end,
        sizes=(value_heads, key_size, value_size),
        dtype=dtype,
        interpret=interpret,
    )
    out_shape = _OutputRefs(
        o=jax.ShapeDtypeStruct(v.shape, dtype),
        delta=jax.ShapeDtypeStruct(pending.delta.shape, jnp.float32),
        state=jax.ShapeDtypeStruct(state.recurrent.shape, jnp.float32),
    )
    inputs = _WindowRefs(jnp.asarray(layer, jnp.int32).reshape(1), q, v, beta, state.recurrent)
    updates = _UpdateRefs(accepted, pages, pending.k, pending.delta, pending.decay)
    (outputs,) = pl.pallas_call(
        partial(_window_kernel, columns=columns),
        grid=(batch * value_heads, value_size // columns),
        out_shape=(out_shape,),
        input_output_aliases={len(inputs) - 1: 2, len(inputs) + 3: 1},  # the state, and delta
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="gated_delta_rule_recurrent",
    )(inputs, updates)
    return outputs.o, DeltaState(conv, outputs.state), pending._replace(delta=outputs.delta)


def replay_recurrent(
    state: Float[Array, "L B M Dk Dv"], pending: PendingDeltaUpdates, *, interpret: bool = False
) -> Float[Array, "L B M Dk Dv"]:
    """Add the accepted rows of a window to the recurrent states of all layers, as the next window would.

    Args:
        state: given up (donated).
        interpret: run the kernel in interpret mode, on any device.

    Raises:
        ValueError: the kernel does not support W, Dk or Dv.
    """
    num_layers, batch, value_heads, key_size, value_size = state.shape
    _check(pending.k.shape[2], key_size, value_size)
    columns = _state_columns(value_size)
    pages = page_offsets(pending, num_layers)
    updates = _UpdateRefs(_accepted(pending), pages, pending.k, pending.delta, pending.decay)
    return pl.pallas_call(
        partial(_replay_kernel, columns=columns),
        grid=(num_layers, batch * value_heads, value_size // columns),
        out_shape=jax.ShapeDtypeStruct(state.shape, jnp.float32),
        input_output_aliases={len(updates): 0},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="gated_delta_rule_replay",
    )(updates, state)
