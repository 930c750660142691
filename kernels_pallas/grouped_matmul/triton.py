"""The expert MLP with packed (or plain) experts: two Pallas kernels through the Triton lowering.

Rows are sorted by expert and laid out in blocks (`plan.py`). The kernels take the whole `[layer, expert, ...]` stacks
and read the tiles of the experts that blocks name; nothing is sliced, so nothing is copied. Gate and up are one kernel
with SiLU; down applies the routing weight in float32. A row's result does not depend on the other rows, bit for bit:
its sums over D and I are taken in steps of a fixed size and order, and those over its experts in the order chosen.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Bool, Float, Int

from kernels_pallas.grouped_matmul.plan import choose_block, plan_blocks, plan_each
from kernels_pallas.packed.dequantize import Form, few_rows, load_rows, load_tile, most_rows, tile_rows, words
from kernels_pallas.packed.ptx_ops import ARITHMETIC, MACHINE
from kernels_pallas.tiles import dot, index_grid
from kernels_pallas.weights.quantized import QuantizedTensor

OUT_TILE = 64
EACH = 64  # assignments of a call up to which every one has a block of its own


def _gate_up_kernel(
    layer_ref: Any,
    expert_ref: Any,
    count_ref: Any,
    source_ref: Any,
    x_ref: Any,
    *refs: Any,
    form: Form,
    block: int,
    chosen: int,
    asm: bool,
) -> None:
    """Rows of one block times `OUT_TILE` gate rows and the same up rows of its expert, and SiLU(gate) * up."""
    *weight, out_ref = refs
    experts = weight[0].shape[1]
    z, tile, size = pl.program_id(0), pl.program_id(1), out_ref.shape[1]
    shape = (2 * size, x_ref.shape[1] // form.slots)
    ops = MACHINE if asm else ARITHMETIC

    @pl.when((z < count_ref[0]) & (expert_ref[z] < experts))
    def _() -> None:
        at = (layer_ref[0], expert_ref[z])
        place = z * block + jnp.arange(block)
        rows = plt.load(source_ref.at[place]) // chosen  # the row count for places without a row: beyond the end
        rows_read = jnp.minimum(tile * OUT_TILE + tile_rows(form, OUT_TILE), size - 1)

        def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            x = load_rows(form, x_ref, rows, i * form.step * form.slots, form.step * form.slots)
            load = partial(load_tile, form, tuple(weight), at, count=form.step, shape=shape, dtype=x.dtype)
            gate = load(rows=rows_read, first_word=i * form.step, ops=ops)
            up = load(rows=size + rows_read, first_word=i * form.step, ops=ops)
            return sums[0] + dot(gate, x), sums[1] + dot(up, x)

        zero = jnp.zeros((OUT_TILE, block), jnp.float32)
        gate, up = lax.fori_loop(0, -(-shape[1] // form.step), step, (zero, zero))
        hidden = gate / (1.0 + jnp.exp(-gate)) * up
        place, col = index_grid(place, tile * OUT_TILE + jnp.arange(OUT_TILE))
        plt.store(out_ref.at[place, col], hidden.T.astype(out_ref.dtype), mask=col < size)


def _down_kernel(
    layer_ref: Any,
    expert_ref: Any,
    count_ref: Any,
    source_ref: Any,
    share_ref: Any,
    hidden_ref: Any,
    *refs: Any,
    form: Form,
    block: int,
    asm: bool,
) -> None:
    """Rows of one block times `OUT_TILE` rows of its expert's down matrix, times the routing weight, put at the place of
    the assignment."""
    *weight, out_ref = refs
    experts = weight[0].shape[1]
    z, tile, total = pl.program_id(0), pl.program_id(1), out_ref.shape[0]
    shape = (out_ref.shape[1], hidden_ref.shape[1] // form.slots)

    @pl.when((z < count_ref[0]) & (expert_ref[z] < experts))
    def _() -> None:
        at = (layer_ref[0], expert_ref[z])
        place = z * block + jnp.arange(block)
        source = plt.load(source_ref.at[place])
        share = plt.load(share_ref.at[source], mask=source < total, other=0)
        rows_read = tile * OUT_TILE + tile_rows(form, OUT_TILE)

        def step(i: Array, acc: Array) -> Array:
            x = load_rows(form, hidden_ref, place, i * form.step * form.slots, form.step * form.slots)
            ops = MACHINE if asm else ARITHMETIC
            w = load_tile(form, tuple(weight), at, rows_read, i * form.step, form.step, shape, x.dtype, ops)
            return acc + dot(w, x)

        zero = jnp.zeros((OUT_TILE, block), jnp.float32)
        y = lax.fori_loop(0, -(-shape[1] // form.step), step, zero).T * share[:, None]
        row, col = index_grid(source, tile * OUT_TILE + jnp.arange(OUT_TILE))
        plt.store(out_ref.at[row, col], y, mask=(row < total) & (col < shape[0]))


def grouped_mlp(
    x: Float[Array, "N D"],
    gate_up: Array | QuantizedTensor,
    down: Array | QuantizedTensor,
    layer: Int[Array, ""],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    live: Bool[Array, " N"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """`kernels_pallas.grouped_matmul.expert_mlp` on a GPU."""
    each = each_expert(x, gate_up, down, layer, chosen, weights, live, interpret=interpret)
    return mixed(each, chosen[:, 0] < gate_up.shape[1] if live is None else live, x.dtype)


def mixed(each: Float[Array, "N K D"], live: Bool[Array, " N"], dtype: Any) -> Float[Array, "N D"]:
    """The sum of `each_expert`, in order; zero for dead rows, whose places were never written."""
    total = each[:, 0]
    for i in range(1, each.shape[1]):
        total = total + each[:, i]
    return jnp.where(live[:, None], total, 0.0).astype(dtype)


def each_expert(
    x: Float[Array, "N D"],
    gate_up: Array | QuantizedTensor,
    down: Array | QuantizedTensor,
    layer: Int[Array, ""],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    live: Bool[Array, " N"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "N K D"]:
    """What each chosen expert gives for a row by its weight, float32; undefined for dead rows. Weights `[P, E, 2 I, D]` and
    `[P, E, D, I]` are dequantised in float32 and rounded to the dtype of x; the hidden rows have the dtype of x; sums are
    float32.

    Args:
        interpret: run as plain `jnp`, on any device.
    """
    rows, k = chosen.shape
    up_form, up = words(gate_up)
    down_form, down_operands = words(down)
    experts, inner = up[0].shape[1], up[0].shape[2] // 2
    block = max(few_rows(), min(choose_block(rows, k, experts), most_rows(x.dtype)))
    plan = (plan_each if chosen.size <= EACH else plan_blocks)(chosen, live, experts, block)
    blocks = plan.expert.shape[0]
    call = partial(pl.pallas_call, interpret=interpret)
    index = (
        jnp.asarray(layer, jnp.int32).reshape(1),
        plan.expert,
        plan.count.astype(jnp.int32).reshape(1),
        plan.source,
    )
    hidden = call(
        partial(_gate_up_kernel, form=up_form, chosen=k, block=block, asm=not interpret),
        grid=(blocks, -(-inner // OUT_TILE)),
        out_shape=jax.ShapeDtypeStruct((blocks * block, inner), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=up_form.stages(block, x.dtype)),
        name=f"experts_gate_up_{up_form.layout}",
    )(*index, x, *up)
    return call(
        partial(_down_kernel, form=down_form, block=block, asm=not interpret),
        grid=(blocks, -(-x.shape[1] // OUT_TILE)),
        out_shape=jax.ShapeDtypeStruct((rows * k, x.shape[1]), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=down_form.stages(block, x.dtype)),
        name=f"experts_down_{down_form.layout}",
    )(*index, weights.astype(jnp.float32).reshape(-1), hidden, *down_operands).reshape(rows, k, -1)
