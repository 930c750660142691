"""Which token row stands where when rows are sorted by expert, as vLLM's `moe_align_block_size` lays them out.

An assignment is one (row, chosen expert) pair, numbered through: number `row * topk + i`. Assignments are sorted by
expert, and the run of every expert is padded to whole blocks. Kernels take blocks of one size (`BlockLayout`). The
loops of the "xla" implementation take windows of a few sizes (`WindowLayout`), so that a run is multiplied in few
pieces and hardly padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

WINDOW_STEP = 16  # rows
LONGEST_WINDOW = 512  # rows; products of more are no faster


class BlockLayout(NamedTuple):
    """Assignments in blocks of one size. Rows without an expert have no place in it."""

    sorted_token_ids: Int[Array, " places"]  # the assignment at each place; rows * topk for padding
    inverse_order: Int[Array, "rows topk"]  # the place of each assignment; the number of places if it has no expert
    expert_ids: Int[Array, " blocks"]  # the expert of each block
    num_blocks: Int[Array, ""]  # blocks in use, the first ones; nothing reads or writes the others


class Blocks(NamedTuple):
    """Assignments in blocks of one size, as the kernels take them. Those of an expert stand in consecutive blocks."""

    sorted_token_ids: Int[Array, " places"]  # the assignment at each place; rows * topk for padding
    expert_ids: Int[Array, " blocks"]  # the expert of each block; the number of experts where it is not in use


class WindowLayout(NamedTuple):
    """Assignments in windows of several sizes. Windows `first[s]` to `first[s + 1] - 1` have size number s."""

    sorted_token_ids: Int[Array, " places"]  # as in `BlockLayout`
    inverse_order: Int[Array, "rows topk"]
    expert_ids: Int[Array, " windows"]  # the expert of each window
    starts: Int[Array, " windows"]  # the first place of each window
    first: Int[Array, " bounds"]


def drop_invalid(
    topk_ids: Int[Array, "rows topk"], valid: Bool[Array, " rows"] | None, num_experts: int
) -> Int[Array, "rows topk"]:
    """Return the experts of each row, where rows that are not valid have none: their ids are `num_experts`."""
    return topk_ids if valid is None else jnp.where(valid[:, None], topk_ids, num_experts)


def choose_block_size(rows: int, topk: int, num_experts: int) -> int:
    """Return the rows of a block: about the mean run of an expert, as a power of two from 1 to 64.

    One row decodes as matrix-vector products. For more rows, a block that is too small reads an expert twice, and one
    that is too large multiplies padding.
    """
    return min(64, choose_kernel_block(rows, topk, num_experts, sure=False))


def choose_kernel_block(rows: int, topk: int, num_experts: int, *, sure: bool) -> int:
    """Return the rows of a kernel's block: a power of two from the mean run of an expert on.

    Args:
        sure: let the block hold all but the longest runs of random routing, those more than one and a half standard
            deviations above the mean. For a card whose tensor cores multiply padding faster than its other units unpack
            the weights of a second block.
    """
    mean = rows * topk / num_experts
    needed = mean + 1.5 * mean**0.5 if sure else mean
    block = 1
    while block < needed:
        block *= 2
    return block


def choose_window_sizes(rows: int, topk: int, num_experts: int) -> tuple[int, ...]:
    """Return the rows of the windows, ascending: the multiples of a step up to twice the mean run of an expert, or 512.

    A step is an eighth of the longest window and at least 16 rows: from there on, a CPU's product of a row has the same
    bits in a window of any size. For shorter runs there is one size, that of `choose_block_size`.
    """
    block = choose_block_size(rows, topk, num_experts)
    if block < WINDOW_STEP:
        return (block,)
    longest = 2 * block
    while longest < 2 * rows * topk / num_experts and longest < LONGEST_WINDOW:
        longest *= 2
    step = max(WINDOW_STEP, longest // 8)
    return tuple(range(step, longest + 1, step))


def num_places(num_assignments: int, num_experts: int, sizes: Sequence[int]) -> int:
    """Return the places of the padded layout: enough for any routing, so no row is ever dropped."""
    if len(sizes) == 1:
        return (num_assignments // sizes[0] + min(num_experts, num_assignments)) * sizes[0]
    return num_assignments + min(num_experts, num_assignments) * (sizes[0] - 1)


def num_block_slots(num_assignments: int, num_experts: int, block_size: int) -> int:
    """Return the blocks of `Blocks`, in use or not: enough for any routing."""
    return min(num_assignments, num_experts + num_assignments // block_size)


def first_block_of(
    expert: Int[Array, "..."], lower: Int[Array, "..."], num_assignments: int, num_experts: int, block_size: int
) -> Int[Array, "..."]:
    """Return the first block of an expert, given how many assignments experts of lower numbers have.

    No run needs more blocks than lie between its first block and that of the next expert, however the other assignments
    are distributed among lower experts. So an expert finds its place without the runs of the others.
    """
    if num_assignments <= num_experts + num_assignments // block_size:
        return lower
    return expert + lax.div(lower, block_size)


def align_blocks(topk_ids: Int[Array, "rows topk"], num_experts: int, block_size: int) -> Blocks:
    """Sort assignments by expert into blocks, with blocks in between that are not in use: plain JAX, for any platform.

    Args:
        topk_ids: the experts of each row; `num_experts` for a row without an expert, which gets no place.
    """
    total, flat = topk_ids.size, topk_ids.reshape(-1)
    slots = num_block_slots(total, num_experts, block_size)
    is_of = flat[:, None] == jnp.arange(num_experts)
    rank = jnp.sum(jnp.where(is_of, jnp.cumsum(is_of, axis=0) - 1, 0), axis=1)
    counts = jnp.sum(is_of, axis=0)
    lower = jnp.cumsum(counts) - counts
    first = first_block_of(jnp.arange(num_experts), lower, total, num_experts, block_size)
    place = jnp.where(flat < num_experts, first[flat] * block_size + rank, slots * block_size)
    sorted_token_ids = jnp.full(slots * block_size, total, jnp.int32)
    sorted_token_ids = sorted_token_ids.at[place].set(jnp.arange(total, dtype=jnp.int32), mode="drop")
    block = jnp.arange(slots)[:, None]
    is_in = (first <= block) & (block < first + -(-counts // block_size))
    expert_ids = jnp.min(jnp.where(is_in, jnp.arange(num_experts), num_experts), axis=1)
    return Blocks(sorted_token_ids, expert_ids.astype(jnp.int32))


def moe_align_block_size(topk_ids: Int[Array, "rows topk"], num_experts: int, block_size: int) -> BlockLayout:
    """Sort assignments by expert and pad the run of every expert to whole blocks.

    The blocks are at most `A // block_size + min(E, A)` for A assignments, so shapes are static and no row is ever
    dropped.

    Args:
        topk_ids: the experts of each row; `num_experts` for a row without an expert, which gets no place.
    """
    places = num_places(topk_ids.size, num_experts, (block_size,))
    runs = _sort_by_expert(topk_ids, num_experts, places, lambda counts: -(-counts // block_size) * block_size)
    ends = jnp.cumsum(-(-runs.counts // block_size))  # in blocks, inclusive
    # Not searchsorted, which is a loop: a GPU would wait for the host at each turn.
    expert_ids = jnp.sum(ends <= jnp.arange(places // block_size)[:, None], axis=1)
    expert_ids = jnp.minimum(expert_ids, num_experts - 1).astype(jnp.int32)
    return BlockLayout(runs.sorted_token_ids, runs.inverse_order, expert_ids, ends[-1])


def align_windows(topk_ids: Int[Array, "rows topk"], num_experts: int, sizes: Sequence[int]) -> WindowLayout:
    """Sort assignments by expert and lay out the run of every expert in windows.

    A run is cut into windows of the largest size. What is left becomes one window of the smallest size that holds it.

    Args:
        topk_ids: as for `moe_align_block_size`.
        sizes: one size, or the multiples of a step; see `choose_window_sizes`.
    """
    if len(sizes) == 1:
        blocks = moe_align_block_size(topk_ids, num_experts, sizes[0])
        starts = jnp.arange(blocks.expert_ids.size, dtype=jnp.int32) * sizes[0]
        first = jnp.stack([jnp.int32(0), blocks.num_blocks])
        return WindowLayout(blocks.sorted_token_ids, blocks.inverse_order, blocks.expert_ids, starts, first)
    step, longest = sizes[0], sizes[-1]
    places = num_places(topk_ids.size, num_experts, sizes)
    runs = _sort_by_expert(topk_ids, num_experts, places, lambda counts: -(-counts // step) * step)
    longest_windows = runs.counts // longest
    rest = -(-(runs.counts % longest) // step)  # the number of its size, from 1
    ends = jnp.cumsum(longest_windows)
    number = jnp.arange(topk_ids.size // longest)
    owner = jnp.minimum(jnp.sum(ends <= number[:, None], axis=1), num_experts - 1)
    size_number = jnp.concatenate([jnp.where(number < ends[-1], len(sizes), 0), rest])  # 0: not in use
    expert_ids = jnp.concatenate([owner, jnp.arange(num_experts)])
    starts = jnp.concatenate(
        [
            runs.starts[owner] + (number - (ends - longest_windows)[owner]) * longest,
            runs.starts + longest_windows * longest,
        ]
    )
    order = jnp.argsort(size_number, stable=True)
    first = jnp.sum(size_number < jnp.arange(1, len(sizes) + 2)[:, None], axis=1)
    expert_ids, starts, first = (a.astype(jnp.int32) for a in (expert_ids[order], starts[order], first))
    return WindowLayout(runs.sorted_token_ids, runs.inverse_order, expert_ids, starts, first)


class _Runs(NamedTuple):
    """Assignments sorted by expert, the run of every expert padded."""

    sorted_token_ids: Int[Array, " places"]
    inverse_order: Int[Array, "rows topk"]
    counts: Int[Array, " E"]  # assignments of each expert
    starts: Int[Array, " E"]  # the place where its run begins


def _sort_by_expert(
    topk_ids: Int[Array, "rows topk"],
    num_experts: int,
    places: int,
    padded: Callable[[Int[Array, " E"]], Int[Array, " E"]],
) -> _Runs:
    """Sort assignments by expert, each run as long as `padded` makes it."""
    total = topk_ids.size
    flat = topk_ids.reshape(total)
    order = jnp.argsort(flat, stable=True)
    by_expert = flat[order]
    counts = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    ends = jnp.cumsum(padded(counts))
    starts = jnp.concatenate([ends - padded(counts), jnp.array([places])])
    first_of_run = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts)])
    place = starts[by_expert] + jnp.arange(total) - first_of_run[by_expert]
    place = jnp.where(by_expert < num_experts, place, places)
    sorted_token_ids = jnp.full(places, total, jnp.int32).at[place].set(order.astype(jnp.int32), mode="drop")
    inverse_order = jnp.zeros(total, jnp.int32).at[order].set(place.astype(jnp.int32)).reshape(topk_ids.shape)
    return _Runs(sorted_token_ids, inverse_order, counts, starts[:-1])
