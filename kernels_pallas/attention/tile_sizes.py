"""Sizes of the attention kernels' tiles, by dtype and card, with their reasons.

None may follow the number of rows, the batch or the length of the cache: sizes of tiles and pieces are an order of
sums. Times are of an H100 with heads of 256, two key/value heads and eight query heads for each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.platform import capability


class Pieces(NamedTuple):
    """Pieces of one size, which cover the cache from where the entry before ends. Powers of two."""

    end: int  # cache position
    size: int  # cache positions of a piece


class AttentionTile(NamedTuple):
    """Sizes of a kernel that reads the cache."""

    pairs: int  # (row, query head) pairs of a program
    kv: int  # cache positions that one loop iteration reads
    warps: int
    stages: int


# An iteration of 32 positions takes 1.1 us, and those of a piece follow one another. So the first pieces are as short
# as an iteration: up to 2,048 positions they are fewer than the multiprocessors. But the sums of a piece are 8 KiB a
# row, and 32 positions of keys and values are 32 KiB: large batches would rather have longer pieces. From 32k on pieces
# of 512 positions fill the card: they took 106 us at 131k, and 128 positions 105.
PIECES = (Pieces(2048, 32), Pieces(8192, 128), Pieces(32768, 256), Pieces(2**31 - 512, 512))

DECODE_TILES = {
    # Products of float32 are unrolled: 32 positions, or eight warps on an A100, spill registers.
    "float32": AttentionTile(pairs=16, kv=16, warps=4, stages=2),
    # 41 KiB of shared memory, which leaves room for two programs on a multiprocessor with 100 KiB.
    "sm80": AttentionTile(pairs=16, kv=32, warps=4, stages=2),
    "sm86": AttentionTile(pairs=16, kv=32, warps=4, stages=2),
    # With 16 pairs five rows read the cache three times, at the 5.7 TB/s of the second-level cache (143 us at 131k);
    # 32 pairs read it twice. 64 positions take 148 KiB of shared memory, so only one program runs on a multiprocessor:
    # that took 203 us.
    "sm90": AttentionTile(pairs=32, kv=32, warps=4, stages=2),
}
# Programs that read the cache, together; each goes through several pieces where there are more. About 400 run at a
# time, and one without a piece takes 2 ns. How pieces are dealt out has no effect on any sum, so it may follow the
# batch.
DECODE_PROGRAMS = 1024

JOIN_PIECES = 256  # pieces joined at a time: those of 57k positions, in 32 registers a thread
JOIN_CHANNELS = 16  # of a program: 256 programs for 16 query heads of 256 channels, twice the multiprocessors
JOIN_WARPS = 4
# Of the sums of pieces in memory, in bytes: beyond it, sequences take turns. Five rows of one sequence take 16 MiB at
# 32k and 31 MiB at 131k.
MAX_TEMP_BYTES = 256 * 2**20

PREFILL_TILES = {
    "float32": AttentionTile(pairs=16, kv=32, warps=4, stages=2),
    # More pairs spill registers: one warp would hold 16 pairs by 256 channels, and as many queries.
    "sm80": AttentionTile(pairs=64, kv=64, warps=8, stages=2),
    "sm86": AttentionTile(pairs=64, kv=32, warps=8, stages=2),  # 64 positions take 105 of 99 KiB
    # Two groups of four warps with 64 pairs each: wgmma with 64 x 256 results, and 192 KiB of shared memory. With 64
    # pairs a program would need keys and values faster than the second-level cache gives them. On a B200 144 bytes of
    # registers spill, and none with 64 pairs, which would use half of its tensor cores' rows.
    "sm90": AttentionTile(pairs=128, kv=64, warps=8, stages=2),
}


def card_class(dtype: DTypeLike) -> str:
    """Return the key of the tables above for rows of this dtype, on the platform that programs are traced for.

    "sm80" has 163 KiB of shared memory for a program, "sm90" (Hopper, and Blackwell for data centers) 227 KiB, and
    "sm86" (all other cards) 99 KiB.
    """
    if dtype == jnp.float32:
        return "float32"
    major, minor = capability()
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm90", (10, 3): "sm90"}.get((major, minor), "sm86")
