"""The rows of a prompt through Gated DeltaNet as three Pallas kernels, through the Triton lowering.

In plain JAX, 512 rows of a prompt are a hundred kernels a layer: a dozen for each chunk of the scan, which must wait
for each other, and twice as many for what the chunks need beforehand. Here one kernel computes q, k, v and the gates
(`triton_inputs.py`), and one the two matrices of every chunk that do not need the state. A third steps through the
chunks: a program for some columns of a head's state, since columns do not need each other. Everything is float32,
products to a few parts in 2^22. No sum is left to XLA, which would order it by the number of rows.
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
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from kernels_pallas.gated_delta_rule.inputs import DeltaProjections, DeltaWeights
from kernels_pallas.gated_delta_rule.state import DeltaState
from kernels_pallas.gated_delta_rule.triton_inputs import prompt_inputs, row_of_place
from kernels_pallas.tiles import index_grid

TILE = 32  # rows and channels of a product
STATE_COLUMNS = 16  # columns of the state that a program holds


def _dot(a: Array, b: Array, contract: tuple[int, int], use_highest: bool) -> Array:
    """Return a product in float32. On a GPU it is three products of TF32, whose error is a few parts in 2^22."""
    precision: Any = lax.Precision.HIGHEST if use_highest else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _tile_indices(size: int, tile: int) -> list[Int[Array, " tile"]]:
    """Return the indices below `size`, one array for each tile."""
    tile = min(tile, size)
    return [first + jnp.arange(tile) for first in range(0, size, tile)]


def _solve_tril(
    lower: Float[Array, "R R"], row: Int[Array, "R R"], col: Int[Array, "R R"], dot: Callable[..., Array]
) -> Float[Array, "R R"]:
    """Return `(I + lower)^-1` for a strictly lower triangular matrix, by blocks on the diagonal that double in size.

    Two blocks A and D and the block B below A form `[[A, 0], [B, D]]`, whose inverse is `[[A', 0], [-D' B A', D']]`.
    (The product of `I + (-lower)^(2^i)` takes as many products, but for nearly equal keys its powers grow beyond
    float32's digits.)
    """
    inverse, block = jnp.where(row == col, 1.0, 0.0), 1
    while block < lower.shape[0]:
        same_pair = lax.div(row, 2 * block) == lax.div(col, 2 * block)
        is_below = same_pair & (lax.div(row, block) != lax.div(col, block))
        below = jnp.where(is_below, lower, 0.0)
        inverse, block = inverse - (below if block == 1 else dot(dot(inverse, below), inverse)), 2 * block
    return inverse


def _matrices_kernel(
    q_ref: Any,
    k_ref: Any,
    beta_ref: Any,
    g_ref: Any,
    t_ref: Any,
    a_ref: Any,
    decay_ref: Any,
    *,
    chunk: int,
    use_highest: bool,
) -> None:
    """Compute the matrices T and A of one chunk of one value head by tiles: whole ones would not fit the registers.

    The log decay is summed within the chunk, always in the same order.
    """
    b, i, m = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    j = m // (g_ref.shape[2] // k_ref.shape[2])
    channel_tiles, row_tiles = _tile_indices(k_ref.shape[3], TILE), _tile_indices(chunk, TILE)
    dot = partial(_dot, contract=(1, 0), use_highest=use_highest)

    def load(ref: Any, rows: Array, channels: Array) -> Array:
        row, channel = index_grid(i * chunk + rows, channels)
        return plt.load(ref.at[b, row, j, channel])

    def dot_k(ref: Any, rows: Array, cols: Array) -> Array:
        """Return the product of rows of q or k with rows of k."""
        products = (_dot(load(ref, rows, c), load(k_ref, cols, c), (1, 1), use_highest) for c in channel_tiles)
        return reduce(add, products)

    beta = [plt.load(beta_ref.at[b, i * chunk + rows, m]) for rows in row_tiles]
    g = plt.load(g_ref.at[b, i * chunk + jnp.arange(chunk), m])

    def summed_decay(rows: Array) -> Array:
        row, col = index_grid(rows, jnp.arange(chunk))
        return jnp.sum(jnp.where(col <= row, g[None, :], 0.0), axis=1)

    decay = [summed_decay(rows) for rows in row_tiles]
    for rows, tile in zip(row_tiles, decay, strict=True):
        plt.store(decay_ref.at[b, i * chunk + rows, m], tile)
    inverse: dict[tuple[int, int], Array] = {}
    lower: dict[tuple[int, int], Array] = {}
    for r, rows in enumerate(row_tiles):
        for c, cols in enumerate(row_tiles):
            row, col = index_grid(rows, cols)
            if c > r:
                for ref in (t_ref, a_ref):
                    plt.store(ref.at[b, i, m, row, col], jnp.zeros(row.shape, jnp.float32))
                continue
            decay_ratios = jnp.exp(jnp.where(row >= col, decay[r][:, None] - decay[c][None, :], -jnp.inf))
            plt.store(a_ref.at[b, i, m, row, col], dot_k(q_ref, rows, cols) * decay_ratios)
            lower[r, c] = jnp.where(row > col, beta[r][:, None] * dot_k(k_ref, rows, cols) * decay_ratios, 0.0)
        inverse[r, r] = _solve_tril(lower[r, r], *index_grid(rows, rows), dot)
        for c in reversed(range(r)):
            below = reduce(add, (dot(lower[r, middle], inverse[middle, c]) for middle in range(c, r)))
            inverse[r, c] = -dot(inverse[r, r], below)
        for c, cols in enumerate(row_tiles[: r + 1]):
            plt.store(t_ref.at[(b, i, m, *index_grid(rows, cols))], inverse[r, c] * beta[c][None, :])


def _scan_kernel(
    layer_ref: Any,
    start_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    decay_ref: Any,
    t_ref: Any,
    a_ref: Any,
    state_ref: Any,
    o_ref: Any,
    new_state_ref: Any,
    *,
    chunk: int,
    columns: int,
    use_highest: bool,
) -> None:
    """Step through all chunks of one sequence, for `columns` columns of the state of one value head.

    Inputs are in the order of `row_of_place`, outputs in that of the rows.
    """
    heads, key_size = o_ref.shape[2], k_ref.shape[3]
    b, m = pl.program_id(0) // heads, pl.program_id(0) % heads
    j = m // (heads // k_ref.shape[2])
    column, channel_tiles = pl.program_id(1) * columns + jnp.arange(columns), _tile_indices(key_size, TILE)
    row, col = index_grid(jnp.arange(chunk), jnp.arange(chunk))
    dot = partial(_dot, contract=(1, 0), use_highest=use_highest)

    def step(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        t = i * chunk + jnp.arange(chunk)
        v_row, v_column = index_grid(t, column)
        decay, last = plt.load(decay_ref.at[b, t, m]), plt.load(decay_ref.at[b, i * chunk + chunk - 1, m])
        exp_decay = jnp.exp(decay)[:, None]

        def load(ref: Any, channels: Array) -> Array:
            row, channel = index_grid(t, channels)
            return plt.load(ref.at[b, row, j, channel])

        def dot_state(ref: Any) -> Array:
            """Return the product of the chunk's rows of q or k with the state."""
            tiles = zip(channel_tiles, state, strict=True)
            return reduce(add, (dot(load(ref, channels), tile) for channels, tile in tiles))

        v = plt.load(v_ref.at[b, v_row, m, v_column]).astype(jnp.float32)
        delta = v - exp_decay * dot_state(k_ref)
        delta = dot(plt.load(t_ref.at[b, i, m, row, col]), delta)
        o = exp_decay * dot_state(q_ref) + dot(plt.load(a_ref.at[b, i, m, row, col]), delta)
        row_of_o, _ = index_grid(row_of_place(t, start_ref[b], chunk, o_ref.shape[1]), column)
        plt.store(o_ref.at[b, row_of_o, m, v_column], o.astype(o_ref.dtype))
        decay_after = jnp.exp(last - decay)[:, None]  # of a row, up to the end of the chunk
        return tuple(
            jnp.exp(last) * tile + _dot(load(k_ref, channels) * decay_after, delta, (0, 0), use_highest)
            for channels, tile in zip(channel_tiles, state, strict=True)
        )

    tile_indices = [index_grid(channels, column) for channels in channel_tiles]
    state = tuple(plt.load(state_ref.at[(layer_ref[0], b, m, *indices)]) for indices in tile_indices)
    state = lax.fori_loop(jnp.int32(0), jnp.int32(o_ref.shape[1] // chunk), step, state)
    for indices, tile in zip(tile_indices, state, strict=True):
        plt.store(new_state_ref.at[(layer_ref[0], b, m, *indices)], tile)


def supports(chunk: int, key_size: int, value_size: int) -> bool:
    """Return whether the kernels support chunks of `chunk` rows and heads of these sizes."""
    return all(size >= 16 and size & (size - 1) == 0 for size in (chunk, key_size, value_size))


def chunk_gated_delta_rule(
    q: Float[Array, "B T J Dk"],
    k: Float[Array, "B T J Dk"],
    v: Float[Array, "B T M Dv"],
    beta: Float[Array, "B T M"],
    g: Float[Array, "B T M"],
    state: Float[Array, "L B M Dk Dv"],
    layer: Int[Array, ""] | int,
    start: Int[Array, " B"],
    *,
    chunk: int,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "B T M Dv"], Float[Array, "L B M Dk Dv"]]:
    """Return the outputs of all rows, in `dtype`, and the states, of which that of layer `layer` has all rows.

    The formula is the chunked form in `reference.py`, with the products in another order:
    `Delta = T (V - diag(exp(G)) K S)`.

    Args:
        q, k: float32, normalised; q is also scaled.
        g: log decay of each row.
        state: given up (donated).
        start: first valid row of each sequence. The inputs are in the order of `row_of_place`, the outputs are not.
        chunk: rows of a chunk. T is a multiple of it. Like Dk and Dv it is a power of two from 16 on.
        interpret: run the kernels in interpret mode, on any device.

    Raises:
        ValueError: the kernels do not support the chunk, Dk or Dv.
    """
    (batch, rows, heads, value_size), key_size = v.shape, k.shape[3]
    _check(chunk, key_size, value_size)
    columns = min(STATE_COLUMNS, value_size)
    square = jax.ShapeDtypeStruct((batch, rows // chunk, heads, chunk, chunk), jnp.float32)
    t_matrix, a_matrix, decay = pl.pallas_call(
        partial(_matrices_kernel, chunk=chunk, use_highest=interpret),
        grid=square.shape[:3],
        out_shape=(square, square, jax.ShapeDtypeStruct(g.shape, jnp.float32)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="gated_delta_rule_chunk_matrices",
    )(q, k, beta, g)
    return pl.pallas_call(
        partial(_scan_kernel, chunk=chunk, columns=columns, use_highest=interpret),
        grid=(batch * heads, value_size // columns),
        out_shape=(jax.ShapeDtypeStruct(v.shape, dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)),
        input_output_aliases={8: 1},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="gated_delta_rule_chunk_scan",
    )(jnp.asarray(layer, jnp.int32).reshape(1), start, q, k, v, decay, t_matrix, a_matrix, state)


def _check(chunk: int, key_size: int, value_size: int) -> None:
    if not supports(chunk, key_size, value_size):
        expected = "expected sizes that are powers of two from 16 on"
        raise ValueError(f"chunks of {chunk} rows of heads of {key_size} x {value_size}; {expected}")


def gated_delta_rule(
    projections: DeltaProjections,
    weights: DeltaWeights,
    state: DeltaState,
    layer: Int[Array, ""] | int,
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    chunk: int,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "B T M Dv"], DeltaState]:
    """Run the rows of a prompt from the projections on; see `kernels_pallas.gated_delta_rule.chunk_gated_delta_rule`.

    Args:
        state: the memory of a stack of layers; the recurrent states are given up (donated).
        start, end: the range of valid rows of each sequence; the other rows change nothing.
        chunk, interpret: as in `chunk_gated_delta_rule`.

    Raises:
        ValueError: the kernels do not support the chunk, Dk or Dv.
    """
    _, batch, heads, key_size, value_size = state.recurrent.shape
    _check(chunk, key_size, value_size)
    rows = projections.qkv.parts.shape[1] // batch
    inputs, conv = prompt_inputs(
        projections,
        weights,
        state.conv,
        layer,
        start,
        end,
        rows=rows + -rows % chunk,
        chunk=chunk,
        sizes=(heads, key_size, value_size),
        dtype=dtype,
        interpret=interpret,
    )
    o, recurrent = chunk_gated_delta_rule(
        *inputs, state.recurrent, layer, start, chunk=chunk, dtype=dtype, interpret=interpret
    )
    return o[:, :rows], DeltaState(state.conv.at[layer].set(conv), recurrent)
