"""Kernels as `kernel_time_model` sees them: programs, turns of their loops, and bytes, from shapes and constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kernels_pallas.matmul.tiling import DECODE_ROWS, num_splits
from kernels_pallas.tile_tables import ExpertsConstants, MatmulConstants, packaged_table
from kernels_pallas.tiles import next_power_of_2
from scripts.gpu.cuda_target import Card

STEP = {4: 128, 5: 128, 6: 128, 8: 128, 16: 64}  # inputs of a turn by bits of a code (`PackedLayout.values_per_step`)
UNSORTED = 64  # assignments up to which every one has a block of experts of its own


class Matrix(NamedTuple):
    """A weight of a product. `bits` is that of a code; scales take half a bit more in four-bit forms."""

    outputs: int
    inputs: int
    bits: int = 4

    @property
    def bytes(self) -> float:
        return self.outputs * self.inputs * (self.bits + (0.5 if self.bits < 16 else 0)) / 8


class Experts(NamedTuple):
    """The experts of a layer."""

    hidden: int = 2048
    size: int = 512
    total: int = 256
    chosen: int = 8
    bits: int = 4


class Cache(NamedTuple):
    """The cache that attention reads."""

    context: int
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 256


class Delta(NamedTuple):
    """The state of a DeltaNet layer."""

    heads: int = 32
    key_size: int = 128
    value_size: int = 128


@dataclass(frozen=True)
class AttentionSplits:
    """How the attention kernel that was measured was cut; today's sizes are in `attention/tile_sizes.py`.

    Attributes:
        kv_split: cache positions of one program.
        kv_tile: cache positions that an iteration of its loop read.
    """

    kv_split: int = 256
    kv_tile: int = 32


class Launch(NamedTuple):
    """What the model sees of a kernel.

    Attributes:
        family: the kernels that share latency and work of a turn.
        programs: how many there are.
        turns: of all programs together.
        longest: turns of the longest program.
        resident: programs that a multiprocessor holds at a time, at most.
        bytes: read from memory.
        size: how large a turn is, in units of the family's smallest.
        stages: turns under way at once, where that counts.
    """

    family: str
    programs: int
    turns: float
    longest: int
    resident: int
    bytes: float
    size: float = 1.0
    stages: int = 2


def matmul_launch(shape: Sequence[Matrix], rows: int, card: Card, constants: MatmulConstants | None) -> Launch:
    """Return the launch of one product of rows with all matrices."""
    few, programs, turns, longest = rows <= DECODE_ROWS, 0, 0, 0
    of_all = [constants or packaged_table(card.name).find("matmul", w.outputs, w.inputs) for w in shape]
    assert all(isinstance(each, MatmulConstants) for each in of_all)
    chosen = [each for each in of_all if isinstance(each, MatmulConstants)]
    row_tile = min(next_power_of_2(rows), DECODE_ROWS if few else min(each.row_tile_many for each in chosen))
    row_tile = max(16 if (9, 0) <= card.capability < (12, 0) else 8, row_tile)
    stages = min(each.stages_few if few else each.stages_many for each in chosen)
    for w, each in zip(shape, chosen, strict=True):
        steps, out_tile = -(-w.inputs // STEP[w.bits]), each.out_tile if few or row_tile < 64 else 2 * each.out_tile
        splits = num_splits(w.outputs, steps, each) if few else 1
        of_matrix = -(-w.outputs // out_tile) * splits * -(-rows // row_tile)
        programs += of_matrix
        turns += of_matrix * -(-steps // splits)
        longest = max(longest, -(-steps // splits))
    read = sum(w.bytes for w in shape) + 2.0 * rows * (shape[0].inputs + sum(w.outputs for w in shape))
    if not few and row_tile >= 64:
        return Launch("many rows", programs, turns, longest, 1, read, row_tile / 64)
    kib = stages * row_tile / 4 + (stages - 1) * 4.5  # rows and words of a step of 128
    return Launch("few rows", programs, turns, longest, max(1, min(7, int(card.shared_kib / kib))), read, 1, stages)


def experts_launch(kind: str) -> Any:
    """Return the function that describes a launch of one of the two kernels of experts."""

    def launch(shape: Experts, rows: int, card: Card, constants: ExpertsConstants | None) -> Launch:
        found = constants or packaged_table(card.name).find("experts", 2 * shape.size, shape.hidden)
        assert isinstance(found, ExpertsConstants)
        assignments = rows * shape.chosen
        distinct = shape.total * (1 - (1 - shape.chosen / shape.total) ** rows)  # of rows that choose at random
        tile = min(found.block_tile, max(16, next_power_of_2(-(-assignments // shape.total))))
        blocks = assignments if assignments <= UNSORTED else distinct + assignments / tile / 2
        outputs, inputs = (shape.size, shape.hidden) if kind == "experts_gate_up" else (shape.hidden, shape.size)
        matrix = Matrix(2 * outputs if kind == "experts_gate_up" else outputs, inputs, shape.bits)
        parts = found.gate_up_parts if kind == "experts_gate_up" else 1
        steps, programs = -(-inputs // STEP[shape.bits]), int(blocks * -(-outputs // 64)) * parts
        longest = -(-steps // parts)
        resident = 4 if kind == "experts_gate_up" else 7
        many = assignments > UNSORTED
        family = kind + (" of many rows" if many else "")
        return Launch(family, programs, programs * longest, longest, resident, matrix.bytes * distinct, tile / 16)

    return launch


def attention_launch(shape: Cache, rows: int, card: Card, constants: AttentionSplits | None) -> Launch:
    """Return the launch of the kernel that read the cache for few rows when it was measured."""
    found = constants or AttentionSplits()
    pairs, splits = -(-rows * shape.heads // shape.kv_heads // 16), -(-shape.context // found.kv_split)
    programs, longest = shape.kv_heads * pairs * splits, found.kv_split // found.kv_tile
    resident = max(1, card.shared_kib * 1024 // (8 * found.kv_tile * shape.head_dim))  # keys and values, two stages
    read = 4.0 * shape.context * shape.kv_heads * shape.head_dim
    return Launch("attention", programs, programs * longest, longest, resident, read, found.kv_tile / 32)


def delta_launch(shape: Delta, rows: int, card: Card, columns: int | None) -> Launch:
    """Return the launch of the recurrence for few rows when it was measured: four warps a program, 64 columns."""
    programs = shape.heads * -(-shape.value_size // min(columns or 64, shape.value_size))
    return Launch("delta", programs, programs * rows, rows, 4, 4.0 * shape.heads * shape.key_size * shape.value_size)


LAUNCHES: dict[str, Any] = {
    "matmul": matmul_launch,
    "experts_gate_up": experts_launch("experts_gate_up"),
    "experts_down": experts_launch("experts_down"),
    "attention": attention_launch,
    "gated_delta_rule": delta_launch,
}
