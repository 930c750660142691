"""The Gated DeltaNet layer in the model: padding in front, verify windows and their commit, both implementations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtpjax.model import commit, make_positions
from mtpjax.model.cache import KV_BLOCK, Cache, PendingDeltaUpdates, new_cache, new_pending
from tests.helpers.models import numpy_model, tiny_config
from tests.helpers.numerics import assert_close


class Trunk:
    """The trunk of a two-layer model (DeltaNet, attention): `prefill` for prompts, `verify` for verify windows."""

    def __init__(self) -> None:
        self.loaded = numpy_model(tiny_config(moe=True, num_superblocks=1), seed=3)
        self.cfg = self.loaded.cfg

    @partial(jax.jit, static_argnums=0)
    def prefill(self, tokens: jax.Array, pad: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        model = nnx.merge(self.loaded.graph, self.loaded.params)
        positions = make_positions(self.cfg, cache.length, tokens.shape[1], pad, kv_len=cache.kv_len)
        rows, cache = model.trunk(tokens, cache, positions)
        return rows, cache.replace(length=cache.length + tokens.shape[1] - pad)

    @partial(jax.jit, static_argnums=0)
    def verify(self, tokens: jax.Array, pad: jax.Array, cache: Cache) -> tuple[Cache, PendingDeltaUpdates]:
        model = nnx.merge(self.loaded.graph, self.loaded.params)
        positions = make_positions(self.cfg, cache.length, tokens.shape[1], pad, kv_len=cache.kv_len)
        return model.trunk_pending(tokens, cache, positions)[1:]


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    return Trunk()


ROWS = 32


def random_tokens(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, rows).astype(np.int32)


def assert_same(got: Cache, want: Cache, tolerance: float = 0.0) -> None:
    """Compare within the tolerance; 0 means every bit. Keys and values, one layer further, get ten times as much."""
    for name, a, b in zip(Cache.__dataclass_fields__, jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert max_error(a, b) <= tolerance * (10 if name in ("k", "v") else 1), name


def max_error(got: Any, want: Any) -> float:
    assert got.shape == want.shape
    return float(np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max(initial=0))


def sequence(cache: Cache, b: int) -> Cache:
    """Return the cache of sequence b of a batch."""
    return jax.tree.map(lambda x: x[b : b + 1] if x.ndim == 1 else x[:, b : b + 1], cache)


@pytest.mark.parametrize("start", [0, 1, 2, 20])
def test_padding_in_front_changes_nothing(trunk: Trunk, start: int) -> None:
    """Fresh and continued sequences, padded by 0...T rows, against the same rows without padding.

    A start of one or two rows leaves fewer real convolution inputs than the convolution reaches back.
    """
    empty, no_pad = new_cache(trunk.cfg, 1, KV_BLOCK), np.zeros(1, np.int32)
    before = trunk.prefill(random_tokens(1, start)[None], no_pad, empty)[1] if start else empty
    pads = np.array([0, 1, 3, 20, 31], np.int32)
    caches = jax.tree.map(lambda x: jnp.repeat(x, len(pads), axis=int(x.ndim > 1)), before)
    text = random_tokens(2, ROWS)
    batch = np.stack([np.concatenate([random_tokens(9 + p, p), text[p:]]) for p in pads])  # padding holds any token
    rows, after = trunk.prefill(batch, pads, caches)
    for b, pad in enumerate(pads):
        alone, want = trunk.prefill(text[None, pad:], no_pad, before)
        assert_same(sequence(after, b), want, 1e-6)
        assert max_error(rows[b, pad:], alone[0]) <= 3e-5
        assert after.length[b] == start + ROWS - pad


def test_tokens_in_the_padding_do_not_matter(trunk: Trunk) -> None:
    pads = np.array([5, 30], np.int32)
    text = np.stack([random_tokens(2, ROWS)] * 2)
    noise = np.where(np.arange(ROWS) < pads[:, None], (text + 13) % 96, text)
    cache = new_cache(trunk.cfg, 2, KV_BLOCK)
    (a, cache_a), (b, cache_b) = (trunk.prefill(tokens, pads, cache) for tokens in (text, noise))
    assert np.array_equal(a, b)
    assert_same(cache_a, cache_b)


@pytest.mark.parametrize("start", [0, 20])
def test_a_chunk_of_padding_keeps_every_bit(trunk: Trunk, start: int) -> None:
    cache = new_cache(trunk.cfg, 1, KV_BLOCK)
    if start:
        cache = trunk.prefill(random_tokens(1, start)[None], np.zeros(1, np.int32), cache)[1]
    assert_same(trunk.prefill(random_tokens(2, ROWS)[None], np.full(1, ROWS, np.int32), cache)[1], cache)


def test_a_window_waits_outside_the_state(trunk: Trunk) -> None:
    """A verify window touches neither state nor convolution inputs; committed in whole it equals a prompt chunk."""
    no_pad = np.zeros(1, np.int32)
    before = trunk.prefill(random_tokens(1, 20)[None], no_pad, new_cache(trunk.cfg, 1, KV_BLOCK))[1]
    window = random_tokens(4, 5)[None]
    cache, pending = trunk.verify(window, no_pad, before)
    assert np.array_equal(cache.state, before.state) and np.array_equal(cache.conv, before.conv)
    for got, room in zip(jax.tree.leaves(pending), jax.tree.leaves(new_pending(before, 5)), strict=True):
        assert (got.shape, got.dtype) == (room.shape, room.dtype)
    assert_same(commit(cache, pending, jnp.array([5])), trunk.prefill(window, no_pad, before)[1], 1e-6)


def test_an_idle_window_keeps_every_bit(trunk: Trunk) -> None:
    """In a batch where the other sequence goes on, as the loop commits it: no rows of the idle sequence."""
    texts = np.stack([random_tokens(1, 20), random_tokens(2, 20)])
    before = trunk.prefill(texts, np.zeros(2, np.int32), new_cache(trunk.cfg, 2, KV_BLOCK))[1]
    cache, pending = trunk.verify(texts[:, :5], np.array([5, 0], np.int32), before)
    after = commit(cache, pending, jnp.array([0, 4]))
    assert_same(sequence(after, 0), sequence(before, 0))
    assert after.length.tolist() == [20, 24]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [5, 16])
def test_the_layer_passes_its_implementation_on(rows: int, dtype: str) -> None:
    """A verify window of 5 rows or a prompt of 16: kernels give what plain JAX gives, for idle sequences, too."""
    cfg = tiny_config(moe=False, num_superblocks=1, linear_k_dim=16, linear_v_dim=32)
    model = numpy_model(cfg, seed=3, scale=0.2)
    layer = nnx.merge(model.graph, model.params).decoder.blocks[0].layers[0].mixer
    graph, weights = nnx.split(layer)
    layer = nnx.merge(graph, jax.tree.map(lambda w: w[0], weights))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, rows, cfg.hidden_size)), dtype)
    cache = new_cache(cfg, 3, KV_BLOCK, dtype=x.dtype).replace(length=jnp.array([7, KV_BLOCK - 3, 0]))
    state, conv = (rng.normal(size=part.shape) for part in (cache.state, cache.conv))
    cache = cache.replace(state=jnp.asarray(state, jnp.float32), conv=jnp.asarray(conv, dtype))
    pending = new_pending(cache, rows) if rows == 5 else None

    def run(implementation: str) -> list[jax.Array]:
        positions = make_positions(
            cfg, cache.length, rows, jnp.array([0, 0, rows]), kv_len=KV_BLOCK, implementation=implementation
        )

        def call(x: jax.Array, cache: Cache) -> Any:
            return layer(x, cache, pending, 0, positions)

        assert ("pallas_call" in str(jax.make_jaxpr(call)(x, cache))) == (implementation == "triton")
        return jax.tree.leaves(jax.jit(call)(x, cache))

    for got, want in zip(run("triton"), run("xla"), strict=True):
        assert_close(got, np.asarray(want, np.float64), dtype)
