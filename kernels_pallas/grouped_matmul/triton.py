"""The MLPs of packed (or plain) experts: two Pallas kernels through the Triton lowering.

Rows are sorted by expert and laid out in blocks (`plan.py`). The kernels take the whole `[layer, expert, ...]` stacks
and read the tiles of the experts that the blocks name; nothing is sliced, so nothing is copied. Gate and up are one
kernel with SiLU; down applies the routing weight in float32.

A row's result does not depend on the other rows, bit for bit: its sums over D and I are taken in steps of a fixed size
and order, and the sum over its experts in the order in which they were chosen. The sum over D of gate and up is cut
into parts, as the tile table says for the shape of the weight. With few rows a part is a program of its own, which
fills the GPU. It writes partial sums, float32, `2 * parts * I` for each assignment (at most 0.4 MiB for a 35B-A3B), and
the down kernel adds and activates them. With more rows one program adds the parts in the same order.
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

from kernels_pallas.grouped_matmul.plan import drop_invalid
from kernels_pallas.grouped_matmul.reference import combine_experts
from kernels_pallas.grouped_matmul.triton_gate_up import (
    add_products,
    gate_up_kernel,
    routed_gate_up_kernel,
    silu_and_mul,
)
from kernels_pallas.grouped_matmul.triton_plan import align_blocks
from kernels_pallas.grouped_matmul.triton_routing import ChoiceRefs, Router, RouterRefs, load_weight
from kernels_pallas.grouped_matmul.triton_shared import (
    SharedExpert,
    SharedLayout,
    shared_operands,
    store_shared_tile,
)
from kernels_pallas.grouped_matmul.triton_tiling import Tiling, choose_tiling, places_of
from kernels_pallas.matmul.tiling import OUT_TILE, Operands
from kernels_pallas.matmul.triton import supports
from kernels_pallas.packed.dequantize import WeightRefs, load_tile
from kernels_pallas.packed.layout import (
    PackedLayout,
    load_rows,
    mma_k_order,
    mma_m_order,
    pack_operands,
)
from kernels_pallas.packed.ptx_ops import WordOps, word_ops
from kernels_pallas.partial_sums import load_partial_sum
from kernels_pallas.tile_tables import tile_constants
from kernels_pallas.tiles import index_grid
from kernels_pallas.weights import Weight

__all__ = ["fused_moe", "fused_moe_routed", "fused_moe_unreduced", "routes", "supports"]


def _down_kernel(
    layer_ref: Any,
    expert_ids_ref: Any,
    sorted_token_ids_ref: Any,
    topk_weights_ref: Any,
    hidden_ref: Any,
    *refs: Any,
    layout: PackedLayout,
    tiling: Tiling,
    dtype: DTypeLike,
    shared: SharedLayout | None,
    routed: bool,
    ops: WordOps,
) -> None:
    """Compute `down_tile` outputs of one block's expert for its rows, times the routing weight.

    With `shared`, the programs behind the last block compute the down projection of the shared expert.

    Each row is written to the place of its assignment, `row * topk + k`. Where `hidden_ref` holds partial
    sums of gate and up, every program adds them and activates the hidden units itself, which is cheaper than a launch.
    With `routed`, the weights are those that `choose_expert` stored.
    """
    block, tile, num_blocks = pl.program_id(0), pl.program_id(1), expert_ids_ref.shape[0]
    weight_refs, out_ref = refs[: len(layout.operand_names) + 1], refs[-1 if shared is None else -2]
    num_experts, (num_assignments, outputs) = weight_refs[0].shape[1], out_ref.shape
    expert = expert_ids_ref[jnp.minimum(block, num_blocks - 1)]
    if shared is not None:
        operands = refs[len(weight_refs) : -2]
        expert = jnp.where(block < num_blocks, expert, num_experts)
        pl.when(block == num_blocks)(
            lambda: store_shared_tile(operands, refs[-1], shared, tile, tiling.down_tile, tiling.block_size, ops)
        )

    @pl.when(expert < num_experts)
    def _() -> None:
        index = (layer_ref[0], expert)
        num_hidden = hidden_ref.shape[-1] // (2 if tiling.write_partials else 1)
        num_words = num_hidden // layout.values_per_word
        weight = WeightRefs(layout, tuple(weight_refs), index, outputs, num_words, ops)
        products = places_of(block, sorted_token_ids_ref, num_assignments, tiling)
        down_rows = tile * tiling.down_tile + mma_m_order(layout, tiling.down_tile)

        def load_hidden(hidden_rows: Array, first: Array) -> Array:
            if not tiling.write_partials:
                return load_rows(layout, hidden_ref, hidden_rows, first, layout.values_per_step)
            at = first + mma_k_order(layout, layout.values_per_step)
            inside = at < num_hidden if num_hidden % layout.values_per_step else None
            gate = load_partial_sum(hidden_ref, block, at, mask=inside)
            up = load_partial_sum(hidden_ref, block, num_hidden + at, mask=inside)
            x = silu_and_mul(gate, up, dtype)
            # The other places of the block have no assignment, and nothing is stored for them.
            return jnp.broadcast_to(x[None, :], (hidden_rows.size, x.size))

        def add_step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            first_word = i * layout.words_per_step
            xs = [load_hidden(rows, first_word * layout.values_per_word) for _, rows in products]
            w = load_tile(weight, down_rows, first_word, dtype)
            return add_products(sums, [(w, x) for x in xs])

        zeros = (jnp.zeros((tiling.down_tile, tiling.product_rows), jnp.float32),) * tiling.num_products
        sums = lax.fori_loop(0, -(-num_words // layout.words_per_step), add_step, zeros)
        for total, (assignments, _) in zip(sums, products, strict=True):
            if routed:
                topk_weights = jnp.full(assignments.shape, load_weight(topk_weights_ref, block, tiling.topk))
            else:
                topk_weights = plt.load(topk_weights_ref.at[assignments], mask=assignments < num_assignments, other=0)
            assignment, col = index_grid(assignments, tile * tiling.down_tile + jnp.arange(tiling.down_tile))
            inside = (assignment < num_assignments) & (col < outputs)
            plt.store(out_ref.at[assignment, col], total.T * topk_weights[:, None], mask=inside)


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
    outputs, _ = fused_moe_unreduced(x, gate_up, down, layer, topk_ids, topk_weights, interpret=interpret)
    return combine_experts(outputs, topk_ids[:, 0] < num_experts, out_dtype or x.dtype)


def fused_moe_unreduced(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    topk_ids: Int[Array, "rows topk"],
    topk_weights: Float[Array, "rows topk"],
    shared: SharedExpert | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "rows topk D"], Float[Array, "rows D"] | None]:
    """Return the weighted output of each expert of a row, and that of the shared expert if it is given and the rows are
    few (`Tiling.takes_shared`), all float32. The outputs of rows without experts are undefined.

    The stacks `[L, E, 2 I, D]` and `[L, E, D, I]` are dequantised in float32 and rounded to the dtype of `x`. The
    hidden units have the dtype of `x`, and sums are float32.

    Args:
        interpret: run as plain `jnp`, on any device.
    """
    topk = topk_ids.shape[1]
    operands, tiling = _operands_and_tiling(x, gate_up, topk)
    num_experts, num_hidden = gate_up.shape[1], operands.outputs // 2
    if not tiling.sorted:
        expert_ids = sorted_token_ids = topk_ids.reshape(-1).astype(jnp.int32)  # the second is not read
    else:
        sorted_token_ids, expert_ids = align_blocks(topk_ids, num_experts, tiling.block_size, interpret=interpret)
    index = (jnp.asarray(layer, jnp.int32).reshape(1), expert_ids, sorted_token_ids)

    if tiling.write_partials:
        hidden_shape = jax.ShapeDtypeStruct((tiling.parts, topk_ids.size, 2 * num_hidden), jnp.float32)
    else:
        hidden_shape = jax.ShapeDtypeStruct((sorted_token_ids.size, num_hidden), x.dtype)
    hidden = pl.pallas_call(
        partial(gate_up_kernel, layout=operands.layout, tiling=tiling, ops=word_ops(interpret=interpret)),
        grid=(expert_ids.size, -(-num_hidden // OUT_TILE), tiling.parts if tiling.write_partials else 1),
        out_shape=hidden_shape,
        compiler_params=tiling.compiler_params(operands, 2 * OUT_TILE, x.dtype),
        interpret=interpret,
        name=f"experts_gate_up_{operands.layout.layout}",
    )(*index, x, *operands.arrays)
    weights = topk_weights.astype(jnp.float32).reshape(-1)
    return _down(x, down, index, weights, hidden, shared, tiling, routed=False, interpret=interpret)


def routes(x: Float[Array, "rows D"], gate_up: Weight, topk: int) -> bool:
    """Return whether `fused_moe_routed` supports the rows: each part of gate and up is a program of its own."""
    tiling = _operands_and_tiling(x, gate_up, topk)[1]
    return tiling.write_partials and tiling.takes_shared(x.shape[0])


def fused_moe_routed(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    router: Router,
    topk: int,
    shared_down: Weight,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "rows topk D"], Float[Array, "rows D"]]:
    """Choose the experts of each row, as `kernels_pallas.topk_softmax` does; return what `fused_moe_unreduced` does.

    Args:
        router: the results of the router's launch.
        topk: experts of a row.
        shared_down: the down projection of the shared expert.
        interpret: run as plain `jnp`, on any device.
    """
    rows = x.shape[0]
    operands, tiling = _operands_and_tiling(x, gate_up, topk)
    num_hidden, assignments = operands.outputs // 2, rows * topk
    logits, gate, up, valid = router
    refs = RouterRefs(logits.parts, gate.parts, up.parts, valid.astype(jnp.int32))
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    choice_shapes = ChoiceRefs(
        jax.ShapeDtypeStruct((assignments,), jnp.int32),
        jax.ShapeDtypeStruct((assignments,), jnp.float32),
        jax.ShapeDtypeStruct((rows, refs.gate.shape[2]), x.dtype),
    )
    hidden, choice = pl.pallas_call(
        partial(routed_gate_up_kernel, layout=operands.layout, tiling=tiling, ops=word_ops(interpret=interpret)),
        grid=(assignments + rows, -(-num_hidden // OUT_TILE), tiling.parts),
        out_shape=(jax.ShapeDtypeStruct((tiling.parts, assignments, 2 * num_hidden), jnp.float32), choice_shapes),
        compiler_params=tiling.compiler_params(operands, 2 * OUT_TILE, x.dtype),
        interpret=interpret,
        name=f"experts_gate_up_{operands.layout.layout}",
    )(index, refs, x, operands.arrays)
    ids, weights, shared_hidden = choice
    shared = SharedExpert(shared_hidden, shared_down)
    outputs, total = _down(
        x, down, (index, ids, ids), weights, hidden, shared, tiling, routed=True, interpret=interpret
    )
    assert total is not None  # `routes`
    return outputs, total


def _operands_and_tiling(x: Float[Array, "rows D"], gate_up: Weight, topk: int) -> tuple[Operands, Tiling]:
    """Return the operands of gate and up, and the tiling of both launches."""
    operands = Operands(*pack_operands(gate_up))
    constants = tile_constants("experts", outputs=operands.outputs, inputs=x.shape[1])
    return operands, choose_tiling(x.shape[0], topk, gate_up.shape[1], operands.num_steps, x.dtype, constants)


def _down(
    x: Float[Array, "rows D"],
    down: Weight,
    index: tuple[Array, Array, Array],
    weights: Float[Array, " A"],
    hidden: Array,
    shared: SharedExpert | None,
    tiling: Tiling,
    *,
    routed: bool,
    interpret: bool,
) -> tuple[Float[Array, "rows topk D"], Float[Array, "rows D"] | None]:
    """Launch the down projection. `index`: the layer, the experts of the blocks, and the assignments in them."""
    down_operands, expert_ids, rows = Operands(*pack_operands(down)), index[1], x.shape[0]
    out_shapes = [jax.ShapeDtypeStruct((rows * tiling.topk, x.shape[1]), jnp.float32)]
    shared_layout: SharedLayout | None = None
    operands: tuple[Array, ...] = ()
    if shared is not None and tiling.takes_shared(rows):
        shared_layout, operands = shared_operands(shared)
        out_shapes.append(jax.ShapeDtypeStruct(x.shape, jnp.float32))
    kernel = partial(
        _down_kernel,
        layout=down_operands.layout,
        tiling=tiling,
        dtype=x.dtype,
        shared=shared_layout,
        routed=routed,
        ops=word_ops(interpret=interpret),
    )
    outputs, *shared_output = pl.pallas_call(
        kernel,
        grid=(expert_ids.size + len(out_shapes) - 1, -(-x.shape[1] // tiling.down_tile)),
        out_shape=out_shapes,
        compiler_params=tiling.compiler_params(down_operands, tiling.down_tile, x.dtype),
        interpret=interpret,
        name=f"experts_down_{down_operands.layout.layout}",
    )(*index, weights, hidden, *down_operands.arrays, *operands)
    return outputs.reshape(rows, tiling.topk, -1), shared_output[0] if shared_output else None
