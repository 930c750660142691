"""The MLPs of packed (or plain) experts: two Pallas kernels through the Triton lowering.

Rows are sorted by expert and laid out in blocks (`plan.py`). The kernels take the whole `[layer, expert, ...]` stacks
and read the tiles of the experts that the blocks name; nothing is sliced, so nothing is copied. Gate and up are one
kernel with SiLU; down applies the routing weight in float32.

A row's result does not depend on the other rows, bit for bit: its sums over D and I are taken in steps of a fixed size
and order, and the sum over its experts in the order in which they were chosen.
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
from jaxtyping import Bool, Float, Int

from kernels_pallas.grouped_matmul.plan import align_unsorted, choose_block_size, drop_invalid, moe_align_block_size
from kernels_pallas.grouped_matmul.reference import combine_experts
from kernels_pallas.matmul.triton import OUT_TILE, supports
from kernels_pallas.packed.dequantize import WeightRefs, load_tile
from kernels_pallas.packed.layout import (
    PackedLayout,
    load_rows,
    max_row_tile,
    min_row_tile,
    mma_m_order,
    pack_operands,
)
from kernels_pallas.packed.ptx_ops import WordOps, word_ops
from kernels_pallas.tiles import dot, index_grid
from kernels_pallas.weights import Weight

__all__ = ["fused_moe", "fused_moe_unreduced", "supports"]

MAX_UNSORTED = 64  # assignments of a call up to which every one has a block of its own


def _gate_up_kernel(
    layer_ref: Any,
    expert_ids_ref: Any,
    num_blocks_ref: Any,
    sorted_token_ids_ref: Any,
    x_ref: Any,
    *refs: Any,
    layout: PackedLayout,
    block_size: int,
    topk: int,
    ops: WordOps,
) -> None:
    """Compute SiLU(gate) * up for the rows of one block and `OUT_TILE` hidden units of its expert."""
    *weight_refs, out_ref = refs
    num_experts, num_hidden = weight_refs[0].shape[1], out_ref.shape[1]
    block, tile = pl.program_id(0), pl.program_id(1)

    @pl.when((block < num_blocks_ref[0]) & (expert_ids_ref[block] < num_experts))
    def _() -> None:
        index = (layer_ref[0], expert_ids_ref[block])
        num_words = x_ref.shape[1] // layout.values_per_word
        weight = WeightRefs(layout, tuple(weight_refs), index, 2 * num_hidden, num_words, ops)
        places = block * block_size + jnp.arange(block_size)
        # The row of a place without an assignment is the number of rows, which is beyond the last one.
        rows = plt.load(sorted_token_ids_ref.at[places]) // topk
        gate_rows = jnp.minimum(tile * OUT_TILE + mma_m_order(layout, OUT_TILE), num_hidden - 1)

        def add_step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            first_word = i * layout.words_per_step
            x = load_rows(layout, x_ref, rows, first_word * layout.values_per_word, layout.values_per_step)
            gate = load_tile(weight, gate_rows, first_word, x.dtype)
            up = load_tile(weight, num_hidden + gate_rows, first_word, x.dtype)
            return sums[0] + dot(gate, x), sums[1] + dot(up, x)

        zero = jnp.zeros((OUT_TILE, block_size), jnp.float32)
        gate, up = lax.fori_loop(0, -(-num_words // layout.words_per_step), add_step, (zero, zero))
        hidden = gate / (1.0 + jnp.exp(-gate)) * up
        place, col = index_grid(places, tile * OUT_TILE + jnp.arange(OUT_TILE))
        plt.store(out_ref.at[place, col], hidden.T.astype(out_ref.dtype), mask=col < num_hidden)


def _down_kernel(
    layer_ref: Any,
    expert_ids_ref: Any,
    num_blocks_ref: Any,
    sorted_token_ids_ref: Any,
    topk_weights_ref: Any,
    hidden_ref: Any,
    *refs: Any,
    layout: PackedLayout,
    block_size: int,
    ops: WordOps,
) -> None:
    """Compute `OUT_TILE` outputs of one block's expert for its rows, times the routing weight.

    Each row is written to the place of its assignment, `row * topk + k`.
    """
    *weight_refs, out_ref = refs
    num_experts, (num_assignments, outputs) = weight_refs[0].shape[1], out_ref.shape
    block, tile = pl.program_id(0), pl.program_id(1)

    @pl.when((block < num_blocks_ref[0]) & (expert_ids_ref[block] < num_experts))
    def _() -> None:
        index = (layer_ref[0], expert_ids_ref[block])
        num_words = hidden_ref.shape[1] // layout.values_per_word
        weight = WeightRefs(layout, tuple(weight_refs), index, outputs, num_words, ops)
        places = block * block_size + jnp.arange(block_size)
        assignments = plt.load(sorted_token_ids_ref.at[places])
        topk_weights = plt.load(topk_weights_ref.at[assignments], mask=assignments < num_assignments, other=0)
        down_rows = tile * OUT_TILE + mma_m_order(layout, OUT_TILE)

        def add_step(i: Array, total: Array) -> Array:
            first_word = i * layout.words_per_step
            x = load_rows(layout, hidden_ref, places, first_word * layout.values_per_word, layout.values_per_step)
            return total + dot(load_tile(weight, down_rows, first_word, x.dtype), x)

        zero = jnp.zeros((OUT_TILE, block_size), jnp.float32)
        total = lax.fori_loop(0, -(-num_words // layout.words_per_step), add_step, zero)
        y = total.T * topk_weights[:, None]
        assignment, col = index_grid(assignments, tile * OUT_TILE + jnp.arange(OUT_TILE))
        plt.store(out_ref.at[assignment, col], y, mask=(assignment < num_assignments) & (col < outputs))


def fused_moe(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    topk_ids: Int[Array, "rows topk"],
    topk_weights: Float[Array, "rows topk"],
    valid: Bool[Array, " rows"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> Float[Array, "rows D"]:
    """Return the sum over the experts of each row, and zero for rows without experts.

    Args:
        valid: rows that have experts; None: those whose ids are below E.
        out_dtype: the dtype of the result; None: that of `x`.
        interpret: run as plain `jnp`, on any device.
    """
    num_experts = gate_up.shape[1]
    topk_ids = drop_invalid(topk_ids, valid, num_experts)
    outputs = fused_moe_unreduced(x, gate_up, down, layer, topk_ids, topk_weights, interpret=interpret)
    return combine_experts(outputs, topk_ids[:, 0] < num_experts, out_dtype or x.dtype)


def fused_moe_unreduced(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    topk_ids: Int[Array, "rows topk"],
    topk_weights: Float[Array, "rows topk"],
    *,
    interpret: bool = False,
) -> Float[Array, "rows topk D"]:
    """Return the weighted output of each expert of a row, float32; undefined for rows without experts.

    The stacks `[L, E, 2 I, D]` and `[L, E, D, I]` are dequantised in float32 and rounded to the dtype of `x`. The
    hidden units have the dtype of `x`, and sums are float32.

    Args:
        interpret: run as plain `jnp`, on any device.
    """
    rows, topk = topk_ids.shape
    gate_up_layout, gate_up_operands = pack_operands(gate_up)
    down_layout, down_operands = pack_operands(down)
    num_experts, num_hidden = gate_up_operands[0].shape[1], gate_up_operands[0].shape[2] // 2
    block_size = min(choose_block_size(rows, topk, num_experts), max_row_tile(x.dtype))
    block_size = max(min_row_tile(), block_size)
    align = align_unsorted if topk_ids.size <= MAX_UNSORTED else moe_align_block_size
    blocks = align(topk_ids, num_experts, block_size)
    num_blocks = blocks.expert_ids.shape[0]
    index = (
        jnp.asarray(layer, jnp.int32).reshape(1),
        blocks.expert_ids,
        blocks.num_blocks.astype(jnp.int32).reshape(1),
        blocks.sorted_token_ids,
    )
    options: dict[str, Any] = {"block_size": block_size, "ops": word_ops(interpret=interpret)}

    def compiler_params(layout: PackedLayout) -> plt.CompilerParams:
        return plt.CompilerParams(num_warps=4, num_stages=layout.num_stages(block_size, x.dtype))

    hidden = pl.pallas_call(
        partial(_gate_up_kernel, layout=gate_up_layout, topk=topk, **options),
        grid=(num_blocks, -(-num_hidden // OUT_TILE)),
        out_shape=jax.ShapeDtypeStruct((num_blocks * block_size, num_hidden), x.dtype),
        compiler_params=compiler_params(gate_up_layout),
        interpret=interpret,
        name=f"experts_gate_up_{gate_up_layout.layout}",
    )(*index, x, *gate_up_operands)
    return pl.pallas_call(
        partial(_down_kernel, layout=down_layout, **options),
        grid=(num_blocks, -(-x.shape[1] // OUT_TILE)),
        out_shape=jax.ShapeDtypeStruct((rows * topk, x.shape[1]), jnp.float32),
        compiler_params=compiler_params(down_layout),
        interpret=interpret,
        name=f"experts_down_{down_layout.layout}",
    )(*index, topk_weights.astype(jnp.float32).reshape(-1), hidden, *down_operands).reshape(rows, topk, -1)
