"""The map from blocks of rows to experts: rows sorted by expert, every expert's run padded to whole blocks.

Kernels take blocks of one size (`BlockPlan`); the loops of the `lax` path take windows of a few sizes (`WindowPlan`), so
that a run is multiplied in one piece and hardly padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

WINDOW_STEP = 16  # rows
LONGEST_WINDOW = 512  # rows; products of more are no faster


class BlockPlan(NamedTuple):
    """Which row goes where. `A = N * K` assignments of N rows to K experts each; `Z` blocks at most, `count` in use."""

    source: Int[Array, "Z*block"]  # assignment that fills each place of the padded layout; A where none does
    place: Int[Array, "N K"]  # place of each assignment in the padded layout; Z*block for dead rows
    expert: Int[Array, " Z"]  # expert of each block
    count: Int[Array, ""]  # type: ignore[assignment]  # blocks in use; the rest is never touched


class WindowPlan(NamedTuple):
    """Which row goes where, for C sizes of windows: of size c these are number `first[c]` to `first[c + 1] - 1` of W."""

    source: Int[Array, " Z"]  # assignment that fills each place of the padded layout; A where none does
    place: Int[Array, "N K"]  # place of each assignment in the padded layout; Z for dead rows
    expert: Int[Array, " W"]  # expert of each window
    start: Int[Array, " W"]  # place of its first row
    first: Int[Array, " C+1"]


def choose_block(rows: int, chosen: int, experts: int) -> int:
    """Rows of a block: about the mean run of an expert, as a power of two from 1 to 64.

    One row decodes as matrix-vector products; from there on a block that is too small reads an expert twice and one
    that is too large multiplies padding.
    """
    block = 1
    while block < rows * chosen / experts and block < 64:
        block *= 2
    return block


def plan_each(chosen: Int[Array, "N K"], live: Bool[Array, " N"] | None, experts: int, block: int) -> BlockPlan:
    """A block for every assignment, its row first and no other in it: nothing to sort. For a handful of rows, few of
    which share an expert. The expert of a dead row is `experts`, which there is not."""
    total = chosen.size
    steps = jnp.arange(total * block, dtype=jnp.int32)
    return BlockPlan(
        source=jnp.where(steps % block == 0, steps // block, total),
        place=(jnp.arange(total, dtype=jnp.int32) * block).reshape(chosen.shape),
        expert=_of_live(chosen, live, experts).reshape(total).astype(jnp.int32),
        count=jnp.int32(total),
    )


def _of_live(chosen: Int[Array, "N K"], live: Bool[Array, " N"] | None, experts: int) -> Int[Array, "N K"]:
    return chosen if live is None else jnp.where(live[:, None], chosen, experts)


def choose_windows(rows: int, chosen: int, experts: int) -> tuple[int, ...]:
    """Rows of the windows, ascending: the multiples of a step up to twice the mean run of an expert, or 512.

    Steps are an eighth of the longest window and at least 16 rows: from there on, a CPU's product of a row has the same
    bits in a window of any size. For shorter runs there is one size, that of `choose_block`.
    """
    block = choose_block(rows, chosen, experts)
    if block < WINDOW_STEP:
        return (block,)
    longest = 2 * block
    while longest < 2 * rows * chosen / experts and longest < LONGEST_WINDOW:
        longest *= 2
    step = max(WINDOW_STEP, longest // 8)
    return tuple(range(step, longest + 1, step))


def window_places(assigned: int, experts: int, sizes: Sequence[int]) -> int:
    """Places of the padded layout for so many assignments: enough for any routing, so no row is ever dropped."""
    if len(sizes) == 1:
        return (assigned // sizes[0] + min(experts, assigned)) * sizes[0]
    return assigned + min(experts, assigned) * (sizes[0] - 1)


def plan_blocks(chosen: Int[Array, "N K"], live: Bool[Array, " N"] | None, experts: int, block: int) -> BlockPlan:
    """Sort assignments by expert and lay each run out in whole blocks; dead rows get no place.

    The number of blocks is bounded by `A // block + min(E, A)`, so shapes are static and no row is ever dropped.
    """
    places = window_places(chosen.size, experts, (block,))
    source, place, counts, _ = _lay_out(chosen, live, experts, places, lambda counts: -(-counts // block) * block)
    ends = jnp.cumsum(-(-counts // block))  # in blocks, inclusive
    # Not searchsorted, which is a loop: a GPU would wait for the host at each turn.
    expert = jnp.minimum(jnp.sum(ends <= jnp.arange(places // block)[:, None], axis=1), experts - 1)
    return BlockPlan(source, place, expert.astype(jnp.int32), ends[-1])


def plan_windows(chosen: Int[Array, "N K"], live: Bool[Array, " N"], experts: int, sizes: Sequence[int]) -> WindowPlan:
    """Sort assignments by expert and lay each run out in windows; dead rows get no place.

    A run is cut into windows of the largest size, and what is left becomes one of the smallest size that holds it.

    Args:
        sizes: one size, or the multiples of a step; see `choose_windows`.
    """
    if len(sizes) == 1:
        blocks = plan_blocks(chosen, live, experts, sizes[0])
        start = jnp.arange(blocks.expert.size, dtype=jnp.int32) * sizes[0]
        return WindowPlan(blocks.source, blocks.place, blocks.expert, start, jnp.stack([jnp.int32(0), blocks.count]))
    step, longest = sizes[0], sizes[-1]
    places = window_places(chosen.size, experts, sizes)
    source, place, counts, begin = _lay_out(chosen, live, experts, places, lambda counts: -(-counts // step) * step)
    full, left = counts // longest, -(-(counts % longest) // step)  # windows of the largest size; class of the rest
    ends = jnp.cumsum(full)
    number = jnp.arange(chosen.size // longest)
    owner = jnp.minimum(jnp.sum(ends <= number[:, None], axis=1), experts - 1)
    kind = jnp.concatenate([jnp.where(number < ends[-1], len(sizes), 0), left])  # 0: not in use
    expert = jnp.concatenate([owner, jnp.arange(experts)])
    start = jnp.concatenate([begin[owner] + (number - (ends - full)[owner]) * longest, begin + full * longest])
    order = jnp.argsort(kind, stable=True)
    first = jnp.sum(kind < jnp.arange(1, len(sizes) + 2)[:, None], axis=1)
    return WindowPlan(source, place, *(a.astype(jnp.int32) for a in (expert[order], start[order], first)))


def _lay_out(
    chosen: Array, live: Array | None, experts: int, places: int, padded: Callable[[Array], Array]
) -> tuple[Array, Array, Array, Array]:
    """Runs sorted by expert, each as long as `padded` makes it: source and place (as in the plans), rows of each expert
    and the place where its run begins."""
    total = chosen.size
    flat = _of_live(chosen, live, experts).reshape(total)
    order = jnp.argsort(flat, stable=True)
    by_expert = flat[order]
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode="drop")
    ends = jnp.cumsum(padded(counts))
    begin = jnp.concatenate([ends - padded(counts), jnp.array([places])])
    first_row = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts)])
    place = begin[by_expert] + jnp.arange(total) - first_row[by_expert]
    place = jnp.where(by_expert < experts, place, places)
    source = jnp.full(places, total, jnp.int32).at[place].set(order.astype(jnp.int32), mode="drop")
    place = jnp.zeros(total, jnp.int32).at[order].set(place.astype(jnp.int32)).reshape(chosen.shape)
    return source, place, counts, begin[:-1]
