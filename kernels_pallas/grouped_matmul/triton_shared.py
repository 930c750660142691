"""The down projection of the shared expert, in the launch of the routed experts' down projection.

For few rows it takes longer to start than to run. The sum over I is cut and ordered as `kernels_pallas.matmul.triton`
does it, so a row has the same bits where more rows make it a launch of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from kernels_pallas.matmul.tiling import Operands
from kernels_pallas.packed.dequantize import WeightRefs, load_tile
from kernels_pallas.packed.layout import PackedLayout, load_rows, mma_m_order, pack_operands
from kernels_pallas.packed.ptx_ops import WordOps
from kernels_pallas.tiles import dot, index_grid
from kernels_pallas.weights import LayerView, Weight


class SharedExpert(NamedTuple):
    """The activated hidden units of the shared expert, and the weight of its down projection."""

    hidden: Float[Array, "*rows I"]
    down: Weight  # [D, I]


class SharedLayout(NamedTuple):
    """The static half of a `SharedExpert`, as the kernel reads it."""

    layout: PackedLayout
    is_stack: bool
    num_splits: int  # of the sum over I


def shared_operands(shared: SharedExpert) -> tuple[SharedLayout, tuple[Array, ...]]:
    """Return the layout, and the kernel's operands: number of the layer, hidden units, arrays of the weight."""
    is_stack = isinstance(shared.down, LayerView)
    weight, layer = (shared.down.stack, shared.down.layer) if isinstance(shared.down, LayerView) else (shared.down, 0)
    layout, arrays = pack_operands(weight)
    hidden = shared.hidden.reshape(-1, shared.hidden.shape[-1])
    splits = Operands(layout, arrays).num_splits
    return SharedLayout(layout, is_stack, splits), (jnp.asarray(layer, jnp.int32).reshape(1), hidden, *arrays)


def store_shared_tile(
    refs: tuple[Any, ...], out_ref: Any, shared: SharedLayout, tile: Array, out_tile: int, row_tile: int, ops: WordOps
) -> None:
    """Inside a kernel: compute a tile of outputs for all rows, of which there are `row_tile` at most.

    Args:
        refs: the operands of `shared_operands`.
        out_ref: `[rows, D]`, float32.
    """
    layer_ref, hidden_ref, *weight_refs = refs
    layout, (num_rows, outputs) = shared.layout, out_ref.shape
    num_words = hidden_ref.shape[1] // layout.values_per_word
    index = (layer_ref[0],) if shared.is_stack else ()
    weight = WeightRefs(layout, tuple(weight_refs), index, outputs, num_words, ops)
    rows, weight_rows = jnp.arange(row_tile), tile * out_tile + mma_m_order(layout, out_tile)
    steps = -(-num_words // layout.words_per_step)
    splits = shared.num_splits
    steps_per_split = -(-steps // splits)
    zero = jnp.zeros((out_tile, row_tile), jnp.float32)

    def add_step(i: Array, total: Array) -> Array:
        first_word = i * layout.words_per_step
        w = load_tile(weight, weight_rows, first_word, hidden_ref.dtype)
        first = first_word * layout.values_per_word
        return total + dot(w, load_rows(layout, hidden_ref, rows, first, layout.values_per_step))

    def sum_of_split(split: Array | int) -> Array:
        first = split * steps_per_split
        turns: Array | int = steps_per_split
        if steps % splits:
            turns = jnp.clip(steps - first, 0, turns)
        return lax.fori_loop(0, turns, lambda i, total: add_step(first + i, total), zero)

    if splits == 1:
        total = sum_of_split(0)
    else:
        total = lax.fori_loop(0, splits, lambda split, total: total + sum_of_split(split), zero)
    row, col = index_grid(rows, tile * out_tile + jnp.arange(out_tile))
    plt.store(out_ref.at[row, col], total.T, mask=(row < num_rows) & (col < outputs))
