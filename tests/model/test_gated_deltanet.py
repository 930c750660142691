"""Gated DeltaNet against its recurrence in float64: chunks, replay, convolution inputs, padding in front."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtpjax.model import commit, make_positions
from mtpjax.model.cache import KV_BLOCK, Cache, PendingDeltaUpdates, new_cache, new_pending
from mtpjax.model.gated_deltanet import CHUNK, Rows, conv_inputs, delta_chunk, fold, unit_lower_inverse
from tests.helpers.models import numpy_model, tiny_config

BATCH, KEYS, KEY_DIM, VALUE_DIM = 2, 2, 16, 24


class Reference(NamedTuple):
    """float64: outputs and updates `[B, T, M, V]`, the states before, between and behind the rows `[B, 1+T, M, K, V]`."""

    o: np.ndarray
    d: np.ndarray
    states: np.ndarray


def recurrence(rows: Rows, state: np.ndarray) -> Reference:
    """S <- exp(g) S; d = beta (v - S^T k); S <- S + k d^T; o = S^T q, one row and one head at a time."""
    q, k, v, beta, g = (np.asarray(x, np.float64) for x in rows)
    batch, total, heads, _ = v.shape
    ratio = heads // q.shape[2]
    o, d = np.zeros_like(v), np.zeros_like(v)
    states = np.zeros((batch, total + 1, *state.shape[1:]))
    states[:, 0] = state
    for b, t, m in np.ndindex(batch, total, heads):
        s = np.exp(g[b, t, m]) * states[b, t, m]
        key = k[b, t, m // ratio]
        d[b, t, m] = beta[b, t, m] * (v[b, t, m] - s.T @ key)
        states[b, t + 1, m] = s + np.outer(key, d[b, t, m])
        o[b, t, m] = states[b, t + 1, m].T @ q[b, t, m // ratio]
    return Reference(o, d, states)


def random_rows(total: int, ratio: int, seed: int = 0) -> tuple[Rows, np.ndarray]:
    """Inputs as the layer makes them, memories from one row to hundreds, and a state as large as its updates."""
    rng = np.random.default_rng(seed)
    heads = KEYS * ratio

    def unit(*shape: int) -> np.ndarray:
        x = rng.normal(size=shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    memory = np.exp(rng.uniform(np.log(1e-3), np.log(2.0), heads))
    rows = Rows(
        q=unit(BATCH, total, KEYS, KEY_DIM) * np.float32(KEY_DIM**-0.5),
        k=unit(BATCH, total, KEYS, KEY_DIM),
        v=rng.normal(size=(BATCH, total, heads, VALUE_DIM)).astype(np.float32),
        beta=rng.uniform(size=(BATCH, total, heads)).astype(np.float32),
        g=(-memory * rng.uniform(0.2, 2.0, (BATCH, total, heads))).astype(np.float32),
    )
    return rows, rng.normal(size=(BATCH, heads, KEY_DIM, VALUE_DIM)).astype(np.float32)


def close(ours: jax.Array, theirs: np.ndarray, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    worst = float(np.abs(np.asarray(ours, np.float64) - theirs).max(initial=0))
    assert worst <= tolerance


chunked = jax.jit(delta_chunk, static_argnums=2)


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("total", [1, 5, 63, 64, 65, 150, 200])
def test_chunks_are_the_recurrence(total, ratio):
    rows, state = random_rows(total, ratio)
    want = recurrence(rows, state)
    chunk = min(CHUNK, total)
    extra = -total % chunk  # rows behind the last, as the layer adds them
    given = Rows(*(np.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) for x in rows))
    o, d, decay, after = chunked(given, state, chunk)
    close(o[:, :total], want.o, 3e-6)
    close(d[:, :total], want.d, 1e-5)
    close(after, want.states[:, -1], 1e-5)
    sums = np.concatenate([np.cumsum(rows.g[:, i : i + chunk], 1, np.float64) for i in range(0, total, chunk)], 1)
    close(decay[:, :total], sums, 1e-4)


def test_rows_without_effect_leave_every_bit():
    rows, state = random_rows(CHUNK, 2)
    nothing = Rows(rows.q, *(np.zeros_like(x) if x is not rows.v else x for x in rows[1:]))
    o, d, _, after = chunked(nothing, state, CHUNK)
    assert np.array_equal(after, state) and not np.any(d)


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_commit_is_stepping_through_the_accepted_rows(window):
    """Every count 0...W at once, two layers with their own state, as a batch of W + 1 equal sequences."""
    counts = np.arange(window + 1)
    caches, waiting, want = [], [], []
    for layer in range(2):
        rows, state = random_rows(window, 3, seed=layer)
        exact = recurrence(rows, state)
        _, d, decay, _ = chunked(rows, state, window)
        want.append(exact.states[0])
        caches.append(np.broadcast_to(state[:1], (window + 1, *state.shape[1:])))
        waiting.append([np.broadcast_to(np.asarray(x)[:1], (window + 1, *x.shape[1:])) for x in (rows.k, d, decay)])
    state = jnp.asarray(np.stack(caches))
    k, d, decay = (jnp.asarray(np.stack(x)) for x in zip(*waiting, strict=True))
    after = jax.jit(fold)(state, k, d, decay, counts)
    close(after, np.stack(want), 1e-5)
    assert np.array_equal(after[:, 0], state[:, 0])  # none accepted: every bit as it was

    cfg = tiny_config(moe=False)  # two DeltaNet layers; only its sizes of the convolution matter here
    width, size = cfg.conv_width, cfg.conv_channels
    inputs = np.random.default_rng(0).normal(size=(2, window + 1, width - 1 + window, size)).astype(np.float32)
    before = jnp.asarray(inputs[:, :, : width - 1])
    cache = new_cache(cfg, window + 1, KV_BLOCK).replace(state=state, conv=before, length=jnp.asarray(10 * counts))
    cache = jax.jit(commit)(cache, PendingDeltaUpdates(jnp.asarray(inputs), k, d, decay), counts)
    assert np.array_equal(cache.state, after) and np.array_equal(cache.length, 11 * counts)
    for n in counts:  # the inputs that end at the last accepted row
        assert np.array_equal(cache.conv[:, n], inputs[:, n, n : n + width - 1])


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 29, 32, 50, 64])
def test_inverse_of_unit_lower_triangles(size):
    n = np.tril(np.random.default_rng(size).normal(size=(2, 3, size, size)) / np.sqrt(size), -1)
    want = np.linalg.inv(np.eye(size) + n)
    got = jax.jit(unit_lower_inverse)(n.astype(np.float32))
    close(got / np.abs(want).max(), want / np.abs(want).max(), 2e-6)
    assert np.array_equal(np.triu(got, 1), np.zeros_like(want))


def test_convolution_inputs_stand_behind_the_padding():
    before = np.arange(1.0, 7).reshape(1, 3, 2).repeat(4, axis=0)
    x = np.arange(11.0, 21).reshape(1, 5, 2).repeat(4, axis=0)
    pad = np.array([0, 2, 4, 5])
    live = np.arange(5) >= pad[:, None]
    got = conv_inputs(jnp.asarray(before), jnp.asarray(x), jnp.asarray(pad), jnp.asarray(live))
    for b, p in enumerate(pad):
        assert np.array_equal(got[b], np.concatenate([np.zeros((p, 2)), before[b], x[b, p:]]))


class Layers:
    """The trunk of a two-layer model (DeltaNet, attention): `read` for prompts, `wait` for verify windows."""

    def __init__(self) -> None:
        self.loaded = numpy_model(tiny_config(moe=True, num_superblocks=1), seed=3)
        self.cfg = self.loaded.cfg

    @partial(jax.jit, static_argnums=0)
    def read(self, tokens: jax.Array, pad: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        model = nnx.merge(self.loaded.graph, self.loaded.params)
        rows, cache = model.trunk(
            tokens, cache, make_positions(self.cfg, cache.length, tokens.shape[1], pad, kv_len=cache.kv_len)
        )
        return rows, cache.replace(length=cache.length + tokens.shape[1] - pad)

    @partial(jax.jit, static_argnums=0)
    def wait(self, tokens: jax.Array, pad: jax.Array, cache: Cache) -> tuple[Cache, PendingDeltaUpdates]:
        model = nnx.merge(self.loaded.graph, self.loaded.params)
        where = make_positions(self.cfg, cache.length, tokens.shape[1], pad, kv_len=cache.kv_len)
        return model.trunk_pending(tokens, cache, where)[1:]


@pytest.fixture(scope="module")
def layers() -> Layers:
    return Layers()


TOTAL = 32


def tokens_of(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, rows).astype(np.int32)


def same(ours: Cache, theirs: Cache, tolerance: float = 0.0) -> None:
    """Equal within the tolerance; 0 means every bit. Keys and values, a layer further on, get ten times as much."""
    for name, a, b in zip(Cache.__dataclass_fields__, jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        worst = float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max(initial=0))
        assert worst <= tolerance * (10 if name in ("k", "v") else 1), name


def one(cache: Cache, b: int) -> Cache:
    """Sequence b of a batch."""
    return jax.tree.map(lambda x: x[b : b + 1] if x.ndim == 1 else x[:, b : b + 1], cache)


@pytest.mark.parametrize("start", [0, 1, 2, 20])
def test_padding_in_front_changes_nothing(layers, start):
    """Fresh and continued sequences, padded by 0...T rows, against the same rows without padding.

    A start of one or two rows leaves fewer real convolution inputs than the convolution reaches back.
    """
    empty = new_cache(layers.cfg, 1, KV_BLOCK)
    begun = layers.read(tokens_of(1, start)[None], np.zeros(1, np.int32), empty)[1] if start else empty
    pads = np.array([0, 1, 3, 20, 31], np.int32)
    many = jax.tree.map(lambda x: jnp.repeat(x, len(pads), axis=int(x.ndim > 1)), begun)
    text = tokens_of(2, TOTAL)
    batch = np.stack([np.concatenate([tokens_of(9 + p, p), text[p:]]) for p in pads])  # padding: any tokens at all
    rows, after = layers.read(batch, pads, many)
    for b, pad in enumerate(pads):
        alone, want = layers.read(text[None, pad:], np.zeros(1, np.int32), begun)
        same(one(after, b), want, 1e-6)
        close(rows[b, pad:], np.asarray(alone[0], np.float64), 3e-5)
        assert after.length[b] == start + TOTAL - pad


def test_what_stands_in_the_padding_does_not_matter(layers):
    pads = np.array([5, 30], np.int32)
    text = np.stack([tokens_of(2, TOTAL)] * 2)
    noise = np.where(np.arange(TOTAL) < pads[:, None], (text + 13) % 96, text)
    cache = new_cache(layers.cfg, 2, KV_BLOCK)
    (a, left), (b, right) = (layers.read(tokens, pads, cache) for tokens in (text, noise))
    assert np.array_equal(a, b)
    same(left, right)


@pytest.mark.parametrize("start", [0, 20])
def test_a_chunk_of_padding_leaves_every_bit(layers, start):
    cache = new_cache(layers.cfg, 1, KV_BLOCK)
    if start:
        cache = layers.read(tokens_of(1, start)[None], np.zeros(1, np.int32), cache)[1]
    same(layers.read(tokens_of(2, TOTAL)[None], np.full(1, TOTAL, np.int32), cache)[1], cache)


def test_a_window_waits_outside_the_state(layers):
    """A verify window touches neither state nor convolution inputs; committed in whole it equals a prompt chunk."""
    begun = layers.read(tokens_of(1, 20)[None], np.zeros(1, np.int32), new_cache(layers.cfg, 1, KV_BLOCK))[1]
    window, none = tokens_of(4, 5)[None], np.zeros(1, np.int32)
    cache, pending = layers.wait(window, none, begun)
    assert np.array_equal(cache.state, begun.state) and np.array_equal(cache.conv, begun.conv)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), new_pending(layers.cfg, 1, 5))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), pending) == shapes
    same(commit(cache, pending, jnp.array([5])), layers.read(window, none, begun)[1], 1e-6)


def test_an_idle_window_leaves_every_bit(layers):
    """In a batch where the other sequence goes on, as the loop commits it: no rows of the idle one."""
    texts = np.stack([tokens_of(1, 20), tokens_of(2, 20)])
    begun = layers.read(texts, np.zeros(2, np.int32), new_cache(layers.cfg, 2, KV_BLOCK))[1]
    cache, pending = layers.wait(texts[:, :5], np.array([5, 0], np.int32), begun)
    after = commit(cache, pending, jnp.array([0, 4]))
    same(one(after, 0), one(begun, 0))
    assert after.length.tolist() == [20, 24]
