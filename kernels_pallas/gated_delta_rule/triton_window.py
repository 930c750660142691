"""A verify window through Gated DeltaNet, from the projections to the output and its gated norm, as one Pallas kernel
through the Triton lowering.

A program has a whole value head of a sequence: its state, `groups` of columns side by side, each of which one warp
holds, so no sum over keys waits for another warp. It works in three parts, with a barrier between them:

1. Convolution, norms and gates of all rows at once, `ROWS` rows a tile and a row a warp. As links of the chain over
   rows they would be slow: an H100 took 7 us for one row and 24 us for five.
2. The chain: accepted rows of the window before enter the state, then each row of this window.
3. The gated norm of all rows, for which no other program has a part of the head.

A tile has `ROWS` rows whatever the window, so a row has the same bits in any window. What the parts hand on goes
through memory that belongs to the program alone. Value heads with a common key head compute its query and key each for
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from kernels_pallas.gated_delta_rule.inputs import step_gates
from kernels_pallas.gated_delta_rule.triton_state import StateTile, UpdateRefs, add_accepted
from kernels_pallas.partial_sums import load_partial_sum
from kernels_pallas.tiles import index_grid

ROWS = 8  # of a tile


class WindowRefs(NamedTuple):
    """Refs of a window's projections, of weights, and of the memory, with the axes that the op's arguments have."""

    layer: Any  # [1]
    start: Any
    end: Any
    qkv: Any
    beta: Any
    decay: Any
    conv_weight: Any
    a_log: Any
    dt_bias: Any
    conv_state: Any  # of a stack of layers, as the rest
    state: Any
    conv_updates: Any
    gate: Any = None  # logits of the gate of the norm, partial sums
    norm_weight: Any = None


class WindowOutputs(NamedTuple):
    """Refs of the results. The stacks are changed in place; the last five pass from part to part."""

    y: Any
    conv_state: Any
    state: Any
    conv_updates: Any
    k: Any
    delta: Any
    decay: Any
    qk: Any  # [B, W, M, 2, Dk]
    v: Any  # [B, W, M, Dv]
    beta: Any  # [B, W, M]
    o: Any = None  # [B, W, M, Dv], before the norm
    activation: Any = None  # [B, W, M, Dv], of the gate


class Norm(NamedTuple):
    """The static half of the gated norm."""

    eps: float
    gate: str


class _Program(NamedTuple):
    """What a program computes."""

    b: Array
    m: Array  # value head
    j: Array  # its key head
    is_first: Array  # of the value heads of the key head
    accepted: Array
    read: Array  # the layer on the page of the window before
    write: Array  # and on that of this window


def window_kernel(
    refs: WindowRefs,
    updates: UpdateRefs,
    out: WindowOutputs,
    *,
    columns: int,
    norm: Norm | None,
    barrier: Callable[[], None],
) -> None:
    """Run the window of one value head of a sequence. `barrier`: after it, all threads see what was stored."""
    batch, num_rows, value_heads, value_size = out.v.shape
    key_heads, key_size = out.k.shape[3:]
    b, m = pl.program_id(0) // value_heads, pl.program_id(0) % value_heads
    ratio, layer = value_heads // key_heads, refs.layer[0]
    read, write = updates.layers(layer, refs.state.shape[0])
    program = _Program(b, m, m // ratio, m % ratio == 0, updates.accepted[b], read, write)
    tile = StateTile(key_size, columns, value_size // columns)

    state_at = (layer, b, m, *tile.grid(0))
    state = plt.load(refs.state.at[state_at])  # on its way while the inputs are computed
    for first_row in range(0, num_rows, ROWS):
        _store_inputs(refs, updates, out, program, first_row, norm)
    barrier()
    state = add_accepted(state, updates, (read, b, m, program.j), tile, 0)

    @pl.when(program.accepted > 0)
    def store_state() -> None:
        plt.store(out.state.at[state_at], state)

    _step_through(state, out, program, tile, norm)
    if norm is not None:
        barrier()
        for first_row in range(0, num_rows, ROWS):
            _store_normalised(refs, out, program, first_row, norm)
    _keep_conv_inputs(refs, out, program, key_size, value_size)


def _rows_and_channels(first_row: int, first: Array | int, size: int) -> tuple[Array, Array]:
    return index_grid(first_row + jnp.arange(ROWS), first + jnp.arange(size))


def _store_inputs(
    refs: WindowRefs, updates: UpdateRefs, out: WindowOutputs, program: _Program, first_row: int, norm: Norm | None
) -> None:
    """Compute and store q, k, v, step size, decay, and the activation of the gate, for a tile of rows."""
    batch, num_rows, value_heads, value_size = out.v.shape
    key_heads, key_size = out.k.shape[3:]
    b, m, j, is_first, accepted, read, write = program
    past, layer, dtype = refs.conv_state.shape[2], refs.layer[0], out.v.dtype
    start, end = refs.start[b], refs.end[b]
    t = first_row + jnp.arange(ROWS)
    n = b * num_rows + jnp.minimum(t, num_rows - 1)

    def conv_input(index: Array, channel: Array, in_window: Array) -> Array:
        """Load inputs of the convolution: those before the valid rows, then the rows; zeros elsewhere."""
        before, row = index - start, index - past
        is_before, is_row = in_window & (before >= 0) & (before < past), in_window & (before >= past) & (row < end)
        at = b * num_rows + jnp.clip(row, 0, num_rows - 1), channel
        new = load_partial_sum(refs.qkv, *at, mask=is_row).astype(dtype).astype(refs.conv_state.dtype)
        before = jnp.clip(before, 0, past - 1)
        old = plt.load(refs.conv_state.at[layer, b, before, channel], mask=is_before & (accepted == 0), other=0)
        # The inputs that end at the last accepted row.
        updated_at = read, b, accepted + before, channel
        updated = plt.load(refs.conv_updates.at[updated_at], mask=is_before & (accepted > 0), other=0)
        return jnp.where(is_row, new, jnp.where(accepted > 0, updated, old))

    def silu_conv(first: Array, size: int) -> tuple[list[Array], Array]:
        """Return the inputs of the convolution, and its SiLU, rounded to the compute dtype, as float32."""
        row, channel = _rows_and_channels(first_row, first, size)
        inputs = [conv_input(row + tap, channel, row < num_rows) for tap in range(past + 1)]
        total = jnp.zeros(row.shape, jnp.float32)
        for tap, x in enumerate(inputs):
            taps = plt.load(refs.conv_weight.at[first + jnp.arange(size), tap]).astype(jnp.float32)
            total = total + x.astype(jnp.float32) * taps[None, :]
        return inputs, (total * lax.logistic(total)).astype(dtype).astype(jnp.float32)

    def normalised(y: Array) -> Array:
        return y * lax.rsqrt(jnp.sum(y * y, axis=1)[:, None] + 1e-6)

    firsts = j * key_size, (key_heads + j) * key_size, 2 * key_heads * key_size + m * value_size
    (q_inputs, q), (k_inputs, k), (v_inputs, v) = (
        silu_conv(first, size) for first, size in zip(firsts, (key_size, key_size, value_size), strict=True)
    )
    q, k = normalised(q) * key_size**-0.5, normalised(k)
    a = load_partial_sum(refs.decay, n, m)
    beta, g = step_gates(load_partial_sum(refs.beta, n, m), a, plt.load(refs.a_log.at[m]), plt.load(refs.dt_bias.at[m]))
    is_valid = (t >= start) & (t < end)
    activation = _activation(refs, program, first_row, norm, num_rows, value_size, dtype) if norm else None

    # All loads are above: the compiler moves none across a store.
    row, channel = _rows_and_channels(first_row, 0, key_size)
    inside = row < num_rows
    plt.store(out.qk.at[b, row, m, jnp.int32(0), channel], q, mask=inside)
    plt.store(out.qk.at[b, row, m, jnp.int32(1), channel], k, mask=inside)
    plt.store(out.k.at[write, b, row, j, channel], k, mask=inside & is_first)
    plt.store(out.beta.at[b, t, m], jnp.where(is_valid, beta, 0.0), mask=t < num_rows)
    plt.store(out.decay.at[write, b, t, m], jnp.where(is_valid, g, 0.0), mask=t < num_rows)
    row, channel = _rows_and_channels(first_row, 0, value_size)
    inside = row < num_rows
    plt.store(out.v.at[b, row, m, channel], v.astype(dtype), mask=inside)
    if activation is not None:
        plt.store(out.activation.at[b, row, m, channel], activation, mask=inside)
    for inputs, first, mine in zip(
        (q_inputs, k_inputs, v_inputs), firsts, (is_first, is_first, jnp.bool_(True)), strict=True
    ):
        row, channel = _rows_and_channels(first_row, first, inputs[0].shape[1])
        for tap, x in enumerate(inputs):  # each input is stored once: by the row itself, those before by row 0
            is_stored = row < num_rows if tap == past else row == 0
            if tap == past or first_row == 0:
                plt.store(out.conv_updates.at[write, b, row + tap, channel], x, mask=is_stored & mine)


def _activation(
    refs: WindowRefs, program: _Program, first_row: int, norm: Norm, num_rows: int, value_size: int, dtype: Any
) -> Float[Array, "rows Dv"]:
    """Return the activation of the gate of a tile of rows; its logits are rounded to the compute dtype."""
    row, channel = _rows_and_channels(first_row, program.m * value_size, value_size)
    at = program.b * num_rows + jnp.minimum(row, num_rows - 1), channel
    z = load_partial_sum(refs.gate, *at, mask=row < num_rows).astype(dtype).astype(jnp.float32)
    return lax.logistic(z) if norm.gate == "sigmoid" else z * lax.logistic(z)


def _step_through(
    state: Float[Array, "high groups low columns"],
    out: WindowOutputs,
    program: _Program,
    tile: StateTile,
    norm: Norm | None,
) -> None:
    """Step through the rows of the window; store delta and the output of each."""
    b, m, write, num_rows = program.b, program.m, program.write, out.v.shape[1]
    channel, column, o_ref = tile.keys(), tile.values(0), out.y if norm is None else out.o

    def load(t: Array) -> tuple[Array, ...]:
        q, k = (plt.load(out.qk.at[b, t, m, jnp.int32(which), channel]) for which in range(2))
        v = plt.load(out.v.at[b, t, m, column]).astype(jnp.float32)
        return q, k, v, plt.load(out.beta.at[b, t, m]), plt.load(out.decay.at[write, b, t, m])

    def step(t: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        state, (q, k, v, beta, g) = carry
        following = load(jnp.minimum(t + 1, num_rows - 1))  # on its way while this row is computed
        state = state * jnp.exp(g)
        delta = beta * (v - tile.sum_keys(state, k))
        state = state + tile.outer(k, delta)
        plt.store(out.delta.at[write, b, t, m, column], delta)
        plt.store(o_ref.at[b, t, m, column], tile.sum_keys(state, q).astype(o_ref.dtype))
        return state, following

    # Keep the trip count opaque to the compiler, which would otherwise specialise the one-row program: one row and
    # five rows must round alike.
    iterations = jnp.where(program.accepted >= 0, jnp.int32(num_rows), jnp.int32(0))
    lax.fori_loop(jnp.int32(0), iterations, step, (state, load(jnp.int32(0))))


def _store_normalised(refs: WindowRefs, out: WindowOutputs, program: _Program, first_row: int, norm: Norm) -> None:
    """Normalise the outputs of a tile of rows, multiply them with their gates, and store them."""
    num_rows, _, value_size = out.v.shape[1:]
    row, channel = _rows_and_channels(first_row, 0, value_size)
    at, inside = (program.b, row, program.m, channel), row < num_rows
    x = plt.load(out.o.at[at], mask=inside, other=0).astype(jnp.float32)
    activation = plt.load(out.activation.at[at], mask=inside, other=0)
    w = plt.load(refs.norm_weight.at[jnp.arange(value_size)]).astype(jnp.float32)
    y = x * lax.rsqrt(jnp.sum(x * x, axis=1)[:, None] / value_size + norm.eps) * w[None, :] * activation
    plt.store(out.y.at[at], y.astype(out.y.dtype), mask=inside)


def _keep_conv_inputs(refs: WindowRefs, out: WindowOutputs, program: _Program, key_size: int, value_size: int) -> None:
    """Move the convolution's state on to the last accepted row, if any: then no program reads that state."""
    b, m, j, is_first, accepted, read, _ = program
    key_heads, past, layer = out.k.shape[3], refs.conv_state.shape[2], refs.layer[0]

    def keep(first: Array, size: int) -> None:
        channel = first + jnp.arange(size)
        for i in range(past):
            x = plt.load(refs.conv_updates.at[read, b, accepted + i, channel])
            plt.store(out.conv_state.at[layer, b, jnp.int32(i), channel], x)

    @pl.when((accepted > 0) & is_first)
    def keep_keys() -> None:
        keep(j * key_size, key_size)
        keep((key_heads + j) * key_size, key_size)

    @pl.when(accepted > 0)
    def keep_values() -> None:
        keep(2 * key_heads * key_size + m * value_size, value_size)
