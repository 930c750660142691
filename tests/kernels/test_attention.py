"""The kernels of attention in interpret mode, and that by which rows enter it: against the plain path, and bit for bit."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.attention import AttentionKernels, Entering, api, pick
from kernels_pallas.attention.triton import attend_cache
from kernels_pallas.attention.triton_qkv import enter_cache
from kernels_pallas.platform import platform
from mtpjax.config import FULL
from mtpjax.model import attention, place
from mtpjax.model.attention import attend
from tests.helpers.models import numpy_model, tiny_config
from tests.kernels.test_packed_matmul import BOUNDS, assert_close

SLOTS, ROWS, HEAD = 256, 6, 16
enter = jax.jit(partial(enter_cache, interpret=True), static_argnames=("eps", "dtype"))
KERNELS = AttentionKernels(partial(enter_cache, interpret=True), partial(attend_cache, interpret=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [ROWS, 2, 0])
def test_the_model_attends_through_the_kernels(keep: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of all rows, of the last ones and of none; padding, an idle sequence, and rows behind the end of the cache."""
    cfg = tiny_config(
        moe=False, head_dim=HEAD, rotary_dim=4, q_heads=4, kv_heads=2, layer_pattern=(FULL,), num_layers=1
    )
    model = numpy_model(cfg, seed=3, scale=0.3)
    graph, weights = nnx.split(nnx.merge(model.graph, model.params).decoder.blocks[0].layers[0].mixer)
    layer = nnx.merge(graph, jax.tree.map(lambda w: w[0], weights))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, ROWS, cfg.hidden_size)), dtype)
    cache = tuple(jnp.asarray(rng.normal(size=(2, 3, 2, SLOTS, HEAD)), dtype) for _ in range(2))
    where = place(cfg, jnp.array([40, SLOTS - 3, 0]), ROWS, jnp.array([0, 1, ROWS]), slots=SLOTS)

    run = jax.jit(lambda x, cache, number: layer(x, cache, number, where, keep))
    plain, asked = run(x, cache, 1), []
    jax.clear_caches()
    monkeypatch.setattr(attention, "pick", lambda *about: asked.append(about) or KERNELS)
    got = jax.jit(lambda x, cache, number: layer(x, cache, number, where, keep))(x, cache, 1)
    assert asked == [(platform(), HEAD, SLOTS)] and got[0].shape == (1, 3 * keep, cfg.hidden_size)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
        if one.size:
            assert_close(one, np.asarray(other, np.float64), dtype)
    for after, before in zip(got[1], cache, strict=True):
        changed = (np.asarray(after) != np.asarray(before)).any(axis=(2, 4))  # [layer, sequence, slot]
        want = np.zeros_like(changed)
        want[1, 0, 40 : 40 + ROWS] = want[1, 1, SLOTS - 3 :] = True
        assert (changed == want).all()


def rows_of(dtype: str) -> tuple[Any, ...]:
    """Five rows of three sequences; keys in four parts."""
    rng = np.random.default_rng(0)
    parts = (rng.normal(size=(n, 15, heads * HEAD)).astype(dtype) for n, heads in ((4, 2), (1, 2), (1, 8)))
    norms, angles = (rng.normal(size=HEAD).astype(dtype) for _ in range(2)), rng.normal(size=(3, 5, 3))
    cache = tuple(jnp.asarray(rng.normal(size=(1, 3, 2, 64, HEAD)), dtype) for _ in range(2))
    where = np.arange(5)[None] + np.array([[3], [20], [40]]), np.ones((3, 5), bool)
    turn = np.cos(angles).astype("float32"), np.sin(angles).astype("float32")
    return Entering(*parts), *norms, *turn, cache, 0, *where


def test_a_row_is_invariant_to_the_batch_bit_for_bit() -> None:
    rows, k_norm, q_norm, cos, sin, cache, layer, positions, live = rows_of("float32")
    q, (k, v) = enter(*rows_of("float32"), eps=1e-6, dtype="float32")
    only = np.s_[1:2, 2:4]

    def cut(part: np.ndarray) -> np.ndarray:
        return part.reshape(len(part), 3, 5, -1)[:, 1, 2:4]

    some = tuple(part[:, 1:2] for part in cache)
    alone, (keys, values) = enter(
        Entering(*map(cut, rows)), k_norm, q_norm, cos[only], sin[only], some, layer, positions[only], live[only],
        eps=1e-6, dtype="float32",
    )  # fmt: skip
    assert (np.asarray(alone) == np.asarray(q[only])).all()
    for one, whole in ((keys, k), (values, v)):
        assert (np.asarray(one)[:, :, :, 22:24] == np.asarray(whole)[:, 1:2, :, 22:24]).all()


