"""The recurrence of Gated DeltaNet (arXiv:2412.06464) in plain JAX ("xla"), in the chunked form of arXiv:2406.06484.

Each value head has a state S `[Dk, Dv]`. A row with decay g <= 0 and step size beta does

    S <- exp(g) S;  delta = beta (v - S^T k);  S <- S + k delta^T;  o = S^T q

The chunked form computes C rows at once with matrix products. With `G_c` the sum of g up to row c of the chunk, S the
state before the chunk, and rows stacked in matrices Q, K, V and Delta,

    N_cd     = beta_c exp(G_c - G_d) k_c . k_d                 for d < c, else 0
    T        = (I + N)^-1 diag(beta)                           the WY representation
    Delta    = T V - T diag(exp(G)) K S
    O        = diag(exp(G)) Q S + A Delta                      A_cd = exp(G_c - G_d) q_c . k_d  for d <= c, else 0
    S       <- exp(G_C) S + (diag(exp(G_C - G)) K)^T Delta
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.gated_delta_rule.inputs import DeltaInputs

CHUNK = 64  # token rows of a chunk
# The recurrence is float32 on every device. The kernels' products are exact to a few parts in 2^22.
PRECISION = lax.Precision.HIGHEST


class DeltaOutputs(NamedTuple):
    """What the recurrence computes for the rows of a call, float32."""

    o: Float[Array, "B T M Dv"]
    delta: Float[Array, "B T M Dv"]  # updates of the state
    decay: Float[Array, "B T M"]  # log decay, summed within each chunk
    state: Float[Array, "B M Dk Dv"]  # after all rows


def _einsum(spec: str, *args: Array) -> Array:
    return jnp.einsum(spec, *args, precision=PRECISION)


def solve_tril(n: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Return `(I + n)^-1` for strictly lower triangular n.

    n is nilpotent, so the inverse is the product of `I + (-n)^(2^i)`. Large blocks are first split in two,
    `[[A, 0], [B, D]]^-1 = [[A', 0], [-D' B A', D']]`, which needs far fewer operations. It is also more exact: where
    keys are nearly equal (one token again and again), the powers of larger blocks would grow beyond float32's digits.
    Unsplit blocks of 16 rows have an error of 1e-4.
    """
    size = n.shape[-1]
    if n.ndim > 3:  # XLA's CPU backend aborts on the gradient of products with eight axes
        return solve_tril(n.reshape(-1, size, size)).reshape(n.shape)
    if size > 8 and size % 2 == 0:
        half = size // 2
        diagonal = solve_tril(jnp.stack([n[..., :half, :half], n[..., half:, half:]]))
        lower_left = -_einsum("...ij,...jk,...kl->...il", diagonal[1], n[..., half:, :half], diagonal[0])
        top = jnp.concatenate([diagonal[0], jnp.zeros_like(lower_left)], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([lower_left, diagonal[1]], axis=-1)], axis=-2)
    power, inverse, num_terms = -n, jnp.eye(size) - n, 2
    while num_terms < size:
        power = _einsum("...ij,...jk->...ik", power, power)
        inverse = inverse + _einsum("...ij,...jk->...ik", inverse, power)
        num_terms *= 2
    return inverse


