"""Top-k and top-p as two Pallas kernels, through the Triton lowering: the least logit of a row that stays.

A search over a quarter of a million logits, digit by digit, reads them sixteen times, each time in a kernel or two of its
own. But what stays is nearly always among the largest few of every tile. So the first kernel lists these, and the second
searches the lists; only where a list might have ended too early does it read the row again. A row is searched by itself
and every sum is taken in a fixed order, so its result does not depend on the other rows, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float, Int

from kernels_pallas.tiles import next_power_of_2
from kernels_pallas.top_k_top_p.reference import mass, order, value

TILE = 4096  # logits of a program
RUN = 32  # logits that lie together in a tile: likely tokens are neighbours, and tiles should share them
LISTED = 32  # distinct logits of a tile in its list


def _tile(logits_ref: Any, row: Array, tile: Array, tiles: int) -> Float[Array, " TILE"]:
    """Logits of one tile: every `tiles`-th run of the row. Beyond the row: -inf."""
    at = jnp.arange(TILE)
    at = (lax.div(at, RUN) * tiles + tile) * RUN + lax.rem(at, RUN)
    return plt.load(logits_ref.at[row, at], mask=at < logits_ref.shape[1], other=-jnp.inf)


def _list_kernel(
    logits_ref: Any, first_ref: Any, heat_ref: Any, listed_ref: Any, count_ref: Any, mass_ref: Any, *, tiles: int
) -> None:
    """The largest distinct logits of one tile, falling, how often each occurs, and the tile's mass."""
    row, tile = pl.program_id(0), pl.program_id(1)
    logits = _tile(logits_ref, row, tile, tiles)
    plt.store(mass_ref.at[row, tile], jnp.sum(mass(logits, plt.load(first_ref.at[row]), plt.load(heat_ref.at[row]))))

    def turn(i: Array, last: Array) -> Array:
        largest = jnp.max(jnp.where(logits < last, logits, -jnp.inf))
        often = jnp.sum(jnp.where((logits == largest) & (logits > -jnp.inf), 1.0, 0.0))
        plt.store(listed_ref.at[row, tile * LISTED + i], largest)
        plt.store(count_ref.at[row, tile * LISTED + i], often)
        return largest

    lax.fori_loop(0, LISTED, turn, jnp.float32(jnp.inf))


def _highest(weigh: Callable[[Array], Array], wanted: Array) -> Array:
    """The highest number such that what lies at or above it weighs `wanted`; 0 where all weighs less."""

    def bit(i: Array, found: Array) -> Array:
        tried = found | jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        return jnp.where(weigh(tried) >= wanted, tried, found)

    return lax.fori_loop(0, 32, bit, jnp.uint32(0))


def _search(
    count: Callable[[Array], Array], weigh: Callable[[Array], Array], total: Array, k: Array, p: Array
) -> tuple[Array, Array]:
    """The least numbers that stay: of all conditions, and of the first that is asked for. `count` and `weigh` tell of the
    tokens at or above a number, `total` of all."""
    least = _highest(count, jnp.where(k > 0, k.astype(jnp.float32), jnp.inf))  # 0 where all stay
    total = jnp.where(k > 0, weigh(least), total)
    nucleus = _highest(lambda tried: weigh(jnp.maximum(tried, least)), p * total)
    both = jnp.where(p < 1, jnp.maximum(least, nucleus), least)
    return both, jnp.where(k > 0, least, both)


def _least_kernel(
    logits_ref: Any, first_ref: Any, heat_ref: Any, k_ref: Any, p_ref: Any, listed_ref: Any, count_ref: Any, mass_ref: Any,
    least_ref: Any, *, tiles: int,
) -> None:  # fmt: skip
    """One row, by the lists of its tiles; by all its logits if the least one may lie below the end of a list."""
    row = pl.program_id(0)
    first, heat = plt.load(first_ref.at[row]), plt.load(heat_ref.at[row])
    k, p = plt.load(k_ref.at[row]), plt.load(p_ref.at[row])
    places = tiles * LISTED
    at = jnp.arange(next_power_of_2(places))
    listed = plt.load(listed_ref.at[row, at], mask=at < places, other=-jnp.inf)
    often = plt.load(count_ref.at[row, at], mask=at < places, other=0)
    number, weight = order(listed), often * mass(listed, first, heat)
    tile = jnp.arange(next_power_of_2(tiles))
    ends = plt.load(listed_ref.at[row, tile * LISTED + LISTED - 1], mask=tile < tiles, other=-jnp.inf)
    total = jnp.sum(plt.load(mass_ref.at[row, tile], mask=tile < tiles, other=0))
    least, widest = _search(
        lambda tried: jnp.sum(jnp.where(number >= tried, often, 0)),
        lambda tried: jnp.sum(jnp.where(number >= tried, weight, 0)),
        total, k, p,
    )  # fmt: skip
    everything = (k == 0) & (p >= 1)
    plt.store(least_ref.at[row], value(least))

    @pl.when((widest < order(jnp.max(ends))) & ~everything)
    def search_all() -> None:
        def over_tiles(of: Callable[[Array], Array]) -> Callable[[Array], Array]:
            def weigh(tried: Array) -> Array:
                def add(i: Array, total: Array) -> Array:
                    logits = _tile(logits_ref, row, i, tiles)
                    return total + jnp.sum(jnp.where((order(logits) >= tried) & (logits > -jnp.inf), of(logits), 0))

                return lax.fori_loop(0, tiles, add, jnp.float32(0))

            return weigh

        weigh = over_tiles(lambda logits: mass(logits, first, heat))
        plt.store(least_ref.at[row], value(_search(over_tiles(jnp.ones_like), weigh, weigh(jnp.uint32(0)), k, p)[0]))


def top_k_top_p_threshold(
    logits: Float[Array, "N V"],
    first: Float[Array, " N"],
    heat: Float[Array, " N"],
    top_k: Int[Array, " N"],
    top_p: Float[Array, " N"],
    *,
    interpret: bool = False,
) -> Float[Array, " N"]:
    """The least logit of each row that stays: of the `top_k` largest (0: of all), renormalised, the fewest that have `top_p`
    of softmax(logits / heat) together (1: all). Of equal ones all stay or none. -inf where all stay.

    Args:
        logits: float32; -inf for tokens that there are not.
        first: the largest logit of the row.
        interpret: run as plain `jnp`, on any device.
    """
    rows, vocab = logits.shape
    tiles = -(-vocab // TILE)
    listed, count, mass = (
        jax.ShapeDtypeStruct((rows, size), jnp.float32) for size in (tiles * LISTED, tiles * LISTED, tiles)
    )
    lists = pl.pallas_call(
        partial(_list_kernel, tiles=tiles),
        grid=(rows, tiles),
        out_shape=(listed, count, mass),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="sampling_list",
    )(logits, first, heat)
    return pl.pallas_call(
        partial(_least_kernel, tiles=tiles),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows,), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="sampling_least",
    )(logits, first, heat, top_k.astype(jnp.int32), top_p, *lists)