def test_dead_rows_leave_the_cache_alone() -> None:
    *args, positions, live = rows_of("float32")
    live[1], live[0, :2] = False, False
    _, after = enter(*args, positions, live, eps=1e-6, dtype="float32")
    for now, before in zip(after, args[5], strict=True):
        assert (np.asarray(now[0, 1]) == np.asarray(before[0, 1])).all()
        moved = (np.asarray(now[0, 0]) != np.asarray(before[0, 0])).any(axis=(0, 2))
        assert moved.nonzero()[0].tolist() == [5, 6, 7]


def test_which_caches_they_take() -> None:
    assert pick("cuda", 256, 512) is api.KERNELS["cuda"] and pick("cpu", 256, 512) is None
    assert pick("cuda", 24, 512) is None and pick("cuda", 256, 500) is None


def attended(rows: int, dtype: str, slots: int = 1280, head: int = 32) -> tuple[Any, Any, Any]:
    """The kernels, the loop of `mtpjax.model.attention` and the gates, and what went in: one long, one short and one idle
    sequence."""
    rng = np.random.default_rng(rows)
    cfg = tiny_config(moe=False, head_dim=head, q_heads=8)
    cache = tuple(jnp.asarray(rng.normal(size=(2, 3, 2, slots, head)), dtype) for _ in range(2))
    where = place(cfg, jnp.array([1200, 100, 0]), rows, jnp.array([0, rows // 2, rows]), slots=slots)
    q = jnp.asarray(rng.normal(size=(3, rows, 8, head)), dtype)
    scaled = (q.astype(jnp.float32) * head**-0.5).astype(q.dtype)
    gates = jnp.asarray(rng.normal(size=(1 if dtype == "bfloat16" else 2, 3 * rows, 8 * 2 * head)), dtype)
    open_ = jax.nn.sigmoid(jnp.sum(gates, axis=0).astype(jnp.float32).reshape(3, rows, 8, 2, head)[..., 1, :])
    args = (scaled, *cache, 1, where.positions, where.live, gates)
    return run(*args), (attend(q, cache, 1, where).astype(jnp.float32) * open_).astype(dtype), args


run = jax.jit(partial(attend_cache, interpret=True))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_attention_is_that_of_the_loop(rows: int, dtype: str) -> None:
    got, want, _ = attended(rows, dtype)
    assert_close(got, np.asarray(want, np.float64), dtype)
    assert not np.asarray(got[2]).any()  # nobody lives there


@pytest.mark.parametrize("dtype", BOUNDS)
def test_attention_is_invariant_to_the_batch_bit_for_bit(dtype: str) -> None:
    """A row of a window of five alone in its window, and without the other sequences."""
    got, _, (q, keys, values, layer, positions, live, gates) = attended(5, dtype)
    each = gates.reshape(len(gates), 3, 5, -1)
    for row in (0, 4):
        only = np.s_[:, row : row + 1]
        its = each[:, :, row]
        alone = run(q[only], keys, values, layer, positions[only], live[only], its)
        assert (np.asarray(alone) == np.asarray(got[only])).all()
    first = run(q[:1], keys[:, :1], values[:, :1], layer, positions[:1], live[:1], each[:, 0])
    assert (np.asarray(first) == np.asarray(got[:1])).all()


def test_attention_says_which_heads_it_takes() -> None:
    cache = jnp.zeros((1, 1, 1, 64, 24))
    with pytest.raises(ValueError, match="head size 24 must be a power of two"):
        where = jnp.zeros((1, 1), int), jnp.ones((1, 1), bool)
        attend_cache(jnp.zeros((1, 1, 2, 24)), cache, cache, 0, *where, jnp.zeros((1, 1, 96)))
