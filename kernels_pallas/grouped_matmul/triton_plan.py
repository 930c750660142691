"""The plan of the experts' kernels, as a Pallas kernel through the Triton lowering: `align_blocks` in one launch.

XLA makes a dozen kernels of a sort, and each takes longer to start than to run. Here every expert has a program, which
reads all assignments, counts those of lower experts and its own, and writes its own places. No program waits for
another, so there are no atomics, and the layout is a function of the assignments alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Int

from kernels_pallas.grouped_matmul.plan import Blocks, first_block_of, num_block_slots
from kernels_pallas.tiles import next_power_of_2

CHUNK = 1024  # assignments read at a time
SLOTS = 32  # blocks named at a time


def _kernel(
    topk_ids_ref: Any, sorted_token_ids_ref: Any, expert_ids_ref: Any, *, num_experts: int, block_size: int
) -> None:
    """Lay out the assignments of one expert."""
    expert, total, slots = pl.program_id(0), topk_ids_ref.shape[0], expert_ids_ref.shape[0]
    chunk = min(CHUNK, next_power_of_2(total))
    num_chunks = -(-total // chunk)

    def read(i: Array | int) -> tuple[Array, Array]:
        assignments = i * chunk + jnp.arange(chunk)
        inside = assignments < total
        return assignments, plt.load(topk_ids_ref.at[assignments], mask=inside, other=num_experts)

    def for_each_chunk(body: Any, carry: Any) -> Any:
        return body(0, carry) if num_chunks == 1 else lax.fori_loop(0, num_chunks, body, carry)

    def count(i: Array | int, counts: tuple[Array, Array]) -> tuple[Array, Array]:
        _, ids = read(i)
        lower, mine = (mask.astype(jnp.int32) for mask in (ids < expert, ids == expert))
        return counts[0] + jnp.sum(lower), counts[1] + jnp.sum(mine)

    lower, mine = for_each_chunk(count, (jnp.int32(0), jnp.int32(0)))
    first_block = first_block_of(expert, lower, total, num_experts, block_size)
    next_block = first_block_of(expert + 1, lower + mine, total, num_experts, block_size)
    next_block = jnp.where(expert == num_experts - 1, slots, next_block)
    in_use = lax.div(mine + block_size - 1, block_size)

    def place(i: Array | int, seen: Array) -> Array:
        assignments, ids = read(i)
        is_mine = (ids == expert).astype(jnp.int32)
        places = first_block * block_size + seen + jnp.cumsum(is_mine) - 1
        # The assignments of others: beyond the end, since interpret mode writes old values where a mask is false.
        places = jnp.where(is_mine > 0, places, sorted_token_ids_ref.shape[0])
        plt.store(sorted_token_ids_ref.at[places], assignments, mask=is_mine > 0)
        return seen + jnp.sum(is_mine)

    for_each_chunk(place, jnp.int32(0))
    padding = mine + jnp.arange(block_size)
    plt.store(
        sorted_token_ids_ref.at[first_block * block_size + padding],
        jnp.full(block_size, total, jnp.int32),
        mask=padding < in_use * block_size,
    )

    def name_blocks(i: Array, carry: None) -> None:
        block = first_block + i * SLOTS + jnp.arange(SLOTS)
        owner = jnp.where(block < first_block + in_use, expert, num_experts)
        plt.store(expert_ids_ref.at[block], owner, mask=block < next_block)

    lax.fori_loop(0, lax.div(next_block - first_block + SLOTS - 1, SLOTS), name_blocks, None)


def align_blocks(
    topk_ids: Int[Array, "rows topk"], num_experts: int, block_size: int, *, interpret: bool = False
) -> Blocks:
    """See `plan.align_blocks`. Places of blocks that are not in use are undefined.

    Args:
        interpret: run as plain `jnp`, on any device.
    """
    slots = num_block_slots(topk_ids.size, num_experts, block_size)
    sorted_token_ids, expert_ids = pl.pallas_call(
        partial(_kernel, num_experts=num_experts, block_size=block_size),
        grid=(num_experts,),
        out_shape=(
            jax.ShapeDtypeStruct((slots * block_size,), jnp.int32),
            jax.ShapeDtypeStruct((slots,), jnp.int32),
        ),
        compiler_params=plt.CompilerParams(num_warps=4 if topk_ids.size > 256 else 1, num_stages=1),
        interpret=interpret,
        name="choose_blocks",
    )(topk_ids.reshape(-1).astype(jnp.int32))
    return Blocks(sorted_token_ids, expert_ids)
