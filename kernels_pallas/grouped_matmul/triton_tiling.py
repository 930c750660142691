"""How the experts' kernels cut a call into programs: blocks of rows, tiles of outputs, and parts of a sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Int

from kernels_pallas.grouped_matmul.plan import choose_kernel_block
from kernels_pallas.matmul.tiling import OUT_TILE, Operands
from kernels_pallas.packed.layout import max_row_tile, min_row_tile
from kernels_pallas.platform import capability, shared_memory_bytes
from kernels_pallas.row_tiles import product_rows
from kernels_pallas.tile_tables import ExpertsConstants

# Assignments of a call up to which every one has a block of its own. Six rows of eight experts among 256 choose 44
# different ones: the other four blocks read 7 MB again, which take an H100 as long as the launch of a plan. Of eight
# rows it would be 12 MB, of sixteen 45.
MAX_UNSORTED = 48


def has_fast_products() -> bool:
    """Return whether tensor cores multiply a weight by 64 rows faster than other units unpack it: `wgmma`, `tcgen05`.

    By count, an H100 multiplies a weight by 128 rows in twice the time in which it unpacks it, an RTX 3090 by eight.
    """
    return (9, 0) <= capability() < (12, 0)


class Tiling(NamedTuple):
    """The tiles of a call.

    Attributes:
        block_size: rows of a block.
        product_rows: rows of one matrix product; several make a block where not all shapes are proved (`row_tiles.py`).
        topk: experts of a row.
        sorted: blocks hold sorted assignments. If not, each assignment has the block of its number, and is its first.
        parts: the pieces of the sum over D of gate and up.
        write_partials: each piece is a program of its own. It writes its partial sums, and the down kernel adds them.
        stages: steps that are under way at once, where shared memory suffices.
    """

    block_size: int
    product_rows: int
    topk: int
    sorted: bool
    parts: int
    write_partials: bool
    stages: int

    @property
    def is_wide(self) -> bool:
        """Whether eight warps share a program, whose sums would not fit the registers of four."""
        return self.block_size >= 64

    @property
    def num_products(self) -> int:
        """The products that share a tile of weights."""
        return self.block_size // self.product_rows

    @property
    def down_tile(self) -> int:
        """The outputs of a program of the down projection."""
        return 2 * OUT_TILE if self.is_wide else OUT_TILE

    def takes_shared(self, rows: int) -> bool:
        """Whether the down kernel also multiplies the rows of the shared expert: all of them fit one block."""
        return not self.sorted and rows <= self.block_size

    def compiler_params(self, weight: Operands, out_tile: int, dtype: DTypeLike) -> plt.CompilerParams:
        """Return the warps of a program and the steps under way: fewer where the card's shared memory is too small.

        Args:
            weight: the stack that the kernel reads.
            out_tile: rows of the weight that a program reads.
            dtype: of the token rows.
        """
        stages = 2 if dtype == jnp.float32 else self.stages
        while stages > 2 and weight.shared_bytes(self.block_size, out_tile, stages, dtype) > shared_memory_bytes():
            stages -= 1
        return plt.CompilerParams(num_warps=8 if self.is_wide else 4, num_stages=stages)


def num_parts(steps: int, constants: ExpertsConstants) -> int:
    """Return the parts of the sum over D of so many steps: those of the tile table, as far as each has two steps.

    The shape of the weight decides alone, never the number of rows.
    """
    parts = constants.gate_up_parts
    while parts > 1 and steps // parts < 2:
        parts //= 2
    return parts


class Places(NamedTuple):
    """Places of a block: those of one of its products."""

    assignments: Int[Array, " product_rows"]  # the number of assignments at a place without one
    hidden_rows: Int[Array, " product_rows"]  # where the hidden units of each place are


def places_of(block: Array, sorted_token_ids_ref: Any, num_assignments: int, tiling: Tiling) -> list[Places]:
    """Return the places of each product of a block."""

    def of(number: int) -> Places:
        at = number * tiling.product_rows + jnp.arange(tiling.product_rows)
        if tiling.sorted:  # hidden units of a block stand together: scattered ones would take registers for addresses
            places = block * tiling.block_size + at
            return Places(plt.load(sorted_token_ids_ref.at[places]), places)
        assignments = jnp.where(at == 0, block, num_assignments)
        return Places(assignments, assignments)

    return [of(number) for number in range(tiling.num_products)]


def choose_tiling(
    rows: int, topk: int, num_experts: int, steps: int, dtype: DTypeLike, constants: ExpertsConstants
) -> Tiling:
    """Return the tiling of a call.

    A block has at most `block_tile` rows on cards with fast products; on others, and for float32, `max_row_tile` limits
    it, too.

    Args:
        rows, topk: token rows, and experts of each.
        num_experts: of the layer.
        steps: of the sum over D of gate and up.
        dtype: of the rows.
        constants: what the tile table has for the shape of gate and up.
    """
    fast = has_fast_products()
    most = constants.block_tile
    if not fast or dtype == jnp.float32:
        most = min(most, max_row_tile(dtype))
    block_size = max(min_row_tile(), min(choose_kernel_block(rows, topk, num_experts, sure=fast), most))
    parts, few = num_parts(steps, constants), rows * topk <= MAX_UNSORTED
    return Tiling(
        block_size,
        product_rows(block_size),
        topk,
        sorted=not few,
        parts=parts,
        write_partials=few and parts > 1,
        stages=constants.stages_few if few else constants.stages_many,
    )
