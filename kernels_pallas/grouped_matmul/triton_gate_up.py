"""The kernel of the experts' gate and up projections; with a router, it chooses the experts first."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float

from kernels_pallas.grouped_matmul.triton_routing import ChoiceRefs, RouterRefs, activate_shared, choose_expert
from kernels_pallas.grouped_matmul.triton_tiling import Tiling, places_of
from kernels_pallas.matmul.tiling import OUT_TILE
from kernels_pallas.packed.dequantize import WeightRefs, load_tile
from kernels_pallas.packed.layout import PackedLayout, load_rows, mma_m_order
from kernels_pallas.packed.ptx_ops import WordOps
from kernels_pallas.tiles import dot, index_grid


def silu_and_mul(gate: Array, up: Array, dtype: DTypeLike) -> Array:
    return (gate / (1.0 + jnp.exp(-gate)) * up).astype(dtype)


def _gate_up_rows(layout: PackedLayout, tile: Array, num_hidden: int, tiles: int) -> list[Array]:
    """Return the rows of gate and up, in an expert's `[2 I, D]`, that belong to a tile of hidden units."""

    def of(rows: Array) -> Array:
        hidden = jnp.minimum(tile * OUT_TILE + lax.rem(rows, OUT_TILE), num_hidden - 1)
        return jnp.where(rows < OUT_TILE, hidden, num_hidden + hidden)

    at = mma_m_order(layout, 2 * OUT_TILE // tiles)
    return [of(at + number * OUT_TILE) for number in range(tiles)]


def add_products(sums: tuple[Array, ...], operands: list[tuple[Array, Array]]) -> tuple[Array, ...]:
    """Add the product of each pair of a weight tile and rows to its sum."""
    return tuple(total + dot(w, x) for total, (w, x) in zip(sums, operands, strict=True))


def _halves(x: Float[Array, "two_O rows"]) -> tuple[Float[Array, "O rows"], Float[Array, "O rows"]]:
    """Return the upper and the lower half of the rows; the compiler has no slices, and a sum with zeros is exact."""
    x = x.reshape(2, -1, x.shape[1])
    upper = jnp.arange(2)[:, None, None] == 0
    return jnp.sum(jnp.where(upper, x, 0.0), axis=0), jnp.sum(jnp.where(upper, 0.0, x), axis=0)


def gate_up_kernel(
    layer_ref: Any, expert_ids_ref: Any, sorted_token_ids_ref: Any, x_ref: Any, *refs: Any, **options: Any
) -> None:
    """Compute a tile of hidden units of one block's expert; see `_gate_up_tile`."""
    *weight_refs, out_ref = refs
    program = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    expert = expert_ids_ref[program[0]]
    _gate_up_tile(program, layer_ref, expert, sorted_token_ids_ref, x_ref, weight_refs, out_ref, **options)


def routed_gate_up_kernel(
    layer_ref: Any,
    router: RouterRefs,
    x_ref: Any,
    weight_refs: tuple[Any, ...],
    out_ref: Any,
    choice: ChoiceRefs,
    *,
    layout: PackedLayout,
    tiling: Tiling,
    ops: WordOps,
) -> None:
    """Choose the expert of an assignment and compute a tile of its hidden units.

    Programs behind the last assignment activate the shared expert.
    """
    program = block, tile, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    num_assignments, tiles = x_ref.shape[0] * tiling.topk, -(-out_ref.shape[2] // (2 * OUT_TILE))

    @pl.when(block < num_assignments)
    def _() -> None:
        expert = choose_expert(router, choice, block, tiling.topk, (tile == 0) & (part == 0))
        refs = layer_ref, expert, router.valid, x_ref, list(weight_refs), out_ref
        _gate_up_tile(program, *refs, layout=layout, tiling=tiling, ops=ops)

    @pl.when((block >= num_assignments) & (part == 0))
    def _() -> None:
        activate_shared(router, choice, block - num_assignments, tile, tiles)


def _gate_up_tile(
    program: tuple[Array, Array, Array],
    layer_ref: Any,
    expert: Array,
    sorted_token_ids_ref: Any,
    x_ref: Any,
    weight_refs: list[Any],
    out_ref: Any,
    *,
    layout: PackedLayout,
    tiling: Tiling,
    ops: WordOps,
) -> None:
    """Compute `OUT_TILE` hidden units, SiLU(gate) * up, of one block's expert for its rows, or partial sums of both.

    The hidden units are `[places, I]` or, where nothing is sorted, `[A, I]`; the partial sums of part p `[p, A, 2 I]`.
    `program`: the block, the tile of hidden units, and the part.
    """
    num_experts, num_hidden = weight_refs[0].shape[1], weight_refs[0].shape[2] // 2
    num_assignments = x_ref.shape[0] * tiling.topk
    block, tile, part = program

    @pl.when(expert < num_experts)
    def _() -> None:
        index = (layer_ref[0], expert)
        num_words = x_ref.shape[1] // layout.values_per_word
        weight = WeightRefs(layout, tuple(weight_refs), index, 2 * num_hidden, num_words, ops)
        products = places_of(block, sorted_token_ids_ref, num_assignments, tiling)
        num_steps = -(-num_words // layout.words_per_step)
        steps_per_part = -(-num_steps // tiling.parts)
        # Gate and up as one tile of rows, or as two; for each of them and each product a sum.
        tiles = 1 if tiling.is_wide else 2
        tile_rows = _gate_up_rows(layout, tile, num_hidden, tiles)
        zero = jnp.zeros((2 * OUT_TILE // tiles, tiling.product_rows), jnp.float32)
        zeros = (zero,) * (tiles * tiling.num_products)

        def add_step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            first_word = i * layout.words_per_step
            first, count = first_word * layout.values_per_word, layout.values_per_step
            # The row of a place without an assignment is beyond the last one.
            xs = [load_rows(layout, x_ref, lax.div(at, tiling.topk), first, count) for at, _ in products]
            weights = [load_tile(weight, tile_row, first_word, x_ref.dtype) for tile_row in tile_rows]
            return add_products(sums, [(w, x) for x in xs for w in weights])

        def sums_of_part(part: Array | int) -> tuple[Array, ...]:
            first = part * steps_per_part
            iterations: Array | int = steps_per_part
            if num_steps % tiling.parts:
                iterations = jnp.clip(num_steps - first, 0, iterations)
            return lax.fori_loop(0, iterations, lambda i, sums: add_step(first + i, sums), zeros)

        def add_part(part: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(total + sums for total, sums in zip(totals, sums_of_part(part), strict=True))

        if tiling.write_partials:
            sums = sums_of_part(part)
        else:
            sums = sums_of_part(0) if tiling.parts == 1 else lax.fori_loop(0, tiling.parts, add_part, zeros)
        for number, (_, hidden_rows) in enumerate(products):
            gate, up = _halves(sums[number]) if tiling.is_wide else sums[2 * number : 2 * number + 2]
            at, col = index_grid(hidden_rows, tile * OUT_TILE + jnp.arange(OUT_TILE))
            inside = (at < out_ref.shape[-2]) & (col < num_hidden)
            if tiling.write_partials:
                plt.store(out_ref.at[part, at, col], gate.T, mask=inside)
                plt.store(out_ref.at[part, at, num_hidden + col], up.T, mask=inside)
            else:
                plt.store(out_ref.at[at, col], silu_and_mul(gate, up, out_ref.dtype).T, mask=inside)
