"""The rows of a verify window through Gated DeltaNet, and the replay of accepted rows, as Pallas kernels through the
Triton lowering.

In the chunked form a window of five rows is twenty small products a layer. Each is a kernel that takes longer to start
than to run, and so do the convolution, the gates and the norm around them. Here one kernel (`triton_window.py`) does it
all. It first adds the accepted rows of the window before, so a state is read once and written once a round. The rows of
the window itself stay out of it, since it is not known yet how many will be accepted.

Accepted rows are added by the same operations that step through a window (XLA merges no product and addition of a
kernel into one). A row's result therefore does not depend on the rows after it, on the other sequences, or on the
windows that its text is cut into, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas.gated_delta_rule.inputs import DeltaProjections, DeltaWeights, GatedNorm
from kernels_pallas.gated_delta_rule.state import DeltaState, PendingDeltaUpdates
from kernels_pallas.gated_delta_rule.triton_state import StateTile, UpdateRefs, add_accepted
from kernels_pallas.gated_delta_rule.triton_window import Norm, WindowOutputs, WindowRefs, window_kernel
from kernels_pallas.tile_tables import tile_constants

DECODE_ROWS = 16  # largest window; with more rows the chunked form is faster
MAX_WARPS, WARP_ELEMENTS = 8, 64 * 32  # of a program of a window: 64 elements of a state a thread


def _replay_kernel(updates: UpdateRefs, state_ref: Any, out_ref: Any, *, columns: int) -> None:
    """Add accepted rows to `columns` columns of the state of a value head, of any layer."""
    _, _, value_heads, key_size, _ = out_ref.shape
    layer, b, m = pl.program_id(0), pl.program_id(1) // value_heads, pl.program_id(1) % value_heads
    j = m // (value_heads // updates.k.shape[3])
    tile, first = StateTile(key_size, columns, groups=1), pl.program_id(2) * columns

    @pl.when(updates.accepted[b] > 0)
    def replay() -> None:
        at = (layer, b, m, *tile.grid(first))
        read, _ = updates.layers(layer, out_ref.shape[0])
        state = add_accepted(plt.load(state_ref.at[at]), updates, (read, b, m, j), tile, first)
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
    """Return the columns of a state that one warp holds side by side, as the tile table has them."""
    return min(tile_constants("gated_delta_rule").state_columns, value_size)


def _num_warps(key_size: int, value_size: int) -> int:
    """Return the warps of a program of a window, which holds the state of a head."""
    return max(1, min(MAX_WARPS, key_size * value_size // WARP_ELEMENTS))


def _accepted(pending: PendingDeltaUpdates) -> Int[Array, " B"]:
    return jnp.zeros(pending.k.shape[1], jnp.int32) if pending.accepted is None else pending.accepted


def _page(pending: PendingDeltaUpdates) -> Int[Array, " 1"] | None:
    return None if pending.page is None else jnp.asarray(pending.page, jnp.int32).reshape(1)


def recurrent_gated_delta_rule(
    projections: DeltaProjections,
    weights: DeltaWeights,
    state: DeltaState,
    pending: PendingDeltaUpdates,
    layer: Int[Array, ""] | int,
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    norm: GatedNorm | None = None,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "B W M Dv"], DeltaState, PendingDeltaUpdates]:
    """Run W rows of B sequences after the state of layer `layer` and the accepted rows of the window before.

    The formula is that of `kernels_pallas.gated_delta_rule.recurrent_gated_delta_rule`, one row after the other.

    Args:
        state: the memory of a stack of layers, given up (donated). Dk and Dv are powers of two, at least 16.
        pending: the updates of the window before, given up.
        start, end: the range of valid rows of each sequence; the other rows change nothing. W is at most `DECODE_ROWS`.
        norm: of the outputs; None: none.
        dtype: compute dtype, to which qkv and the result of the convolution are rounded.
        interpret: run the kernels in interpret mode, on any device.

    Returns:
        the outputs in `dtype`, normalised if `norm` is given; the memory with the accepted rows; and the updates of
        this window.

    Raises:
        ValueError: the kernels do not support W, Dk or Dv.
    """
    num_layers, batch, *sizes = state.recurrent.shape
    value_heads, key_size, value_size = sizes
    rows, columns = projections.qkv.parts.shape[1] // batch, _state_columns(value_size)
    _check(rows, key_size, value_size)
    accepted = _accepted(pending)
    qkv, beta, decay = (sums.parts for sums in projections)
    gate = () if norm is None else (norm.z.parts, norm.weight)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    inputs = WindowRefs(layer, start, end, qkv, beta, decay, *weights, state.conv, state.recurrent, pending.conv, *gate)
    updates = UpdateRefs(accepted, _page(pending), pending.k, pending.delta, pending.decay)

    def like(array: Array) -> Any:
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    def scratch(*shape: int, of: DTypeLike = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((batch, rows, value_heads, *shape), of)

    out_shape = WindowOutputs(
        y=scratch(value_size, of=dtype),
        conv_state=like(state.conv),
        state=like(state.recurrent),
        conv_updates=like(pending.conv),
        k=like(pending.k),
        delta=like(pending.delta),
        decay=like(pending.decay),
        qk=scratch(2, key_size),
        v=scratch(value_size, of=dtype),
        beta=scratch(),
        o=None if norm is None else scratch(value_size, of=dtype),
        activation=None if norm is None else scratch(value_size),
    )
    first = WindowRefs._fields.index("conv_state")
    updates_at = len(inputs) - inputs.count(None) + (1 if updates.page is None else 2)  # k
    aliases = {first: 1, first + 1: 2, first + 2: 3, updates_at: 4, updates_at + 1: 5, updates_at + 2: 6}
    kernel = partial(
        window_kernel,
        columns=columns,
        norm=None if norm is None else Norm(norm.eps, norm.gate),
        barrier=(lambda: None)
        if interpret
        else plt.debug_barrier,  # programs are interpreted one instruction at a time
    )
    (outputs,) = pl.pallas_call(
        kernel,
        grid=(batch * value_heads,),
        out_shape=(out_shape,),
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=_num_warps(key_size, value_size), num_stages=1),
        interpret=interpret,
        name="gated_delta_rule_window",
    )(inputs, updates)
    pending = pending._replace(conv=outputs.conv_updates, k=outputs.k, delta=outputs.delta, decay=outputs.decay)
    return outputs.y, DeltaState(outputs.conv_state, outputs.state), pending


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
    updates = UpdateRefs(_accepted(pending), _page(pending), pending.k, pending.delta, pending.decay)
    return pl.pallas_call(
        partial(_replay_kernel, columns=columns),
        grid=(num_layers, batch * value_heads, value_size // columns),
        out_shape=jax.ShapeDtypeStruct(state.shape, jnp.float32),
        input_output_aliases={len(updates) - updates.count(None): 0},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="gated_delta_rule_replay",
    )(updates, state)
