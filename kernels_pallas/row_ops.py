"""Operations on rows of logits that need another program on a CPU than on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.platform import platform


def argmax(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """Return the index of the largest value of the last axis, the first of equal ones.

    On a CPU the largest value comes first and then the first index that has it. XLA vectorises each of these
    reductions. It does not vectorise the reduction over pairs of value and index that `jnp.argmax` is.
    """
    if platform() != "cpu":
        return jnp.argmax(logits, axis=-1)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    last = logits.shape[-1] - 1
    return jnp.min(jnp.where(logits >= largest, jnp.arange(last + 1), last), axis=-1)


def map_rows(fn: Callable[[Any, Any], Any], rows: Any, sequences: Any) -> Any:
    """Apply `fn` to every row of every sequence, for R rows of each of B sequences.

    On a GPU this is one call with all B * R rows. On a CPU it is a loop over the R rows, with a call for row r of all
    sequences: arrays that `fn` makes for all rows at once would be written to memory first.

    Args:
        fn: takes arrays like `rows` and `sequences`, but with one leading axis N, and returns an array `[N, ...]`, or
            several in a pytree. Result n depends on entry n alone.
        rows: arrays `[B, R, ...]`.
        sequences: arrays `[B, ...]`, which all rows of a sequence share.

    Returns:
        the results `[B, R, ...]`.
    """
    if platform() == "cpu":
        by_row = jax.tree.map(lambda x: x.swapaxes(0, 1), rows)
        results = lax.map(lambda row: fn(row, sequences), by_row)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), results)
    batch, num_rows = jax.tree.leaves(rows)[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(batch * num_rows, *x.shape[2:]), rows)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, num_rows, axis=0), sequences)
    results = fn(flat, repeated)
    return jax.tree.map(lambda x: x.reshape(batch, num_rows, *x.shape[1:]), results)
