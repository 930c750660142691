"""The map from blocks of rows to experts: rows sorted by expert, every expert's run padded to whole blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int


class BlockPlan(NamedTuple):
    """Which row goes where. `A = N * K` assignments of N rows to K experts each; `Z` blocks at most, `count` in use."""

    source: Int[Array, "Z*block"]  # assignment that fills each place of the padded layout; A where none does
    place: Int[Array, "N K"]  # place of each assignment in the padded layout; Z*block for dead rows
    expert: Int[Array, " Z"]  # expert of each block
    count: Int[Array, ""]  # type: ignore[assignment]  # blocks in use; the rest is never touched


def choose_block(rows: int, chosen: int, experts: int) -> int:
    """Rows of a block: about the mean run of an expert, as a power of two from 1 to 64.

    One row decodes as matrix-vector products; from there on a block that is too small reads an expert twice and one
    that is too large multiplies padding.
    """
    block = 1
    while block < rows * chosen / experts and block < 64:
        block *= 2
    return block


def plan_each(chosen: Int[Array, "N K"], live: Bool[Array, " N"], experts: int, block: int) -> BlockPlan:
    """A block for every assignment, its row first and no other in it: nothing to sort. For a handful of rows, few of
    which share an expert. The expert of a dead row is `experts`, which there is not."""
    total = chosen.size
    steps = jnp.arange(total * block, dtype=jnp.int32)
    return BlockPlan(
        source=jnp.where(steps % block == 0, steps // block, total),
        place=(jnp.arange(total, dtype=jnp.int32) * block).reshape(chosen.shape),
        expert=jnp.where(live[:, None], chosen, experts).reshape(total).astype(jnp.int32),
        count=jnp.int32(total),
    )


def plan_blocks(chosen: Int[Array, "N K"], live: Bool[Array, " N"], experts: int, block: int) -> BlockPlan:
    """Sort assignments by expert and lay each run out in whole blocks; dead rows get no place.

    The number of blocks is bounded by `A // block + min(E, A)`, so shapes are static and no row is ever dropped.
    """
    rows, k = chosen.shape
    total = rows * k
    blocks = total // block + min(experts, total)
    flat = jnp.where(live[:, None], chosen, experts).reshape(total)
    order = jnp.argsort(flat, stable=True)
    by_expert = flat[order]
    counts = jnp.zeros(experts, jnp.int32).at[flat].add(1, mode="drop")
    ends = jnp.cumsum((counts + block - 1) // block)  # in blocks, inclusive
    first_place = jnp.concatenate([(ends - (counts + block - 1) // block) * block, jnp.array([blocks * block])])
    first_row = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts)])
    place = first_place[by_expert] + jnp.arange(total) - first_row[by_expert]
    place = jnp.where(by_expert < experts, place, blocks * block)
    return BlockPlan(
        source=jnp.full(blocks * block, total, jnp.int32).at[place].set(order.astype(jnp.int32), mode="drop"),
        place=jnp.zeros(total, jnp.int32).at[order].set(place.astype(jnp.int32)).reshape(rows, k),
        # Not searchsorted, which is a loop: a GPU would wait for the host at each turn.
        expert=jnp.minimum(jnp.sum(ends <= jnp.arange(blocks)[:, None], axis=1), experts - 1).astype(jnp.int32),
        count=ends[-1],
    )