def chunked_form(inputs: DeltaInputs, state: Float[Array, "B M Dk Dv"], chunk: int) -> DeltaOutputs:
    """Run the recurrence in chunks of `chunk` rows, of which T is a multiple; see the formula above.

    Everything that does not need the state is computed for all chunks at once; the scan over chunks has four products.
    Rows with beta = 0 and g = 0 change nothing, bit for bit.
    """
    batch, rows, key_heads, _ = inputs.q.shape
    value_heads = inputs.v.shape[2]
    num_chunks, ratio = rows // chunk, value_heads // key_heads

    def split(x: Array, heads_per_key: int) -> Array:  # [B, T, heads, *] -> [n, B, J, r, C, *]
        x = x.reshape(batch, num_chunks, chunk, key_heads, heads_per_key, *x.shape[3:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 4)

    q, k = split(inputs.q, 1)[:, :, :, 0], split(inputs.k, 1)[:, :, :, 0]  # [n, B, J, C, Dk]
    v, beta, g = (split(x, ratio) for x in (inputs.v, inputs.beta, inputs.g))
    decay = jnp.cumsum(g, axis=-1)  # [n, B, J, r, C]
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))
    decay_ratios = jnp.exp(jnp.where(causal, decay[..., :, None] - decay[..., None, :], -jnp.inf))
    kk, qk = (_einsum("nbjck,nbjdk->nbjcd", x, k)[:, :, :, None] for x in (k, q))
    n_matrix = jnp.where(jnp.tril(causal, -1), beta[..., None] * kk * decay_ratios, 0.0)
    t_matrix = solve_tril(n_matrix) * beta[..., None, :]
    tv = _einsum("nbjrcd,nbjrdv->nbjrcv", t_matrix, v)
    tk = _einsum("nbjrcd,nbjdk->nbjrck", t_matrix * jnp.exp(decay)[..., None, :], k)
    intra_chunk = qk * decay_ratios  # lower triangular, diagonal included
    q_decayed = q[:, :, :, None] * jnp.exp(decay)[..., None]
    k_decayed = k[:, :, :, None] * jnp.exp(decay[..., -1:] - decay)[..., None]

    def step(state: Array, operands: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        tv, tk, intra_chunk, q_decayed, k_decayed, last_decay = operands
        delta = tv - _einsum("bjrck,bjrkv->bjrcv", tk, state)
        o = _einsum("bjrck,bjrkv->bjrcv", q_decayed, state) + _einsum("bjrcd,bjrdv->bjrcv", intra_chunk, delta)
        update = _einsum("bjrck,bjrcv->bjrkv", k_decayed, delta)
        return jnp.exp(last_decay)[..., None, None] * state + update, o, delta

    s = state.reshape(batch, key_heads, ratio, *state.shape[2:])
    operands = (tv, tk, intra_chunk, q_decayed, k_decayed, decay[..., -1])
    if num_chunks == 1:
        s, o, delta = step(s, jax.tree.map(lambda x: x[0], operands))
        o, delta = o[None], delta[None]
    else:
        # As a result of the scan, o would begin as zeros, which XLA makes for all layers at once: one buffer for each.
        # The outputs of a chunk replace its values instead.
        def scan_step(carry: tuple[Array, Array], x: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            (s, out), (i, *operands) = carry, x
            s, o, delta = step(s, tuple(operands))
            return (s, lax.dynamic_update_index_in_dim(out, o, i, 0)), delta

        (s, o), delta = lax.scan(scan_step, (s, v), (jnp.arange(num_chunks), *operands))

    def join(x: Array) -> Array:  # [n, B, J, r, C, *] -> [B, T, M, *]
        x = jnp.moveaxis(jnp.moveaxis(x, 4, 2), 0, 1)
        return x.reshape(batch, rows, value_heads, *x.shape[5:])

    return DeltaOutputs(join(o), join(delta), join(decay), s.reshape(state.shape))


def pad_to_chunks(inputs: DeltaInputs) -> DeltaInputs:
    """Put rows that change nothing behind, up to a multiple of `CHUNK` rows."""
    return _pad(inputs, 0, -inputs.q.shape[1] % CHUNK)


def _pad(inputs: DeltaInputs, in_front: int, behind: int) -> DeltaInputs:
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (in_front, behind)] + [(0, 0)] * (x.ndim - 2)), inputs)


def recurrent_gated_delta_rule(inputs: DeltaInputs, state: Float[Array, "B M Dk Dv"]) -> DeltaOutputs:
    """Run the few rows of a verify window as one chunk, so that `decay` is summed over the window.

    A single row is computed as the second one of two, because XLA multiplies one row in another order than several.
    """
    rows = inputs.q.shape[1]
    padding = int(rows == 1)
    outputs = chunked_form(_pad(inputs, padding, 0), state, rows + padding)
    return outputs._replace(**{name: getattr(outputs, name)[:, padding:] for name in ("o", "delta", "decay")})


def chunk_gated_delta_rule(
    inputs: DeltaInputs, state: Float[Array, "B M Dk Dv"]
) -> tuple[Float[Array, "B T M Dv"], Float[Array, "B M Dk Dv"]]:
    """Run any number of rows in chunks of `CHUNK`, counted from the first one.

    Returns:
        the outputs and the state after all rows, both float32.
    """
    outputs = chunked_form(pad_to_chunks(inputs), state, CHUNK)
    return outputs.o[:, : inputs.q.shape[1]], outputs.state
