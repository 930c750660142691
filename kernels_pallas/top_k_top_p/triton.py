"""Top-k and top-p as two Pallas kernels, through the Triton lowering.

A search over a quarter of a million logits, digit by digit, reads them sixteen times, each time in one or two kernels
of its own. But the kept tokens are nearly always among the largest few of every tile of logits. So the first kernel
lists the largest logits of each tile, and the second kernel searches the lists. It reads the row itself only if a list
may have ended too early. Each row is searched by itself and every sum has a fixed order, so the result of a row does
not depend on the other rows, bit for bit.
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
from kernels_pallas.top_k_top_p.reference import from_sortable_uint, relative_prob, to_sortable_uint

TILE_SIZE = 4096  # logits of a program
RUN_LENGTH = 32  # neighbouring logits of a tile: likely tokens have neighbouring ids, and tiles should share them
TOP_PER_TILE = 32  # distinct logits of a tile in its list

WeightAbove = Callable[[Array], Array]  # total weight of the tokens whose sortable number is at least the argument


def supports(logits: Array | jax.ShapeDtypeStruct) -> bool:
    """Return whether the kernels can read these logits."""
    return logits.dtype == jnp.float32


def _load_tile(logits_ref: Any, row: Array, tile: Array, num_tiles: int) -> Float[Array, " TILE_SIZE"]:
    """Load the logits of one tile: every `num_tiles`-th run of the row. Ids beyond the row have -inf."""
    index = jnp.arange(TILE_SIZE)
    ids = (lax.div(index, RUN_LENGTH) * num_tiles + tile) * RUN_LENGTH + lax.rem(index, RUN_LENGTH)
    return plt.load(logits_ref.at[row, ids], mask=ids < logits_ref.shape[1], other=-jnp.inf)


def _list_kernel(
    logits_ref: Any,
    max_logit_ref: Any,
    temperature_ref: Any,
    top_ref: Any,
    multiplicity_ref: Any,
    tile_prob_ref: Any,
    *,
    num_tiles: int,
) -> None:
    """List the largest distinct logits of one tile, descending, and how often each occurs; sum its probabilities."""
    row, tile = pl.program_id(0), pl.program_id(1)
    logits = _load_tile(logits_ref, row, tile, num_tiles)
    probs = relative_prob(logits, plt.load(max_logit_ref.at[row]), plt.load(temperature_ref.at[row]))
    plt.store(tile_prob_ref.at[row, tile], jnp.sum(probs))

    def list_next(i: Array, previous: Array) -> Array:
        largest = jnp.max(jnp.where(logits < previous, logits, -jnp.inf))
        multiplicity = jnp.sum(jnp.where((logits == largest) & (logits > -jnp.inf), 1.0, 0.0))
        plt.store(top_ref.at[row, tile * TOP_PER_TILE + i], largest)
        plt.store(multiplicity_ref.at[row, tile * TOP_PER_TILE + i], multiplicity)
        return largest

    lax.fori_loop(0, TOP_PER_TILE, list_next, jnp.float32(jnp.inf))


def _highest_threshold(weight_above: WeightAbove, target: Array) -> Array:
    """Search, bit by bit, the highest number at or above which the tokens weigh `target`; 0 if all weigh less."""

    def set_bit(i: Array, threshold: Array) -> Array:
        candidate = threshold | jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        return jnp.where(weight_above(candidate) >= target, candidate, threshold)

    return lax.fori_loop(0, 32, set_bit, jnp.uint32(0))


def _search(
    count_above: WeightAbove, prob_above: WeightAbove, total_prob: Array, top_k: Array, top_p: Array
) -> tuple[Array, Array]:
    """Search the threshold of both conditions, and the lowest number that the search depends on.

    Both are sortable numbers. The second is the threshold of top-k if there is one, because probabilities are added up
    from there; otherwise it is the threshold of top-p.

    Args:
        total_prob: of all tokens of the row.
    """
    top_k_min = _highest_threshold(count_above, jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf))  # 0: keep all
    total_prob = jnp.where(top_k > 0, prob_above(top_k_min), total_prob)
    top_p_min = _highest_threshold(lambda candidate: prob_above(jnp.maximum(candidate, top_k_min)), top_p * total_prob)
    threshold = jnp.where(top_p < 1, jnp.maximum(top_k_min, top_p_min), top_k_min)
    return threshold, jnp.where(top_k > 0, top_k_min, threshold)


def _threshold_kernel(
    logits_ref: Any,
    max_logit_ref: Any,
    temperature_ref: Any,
    top_k_ref: Any,
    top_p_ref: Any,
    top_ref: Any,
    multiplicity_ref: Any,
    tile_prob_ref: Any,
    threshold_ref: Any,
    *,
    num_tiles: int,
) -> None:
    """Search the threshold of one row in its lists, or in all logits if it may lie below the end of a list."""
    row = pl.program_id(0)
    max_logit, temperature = plt.load(max_logit_ref.at[row]), plt.load(temperature_ref.at[row])
    top_k, top_p = plt.load(top_k_ref.at[row]), plt.load(top_p_ref.at[row])
    num_listed = num_tiles * TOP_PER_TILE
    index = jnp.arange(next_power_of_2(num_listed))
    listed = plt.load(top_ref.at[row, index], mask=index < num_listed, other=-jnp.inf)
    multiplicity = plt.load(multiplicity_ref.at[row, index], mask=index < num_listed, other=0)
    sortable, probs = to_sortable_uint(listed), multiplicity * relative_prob(listed, max_logit, temperature)
    tile = jnp.arange(next_power_of_2(num_tiles))
    last_in_list = tile * TOP_PER_TILE + TOP_PER_TILE - 1
    list_ends = plt.load(top_ref.at[row, last_in_list], mask=tile < num_tiles, other=-jnp.inf)
    total_prob = jnp.sum(plt.load(tile_prob_ref.at[row, tile], mask=tile < num_tiles, other=0))
    threshold, lowest_needed = _search(
        lambda candidate: jnp.sum(jnp.where(sortable >= candidate, multiplicity, 0)),
        lambda candidate: jnp.sum(jnp.where(sortable >= candidate, probs, 0)),
        total_prob,
        top_k,
        top_p,
    )
    keep_all = (top_k == 0) & (top_p >= 1)
    plt.store(threshold_ref.at[row], from_sortable_uint(threshold))

    @pl.when((lowest_needed < to_sortable_uint(jnp.max(list_ends))) & ~keep_all)
    def search_all_logits() -> None:
        def weight_above(weigh: Callable[[Array], Array]) -> WeightAbove:
            def total(candidate: Array) -> Array:
                def add_tile(i: Array, total: Array) -> Array:
                    logits = _load_tile(logits_ref, row, i, num_tiles)
                    above = (to_sortable_uint(logits) >= candidate) & (logits > -jnp.inf)
                    return total + jnp.sum(jnp.where(above, weigh(logits), 0))

                return lax.fori_loop(0, num_tiles, add_tile, jnp.float32(0))

            return total

        prob_above = weight_above(lambda logits: relative_prob(logits, max_logit, temperature))
        everything = prob_above(jnp.uint32(0))
        threshold, _ = _search(weight_above(jnp.ones_like), prob_above, everything, top_k, top_p)
        plt.store(threshold_ref.at[row], from_sortable_uint(threshold))


def top_k_top_p_threshold(
    logits: Float[Array, "N V"],
    max_logit: Float[Array, " N"],
    temperature: Float[Array, " N"],
    top_k: Int[Array, " N"],
    top_p: Float[Array, " N"],
    *,
    interpret: bool = False,
) -> Float[Array, " N"]:
    """Run the kernels of `kernels_pallas.top_k_top_p.top_k_top_p_threshold`, whose arguments these are.

    Args:
        interpret: run the kernels in interpret mode, on any device.

    Returns:
        thresholds, float32; -inf where all tokens are kept.
    """
    rows, vocab = logits.shape
    num_tiles = -(-vocab // TILE_SIZE)
    top, multiplicity, tile_prob = (
        jax.ShapeDtypeStruct((rows, size), jnp.float32)
        for size in (num_tiles * TOP_PER_TILE, num_tiles * TOP_PER_TILE, num_tiles)
    )
    lists = pl.pallas_call(
        partial(_list_kernel, num_tiles=num_tiles),
        grid=(rows, num_tiles),
        out_shape=(top, multiplicity, tile_prob),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="sampling_list",
    )(logits, max_logit, temperature)
    return pl.pallas_call(
        partial(_threshold_kernel, num_tiles=num_tiles),
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows,), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="sampling_least",
    )(logits, max_logit, temperature, top_k.astype(jnp.int32), top_p, *lists)
