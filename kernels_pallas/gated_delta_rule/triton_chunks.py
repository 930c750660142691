"""Many rows through the recurrence of Gated DeltaNet as two Pallas kernels, through the Triton lowering.

In plain `lax` the rows of a prompt are ninety kernels a layer for every 512 of them: a dozen for each chunk of the scan, which
must wait for each other, and as many for what the chunks need beforehand. Here one kernel makes the two matrices of every
chunk that do not need the state, and one steps through the chunks, a program for some columns of a head's state: columns
do not need each other. All is float32, products to a few parts in 2^22.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float

from kernels_pallas.tiles import index_grid

PIECE = 32  # rows and channels of a product
COLUMNS = 16  # of the state that a program holds


def _dot(a: Array, b: Array, contract: tuple[int, int], plain: bool) -> Array:
    """A product in float32: on a GPU by three products of TF32, whose error is a few parts in 2^22."""
    precision: Any = lax.Precision.HIGHEST if plain else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _pieces(size: int, piece: int) -> list[Array]:
    """Indices below `size`, a piece at a time."""
    piece = min(piece, size)
    return [first + jnp.arange(piece) for first in range(0, size, piece)]


def _inverse(lower: Float[Array, "P P"], row: Array, col: Array, dot: Callable[..., Array]) -> Float[Array, "P P"]:
    """`(I + lower)^-1` for a strictly lower triangular matrix, block by block from the diagonal on, each twice the last.

    Of two blocks and what is below the first, `[[A, 0], [B, D]]`, it is `[[A', 0], [-D' B A', D']]`. (The product of
    `I + (-lower)^(2^i)` takes as many products, but of nearly equal keys its powers grow beyond float32's digits.)
    """
    inverse, block = jnp.where(row == col, 1.0, 0.0), 1
    while block < lower.shape[0]:
        below = (lax.div(row, 2 * block) == lax.div(col, 2 * block)) & (lax.div(row, block) != lax.div(col, block))
        below = jnp.where(below, lower, 0.0)
        inverse, block = inverse - (below if block == 1 else dot(dot(inverse, below), inverse)), 2 * block
    return inverse


def _matrices_kernel(
    q_ref: Any, k_ref: Any, beta_ref: Any, decay_ref: Any, solve_ref: Any, mix_ref: Any, *, chunk: int, plain: bool
) -> None:
    """The two matrices of one chunk of one value head, piece by piece: whole ones would not fit the registers."""
    b, i, m = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    j = m // (decay_ref.shape[2] // k_ref.shape[2])
    channels, pieces = _pieces(k_ref.shape[3], PIECE), _pieces(chunk, PIECE)
    dot = partial(_dot, contract=(1, 0), plain=plain)

    def load(ref: Any, rows: Array, channel: Array) -> Array:
        tt, cc = index_grid(i * chunk + rows, channel)
        return plt.load(ref.at[b, tt, j, cc])

    def product(ref: Any, rows: Array, cols: Array) -> Array:
        """Of rows of q or k with rows of k."""
        return reduce(add, (_dot(load(ref, rows, c), load(k_ref, cols, c), (1, 1), plain) for c in channels))

    beta = [plt.load(beta_ref.at[b, i * chunk + rows, m]) for rows in pieces]
    decay = [plt.load(decay_ref.at[b, i * chunk + rows, m]) for rows in pieces]
    inverse: dict[tuple[int, int], Array] = {}
    lower: dict[tuple[int, int], Array] = {}
    for r, rows in enumerate(pieces):
        for c, cols in enumerate(pieces):
            row, col = index_grid(rows, cols)
            if c > r:
                for ref in (solve_ref, mix_ref):
                    plt.store(ref.at[b, i, m, row, col], jnp.zeros(row.shape, jnp.float32))
                continue
            ratios = jnp.exp(jnp.where(row >= col, decay[r][:, None] - decay[c][None, :], -jnp.inf))
            plt.store(mix_ref.at[b, i, m, row, col], product(q_ref, rows, cols) * ratios)
            lower[r, c] = jnp.where(row > col, beta[r][:, None] * product(k_ref, rows, cols) * ratios, 0.0)
        inverse[r, r] = _inverse(lower[r, r], *index_grid(rows, rows), dot)
        for c in reversed(range(r)):
            below = reduce(add, (dot(lower[r, middle], inverse[middle, c]) for middle in range(c, r)))
            inverse[r, c] = -dot(inverse[r, r], below)
        for c, cols in enumerate(pieces[: r + 1]):
            plt.store(solve_ref.at[(b, i, m, *index_grid(rows, cols))], inverse[r, c] * beta[c][None, :])


def _scan_kernel(
    layer_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, decay_ref: Any, solve_ref: Any, mix_ref: Any, state_ref: Any,
    o_ref: Any, after_ref: Any, *, chunk: int, columns: int, plain: bool,
) -> None:  # fmt: skip
    """All chunks of one sequence, for some columns of the state of one value head."""
    heads, size = o_ref.shape[2], k_ref.shape[3]
    b, m = pl.program_id(0) // heads, pl.program_id(0) % heads
    j = m // (heads // k_ref.shape[2])
    column, channels = pl.program_id(1) * columns + jnp.arange(columns), _pieces(size, PIECE)
    row, col = index_grid(jnp.arange(chunk), jnp.arange(chunk))
    dot = partial(_dot, contract=(1, 0), plain=plain)

    def turn(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        t = i * chunk + jnp.arange(chunk)
        tv, vs = index_grid(t, column)
        decay, last = plt.load(decay_ref.at[b, t, m]), plt.load(decay_ref.at[b, i * chunk + chunk - 1, m])
        kept = jnp.exp(decay)[:, None]

        def load(ref: Any, channel: Array) -> Array:
            tt, cc = index_grid(t, channel)
            return plt.load(ref.at[b, tt, j, cc])

        def by_state(ref: Any) -> Array:
            return reduce(add, (dot(load(ref, channel), part) for channel, part in zip(channels, state, strict=True)))

        d = plt.load(v_ref.at[b, tv, m, vs]) - kept * by_state(k_ref)
        d = dot(plt.load(solve_ref.at[b, i, m, row, col]), d)
        o = kept * by_state(q_ref) + dot(plt.load(mix_ref.at[b, i, m, row, col]), d)
        plt.store(o_ref.at[b, tv, m, vs], o.astype(o_ref.dtype))
        left = jnp.exp(last - decay)[:, None]
        return tuple(
            jnp.exp(last) * part + _dot(load(k_ref, channel) * left, d, (0, 0), plain)
            for channel, part in zip(channels, state, strict=True)
        )

    places = [index_grid(channel, column) for channel in channels]
    state = tuple(plt.load(state_ref.at[(layer_ref[0], b, m, *place)]) for place in places)
    state = lax.fori_loop(jnp.int32(0), jnp.int32(o_ref.shape[1] // chunk), turn, state)
    for place, part in zip(places, state, strict=True):
        plt.store(after_ref.at[(b, m, *place)], part)


def takes(chunk: int, key_size: int, value_size: int) -> bool:
    """Whether the kernels take chunks of so many rows and heads of these sizes."""
    return all(size >= 16 and size & (size - 1) == 0 for size in (chunk, key_size, value_size))


def delta_chunks(
    q: Float[Array, "B T J K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T M V"],
    beta: Float[Array, "B T M"],
    decay: Float[Array, "B T M"],
    state: Float[Array, "L B M K V"],
    layer: Array | int,
    *,
    chunk: int,
    dtype: Any,
    interpret: bool = False,
) -> tuple[Float[Array, "B T M V"], Float[Array, "B M K V"]]:
    """Outputs of all rows, in `dtype`, and the state after them, of layer `layer` of the stack.

    Per value head m with its key head j, of each chunk of rows, with `G` its decay:
    `d = solve (v - exp(G) k S);  o = exp(G) q S + mix d;  S <- exp(G_last) S + (exp(G_last - G) k)^T d`, where
    `mix_cd = exp(G_c - G_d) q_c . k_d` for `d <= c` and `solve = (I + n)^-1 beta`, `n_cd = beta_c exp(G_c - G_d) k_c . k_d` for
    `d < c`.

    Args:
        q, k: float32, normalised, q scaled, too.
        decay: log decay, summed within each chunk.
        chunk: rows of a chunk, of which T is a multiple; like K and V a power of two from 16 on.
        interpret: run as plain `jnp`, on any device.
    """
    (batch, rows, heads, width), size = v.shape, k.shape[3]
    columns = min(COLUMNS, width)
    square = jax.ShapeDtypeStruct((batch, rows // chunk, heads, chunk, chunk), jnp.float32)
    solve, mix = pl.pallas_call(
        partial(_matrices_kernel, chunk=chunk, plain=interpret),
        grid=square.shape[:3],
        out_shape=(square, square),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="delta_matrices",
    )(q, k, beta, decay)
    return pl.pallas_call(
        partial(_scan_kernel, chunk=chunk, columns=columns, plain=interpret),
        grid=(batch * heads, width // columns),
        out_shape=(
            jax.ShapeDtypeStruct(v.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, size, width), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="delta_scan",
    )(jnp.asarray(layer, jnp.int32).reshape(1), q, k, v, decay, solve, mix, state)
