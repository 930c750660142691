"""Gated DeltaNet: the linear-attention layer, in its chunked form and with exact replay of accepted rows.

Per value head, with state S [K, V], decay g <= 0 and step size beta:
    S <- exp(g) S;  d = beta (v - S^T k);  S <- S + k d^T;  o = S^T q
`delta_chunk` does C rows of this at once with matrix products; on a GPU a kernel takes the few rows of a verify window one by
one; `commit` adds rows whose k and d are already known.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from kernels_pallas.gated_delta_rule import DeltaProjections, Fixed, pick, pick_chunks
from kernels_pallas.matmul import linears_split_k
from kernels_pallas.norm import gated_rms_norm, l2_norm
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import platform
from mtpjax.config import ModelConfig
from mtpjax.model.cache import Cache, PendingDeltaUpdates
from mtpjax.model.params import ParamFactory
from mtpjax.model.positions import Positions

CHUNK = 64
EXACT = lax.Precision.HIGHEST  # the recurrence is float32 on every device, in kernels to a few parts in 2^22


class Rows(NamedTuple):
    """Inputs of the recurrence, float32. q is normalised and scaled, k normalised."""

    q: Float[Array, "B T J K"]
    k: Float[Array, "B T J K"]
    v: Float[Array, "B T M V"]
    beta: Float[Array, "B T M"]
    g: Float[Array, "B T M"]


def _einsum(spec: str, *args: Array) -> Array:
    return jnp.einsum(spec, *args, precision=EXACT)


def unit_lower_inverse(n: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """`(I + n)^-1` for strictly lower triangular n.

    n is nilpotent, so the inverse is the product of `I + (-n)^(2^i)`; large blocks are split in two first,
    `[[A, 0], [B, D]]^-1 = [[A', 0], [-D' B A', D']]`, which needs far fewer operations, and where keys are nearly equal (one
    token again and again) the powers of larger blocks would grow beyond float32's digits: of 16 rows the error is 1e-4.
    """
    size = n.shape[-1]
    if n.ndim > 3:  # XLA's CPU backend aborts on the gradient of products with eight axes
        return unit_lower_inverse(n.reshape(-1, size, size)).reshape(n.shape)
    if size > 8 and size % 2 == 0:
        h = size // 2
        corners = unit_lower_inverse(jnp.stack([n[..., :h, :h], n[..., h:, h:]]))
        below = -_einsum("...ij,...jk,...kl->...il", corners[1], n[..., h:, :h], corners[0])
        top = jnp.concatenate([corners[0], jnp.zeros_like(below)], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([below, corners[1]], axis=-1)], axis=-2)
    power, inverse, done = -n, jnp.eye(size) - n, 2
    while done < size:
        power = _einsum("...ij,...jk->...ik", power, power)
        inverse = inverse + _einsum("...ij,...jk->...ik", inverse, power)
        done *= 2
    return inverse


def delta_chunk(
    rows: Rows, state: Float[Array, "B M K V"], chunk: int
) -> tuple[Float[Array, "B T M V"], Float[Array, "B T M V"], Float[Array, "B T M"], Float[Array, "B M K V"]]:
    """Outputs o, updates d, log decay summed within each chunk, and the state after all rows. T a multiple of `chunk`.

    Everything that does not need the state is done for all chunks at once; the scan over chunks is four products.
    Rows with beta = 0 and g = 0 change nothing, bit for bit.
    """
    batch, total, keys, _ = rows.q.shape
    heads = rows.v.shape[2]
    n, ratio = total // chunk, heads // keys

    def split(x: Array, per: int) -> Array:  # [B, T, heads, *] -> [n, B, J, r, C, *]
        x = x.reshape(batch, n, chunk, keys, per, *x.shape[3:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 4)

    q, k = split(rows.q, 1)[:, :, :, 0], split(rows.k, 1)[:, :, :, 0]  # [n, B, J, C, K]
    v, beta, g = (split(x, ratio) for x in (rows.v, rows.beta, rows.g))
    decay = jnp.cumsum(g, axis=-1)  # [n, B, J, r, C]
    lower = jnp.tril(jnp.ones((chunk, chunk), bool))
    ratios = jnp.exp(jnp.where(lower, decay[..., :, None] - decay[..., None, :], -jnp.inf))
    kk, qk = (_einsum("nbjck,nbjdk->nbjcd", x, k)[:, :, :, None] for x in (k, q))
    inner = jnp.where(jnp.tril(lower, -1), beta[..., None] * kk * ratios, 0.0)
    solve = unit_lower_inverse(inner) * beta[..., None, :]
    u = _einsum("nbjrcd,nbjrdv->nbjrcv", solve, v)
    w = _einsum("nbjrcd,nbjdk->nbjrck", solve * jnp.exp(decay)[..., None, :], k)
    mix = qk * ratios  # lower triangular, diagonal included
    q_in = q[:, :, :, None] * jnp.exp(decay)[..., None]
    k_out = k[:, :, :, None] * jnp.exp(decay[..., -1:] - decay)[..., None]

    def step(s: Array, x: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        u, w, mix, q_in, k_out, last = x
        d = u - _einsum("bjrck,bjrkv->bjrcv", w, s)
        o = _einsum("bjrck,bjrkv->bjrcv", q_in, s) + _einsum("bjrcd,bjrdv->bjrcv", mix, d)
        return jnp.exp(last)[..., None, None] * s + _einsum("bjrck,bjrcv->bjrkv", k_out, d), o, d

    s = state.reshape(batch, keys, ratio, *state.shape[2:])
    xs = (u, w, mix, q_in, k_out, decay[..., -1])
    if n == 1:
        s, o, d = step(s, jax.tree.map(lambda x: x[0], xs))
        o, d = o[None], d[None]
    else:
        # As a result of the scan o would begin as zeros, which XLA makes for all layers at once: a buffer each.
        def turn(carry: tuple[Array, Array], x: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            (s, out), (i, *xs) = carry, x
            s, o, d = step(s, tuple(xs))
            return (s, lax.dynamic_update_index_in_dim(out, o, i, 0)), d

        (s, o), d = lax.scan(turn, (s, v), (jnp.arange(n), *xs))

    def join(x: Array) -> Array:  # [n, B, J, r, C, *] -> [B, T, M, *]
        x = jnp.moveaxis(jnp.moveaxis(x, 4, 2), 0, 1)
        return x.reshape(batch, total, heads, *x.shape[5:])

    return join(o), join(d), join(decay), s.reshape(state.shape)


def _padded(given: Rows, chunk: int) -> Rows:
    """With rows behind the last one that change nothing, up to whole chunks."""
    extra = -given.q.shape[1] % chunk
    return jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, extra)] + [(0, 0)] * (a.ndim - 2)), given) if extra else given


def _in_chunks(given: Rows, state: Float[Array, "B M K V"]) -> tuple[Array, Array, Array, Array]:
    """`delta_chunk` for any number of rows."""
    rows = given.q.shape[1]
    chunk = min(CHUNK, rows)
    o, d, decay, after = delta_chunk(_padded(given, chunk), state, chunk)
    return o[:, :rows], d[:, :rows], decay[:, :rows], after


def read_rows(
    given: Rows, states: Float[Array, "L B M K V"], layer: Array | int, dtype: jnp.dtype, differentiable: bool = False
) -> tuple[Float[Array, "B T M V"], Float[Array, "B M K V"]]:
    """Outputs of the rows of a prompt, in `dtype`, and the state of layer `layer` after them."""
    rows, chunk = given.q.shape[1], CHUNK
    while chunk > rows:
        chunk //= 2
    kernels = None if differentiable else pick_chunks(platform(), chunk, *states.shape[3:])
    if kernels is None:
        o, _, _, after = _in_chunks(given, states[layer])
        return o.astype(dtype), after
    q, k, v, beta, g = _padded(given, chunk)
    decay = jnp.cumsum(g.reshape(g.shape[0], -1, chunk, g.shape[2]), axis=2).reshape(g.shape)
    o, after = kernels(q, k, v, beta, decay, states, layer, chunk=chunk, dtype=dtype)
    return o[:, :rows], after


def split_rows(
    u: Float[Array, "B T C"],
    beta: Float[Array, "B T M"],
    g: Float[Array, "B T M"],
    heads: int,
    key_size: int,
    value_size: int,
) -> Rows:
    """What the recurrence reads, from what the convolution gives: all q, all k, all v."""
    keys = (u.shape[2] - heads * value_size) // 2
    q, k, v = jnp.split(u, [keys, 2 * keys], axis=-1)
    q, k = (l2_norm(x.reshape(*x.shape[:2], -1, key_size)) for x in (q, k))
    return Rows(q * key_size**-0.5, k, v.reshape(*v.shape[:2], heads, value_size), beta, g)


def fold(
    state: Float[Array, "L B M K V"],
    k: Float[Array, "L B W J K"],
    d: Float[Array, "L B W M V"],
    decay: Float[Array, "L B W M"],
    accepted: Int[Array, " B"],
) -> Float[Array, "L B M K V"]:
    """State after the first `accepted` rows of a window: `exp(G_n) S + sum_{i<=n} exp(G_n - G_i) k_i d_i^T`.

    The d of a row does not depend on later rows, so this equals stepping through them. Zero rows: the state, unchanged.
    Without a product the size of the state in between: one pass that reads and writes it.
    """
    ratio = state.shape[2] // k.shape[3]
    last = jnp.take_along_axis(decay, jnp.maximum(accepted - 1, 0)[None, :, None, None], axis=2)  # [L, B, 1, M]
    counted = (jnp.arange(decay.shape[2]) < accepted[:, None])[None, :, :, None]
    weight = jnp.where(counted, jnp.exp(jnp.where(counted, last - decay, 0.0)), 0.0)  # [L, B, W, M]
    keep = jnp.where(accepted[:, None] > 0, jnp.exp(last[:, :, 0]), 1.0)  # [L, B, M]
    rows = (keep, jnp.repeat(k, ratio, axis=3), d * weight[..., None])

    def add(state: Array, keep: Array, keys: Array, d: Array) -> Array:
        state = state * keep[..., None, None]
        for i in range(keys.shape[-3]):
            state = state + keys[..., i, :, :, None] * d[..., i, :, None, :]
        return state

    if decay.shape[2] > 1 or platform() != "cpu":
        return add(state, *rows)

    # Of a single row, XLA's CPU backend would fuse all that k and d are made from into the pass, to compute it anew for every
    # element of the state. What the turns of a loop read is there before it.
    def layer(i: Array, state: Array) -> Array:
        new = add(*(lax.dynamic_index_in_dim(a, i, keepdims=False) for a in (state, *rows)))
        return lax.dynamic_update_index_in_dim(state, new, i, 0)

    return lax.fori_loop(0, state.shape[0], layer, state)


def commit(cache: Cache, pending: PendingDeltaUpdates, accepted: Int[Array, " B"]) -> Cache:
    """Take the first `accepted` rows (0...W) of a verify window into the state and the length; forget the rest."""
    keep = cache.conv.shape[2]
    cut = jax.vmap(lambda rows, n: lax.dynamic_slice_in_dim(rows, n, keep, axis=1), (1, 0), 1)
    some = (accepted > 0)[None, :, None, None]  # of an idle window, all padding, the inputs stand behind the cut
    return cache.replace(
        state=fold(cache.state, pending.k, pending.delta, pending.decay, accepted),
        conv=jnp.where(some, cut(pending.conv, accepted), cache.conv),
        length=cache.length + accepted,
    )


def conv_inputs(
    before: Float[Array, "B P C"], x: Float[Array, "B T C"], pad: Int[Array, " B"], live: Bool[Array, "B T"]
) -> Float[Array, "B P+T C"]:
    """The P inputs that precede the live rows, then the rows; padding in front of both is zero.

    The earlier inputs move up to the first live row, so front padding is a no-op for continued sequences too, and the
    last P entries are always what the next step needs.
    """
    x = jnp.where(live[..., None], x, 0)
    joined = jnp.concatenate([jnp.zeros_like(before), x], axis=1)
    put = jax.vmap(lambda row, prev, at: lax.dynamic_update_slice(row, prev, (at, 0)))
    return put(joined, before, pad)


class DeltaNet(nnx.Module):
    """Weights of one Gated DeltaNet layer (or a stack of them)."""

    def __init__(self, cfg: ModelConfig, new: ParamFactory):
        self.cfg = cfg
        self.in_qkv = new.matrix(cfg.conv_channels, cfg.hidden_size)
        self.in_z = new.matrix(cfg.value_size, cfg.hidden_size)
        self.in_b = new.matrix(cfg.linear_v_heads, cfg.hidden_size)
        self.in_a = new.matrix(cfg.linear_v_heads, cfg.hidden_size)
        self.conv = new.vector(cfg.conv_channels, cfg.conv_width)  # tap width-1 is the row itself
        self.a_log = new.vector(cfg.linear_v_heads)
        self.dt_bias = new.vector(cfg.linear_v_heads)
        self.norm = new.vector(cfg.linear_v_dim)  # plain weight, not zero-centred
        self.out = new.matrix(cfg.hidden_size, cfg.value_size)

    def _convolved(self, inputs: Float[Array, "B P+T C"], rows: int, dtype: jnp.dtype) -> Float[Array, "B T C"]:
        """SiLU of the convolution, rounded to `dtype`; float32."""
        taps, wide = self.conv[...].astype(jnp.float32), inputs.astype(jnp.float32)
        u = sum(wide[:, i : i + rows] * taps[:, i] for i in range(self.cfg.conv_width))
        return jax.nn.silu(u).astype(dtype).astype(jnp.float32)

    def _gates(
        self, b: Float[Array, "B T M"], a: Float[Array, "B T M"], live: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T M"], Float[Array, "B T M"]]:
        """Step size beta and log decay g, zero for padding."""
        some = live[..., None]
        decay = -jnp.exp(self.a_log[...].astype(jnp.float32)) * jax.nn.softplus(a + self.dt_bias[...])
        return jnp.where(some, jax.nn.sigmoid(b), 0.0), jnp.where(some, decay, 0.0)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        pending: PendingDeltaUpdates | None,
        layer: Array | int,
        positions: Positions,
    ) -> tuple[PartialSums, Cache, PendingDeltaUpdates | None]:
        """Rows of one layer, as the partial sums `[P, B*T, D]` of the last product.

        The rows enter the state of the cache, or, given `pending`, wait there for `commit`.
        """
        cfg, rows, f32 = self.cfg, x.shape[1], jnp.float32
        before = cache.conv[layer]
        weights, dtypes = (self.in_qkv, self.in_z, self.in_b, self.in_a), (x.dtype, x.dtype, f32, f32)
        parts = linears_split_k(x, *(w[...] for w in weights), out_dtypes=dtypes)
        qkv, _, b, a = (
            y.sum(dtype).reshape(*x.shape[:2], y.parts.shape[-1]) for y, dtype in zip(parts, dtypes, strict=True)
        )
        inputs = conv_inputs(before, qkv.astype(before.dtype), positions.pad, positions.valid)
        kernel = None if pending is None else pick(platform(), rows, cfg.linear_k_dim, cfg.linear_v_dim)
        if kernel is None:
            given = split_rows(
                self._convolved(inputs, rows, x.dtype), *self._gates(b, a, positions.valid), *cache.state.shape[2:]
            )
        if pending is None:
            o, after = read_rows(given, cache.state, layer, x.dtype, positions.implementation == "xla")
            cache = cache.replace(
                state=cache.state.at[layer].set(after), conv=cache.conv.at[layer].set(inputs[:, rows:])
            )
        else:
            if kernel is None:
                o, d, decay, _ = _in_chunks(given, cache.state[layer])
                o, k = o.astype(x.dtype), given.k
            else:
                projected, fixed = (
                    DeltaProjections(parts[0].parts, *(y.parts for y in parts[2:])),
                    Fixed(self.conv[...], self.a_log[...], self.dt_bias[...]),
                )
                end = positions.pad + jnp.sum(positions.valid, axis=1)
                o, d, k, decay = kernel(
                    projected, fixed, cache.conv, cache.state, layer, positions.pad, end, dtype=x.dtype
                )
            pending = PendingDeltaUpdates(
                conv=pending.conv.at[layer].set(inputs),
                k=pending.k.at[layer].set(k),
                delta=pending.delta.at[layer].set(d),
                decay=pending.decay.at[layer].set(decay),
            )
        heads, act, implementation = o.reshape(-1, *o.shape[2:]), cfg.output_gate_act, positions.implementation
        y = gated_rms_norm(heads, parts[1], self.norm[...], cfg.norm_eps, act, implementation=implementation)
        return linears_split_k(y.reshape(*x.shape[:2], -1), self.out[...])[0], cache, pending
