"""How a launch of the product is cut: splits of the sum over F, tiles of rows and of outputs, pipeline stages.

The splits of a weight follow its shape alone, because they are the order of a row's sum. All else may follow the number
of rows, the other weights of the launch and the card: tiles and stages change which program adds, not what is added to
what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels_pallas.packed.layout import PackedLayout, max_row_tile, min_row_tile
from kernels_pallas.platform import shared_memory_bytes
from kernels_pallas.row_tiles import product_rows
from kernels_pallas.tile_tables import MatmulConstants, tile_constants
from kernels_pallas.tiles import next_power_of_2

DECODE_ROWS = 64  # rows of a call up to which each split is a program of its own
OUT_TILE = 64  # outputs of a tile of the experts' products


class Operands(NamedTuple):
    """A weight of a launch, as `pack_operands` gives it."""

    layout: PackedLayout
    arrays: tuple[Array, ...]

    @property
    def outputs(self) -> int:
        return self.arrays[0].shape[-2]

    @property
    def num_steps(self) -> int:
        """The iterations of the kernel's loop over the sum."""
        return -(-self.arrays[0].shape[-1] // self.layout.words_per_step)

    @property
    def constants(self) -> MatmulConstants:
        """What the tile table has for the shape of this weight."""
        words = self.arrays[0].shape[-1]
        return tile_constants("matmul", self.outputs, words * self.layout.values_per_word)

    @property
    def num_splits(self) -> int:
        """The splits of the sum."""
        return num_splits(self.outputs, self.num_steps, self.constants)

    def shared_bytes(self, row_tile: int, out_tile: int, stages: int, dtype: DTypeLike) -> int:
        """Return about how much shared memory a program takes: what is prefetched, and one unpacked tile."""
        x_bytes = self.layout.values_per_step * jnp.dtype(dtype).itemsize
        row_bytes = sum(array.shape[-1] * array.dtype.itemsize for array in self.arrays)
        prefetched = row_tile * x_bytes + out_tile * -(-row_bytes // self.num_steps)
        return (stages - 1) * prefetched + out_tile * x_bytes


class Tiling(NamedTuple):
    """The tiles of a launch."""

    row_tile: int
    out_tile: int
    warps: int
    stages: int
    write_partials: bool  # each split is a program of its own, which writes its partial sum


def num_splits(outputs: int, steps: int, constants: MatmulConstants) -> int:
    """Return the splits of the sum over F: a power of two that makes about `programs` programs of two steps or more."""
    splits = 1
    while splits * -(-outputs // constants.out_tile) < constants.programs and steps // (2 * splits) >= 2:
        splits *= 2
    return splits


def choose_tiling(rows: int, weights: Sequence[Operands], dtype: DTypeLike) -> Tiling:
    """Return the tiles of a launch that multiplies so many rows of a dtype with these weights.

    Weights of several sizes get the least of what the table has for each. With many rows of bfloat16 a tile has up to
    `row_tile_many` rows: the more rows, the fewer times a weight is unpacked. Where the shared memory of the card is
    too small, first the stages are fewer, then the rows.
    """
    write_partials, max_rows = rows <= DECODE_ROWS, max_row_tile(dtype)
    constants = [weight.constants for weight in weights]
    narrow = min(each.out_tile for each in constants)
    if max_rows < 64:  # float32
        stages = 2
    elif write_partials:
        stages = min(each.stages_few for each in constants)
    else:
        stages = min(each.stages_many for each in constants)
        max_rows = min(each.row_tile_many for each in constants)
    row_tile = product_rows(max(min_row_tile(), min(next_power_of_2(rows), max_rows)))
    while True:
        wide = row_tile >= 64 and not write_partials
        out_tile, warps = (2 * narrow, 8) if wide else (narrow, 4)
        most = max(weight.shared_bytes(row_tile, out_tile, stages, dtype) for weight in weights)
        if most <= shared_memory_bytes() or (stages == 2 and row_tile <= 64):
            return Tiling(row_tile, out_tile, warps, stages, write_partials)
        if stages > 2:
            stages -= 1
        else:
            row_tile //= 2
