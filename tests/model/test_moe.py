"""Routed experts against all experts on all rows, and the plan of blocks."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.grouped_matmul import expert_mlp
from kernels_pallas.grouped_matmul.api import ALL_EXPERTS_ROWS
from kernels_pallas.grouped_matmul.plan import choose_block, choose_windows, plan_blocks, plan_windows, window_places
from kernels_pallas.matmul import embedding_lookup, linear
from kernels_pallas.weights.transposed import FusedExperts, TransposedWeight
from mtpjax.model import Expert
from mtpjax.model.params import ONLY_LAYER
from tests.helpers.models import cpu_only, numpy_model, tiny_config

EXPERTS, CHOSEN, HIDDEN, SIZE, LAYERS = 8, 3, 24, 16, 2
ROWS = (1, 2, 3, 4, 5, 8, 17, 64, 65, 257)


@cache
def weights() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    up = rng.normal(size=(LAYERS, EXPERTS, 2 * SIZE, HIDDEN)) / np.sqrt(HIDDEN)
    down = rng.normal(size=(LAYERS, EXPERTS, HIDDEN, SIZE)) / np.sqrt(SIZE)
    return up.astype(np.float32), down.astype(np.float32)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def dense(x: np.ndarray, layer: int, chosen: np.ndarray, share: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Every expert on every row in float64, then the chosen ones weighed and summed."""
    up, down = (w[layer].astype(np.float64) for w in weights())
    gate, linear = np.split(np.einsum("nd,ehd->neh", x, up), 2, axis=-1)
    each = np.einsum("neh,edh->ned", silu(gate) * linear, down)
    picked = np.take_along_axis(each, chosen[..., None], axis=1)
    return (picked * share[..., None]).sum(1) * live[:, None]


def route(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, K distinct experts for each, and their weights."""
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((rows, EXPERTS)), axis=1)[:, :CHOSEN].astype(np.int32)
    share = rng.dirichlet(np.ones(CHOSEN), rows).astype(np.float32)
    return rng.normal(size=(rows, HIDDEN)).astype(np.float32), chosen, share


routed = jax.jit(expert_mlp)


def check(x: np.ndarray, chosen: np.ndarray, share: np.ndarray, live: np.ndarray, layer: int = 1) -> np.ndarray:
    got = np.asarray(routed(x, *weights(), np.int32(layer), chosen, share, live))
    worst = float(np.abs(got - dense(x, layer, chosen, share, live)).max())
    assert worst <= 5e-6
    return got


@pytest.mark.parametrize("rows", ROWS)
def test_experts_against_every_expert_on_every_row(rows):
    x, chosen, share = route(rows)
    for layer in range(LAYERS):
        check(x, chosen, share, np.ones(rows, bool), layer)


@pytest.mark.parametrize("rows", [5, 64, 257])
def test_uneven_routing_drops_no_row(rows):
    """Far beyond any capacity that an even share would give; some experts have no row, some have one."""
    x, chosen, share = route(rows)
    everywhere = np.ones(rows, bool)
    for first in (0, 5):
        check(x, np.broadcast_to(first + np.arange(CHOSEN, dtype=np.int32), chosen.shape), share, everywhere)
    one = np.where(np.arange(CHOSEN) == 0, 7, np.array([0, 1, 2])).astype(np.int32)  # expert 7 gets every row
    check(x, np.broadcast_to(one, chosen.shape), share, everywhere)
    lonely = np.broadcast_to(np.array([1, 2, 3], np.int32), chosen.shape).copy()
    lonely[-1] = (0, 4, 7)  # experts with a single row
    check(x, lonely, share, everywhere)


@pytest.mark.parametrize("rows", [5, 64, 257])
def test_dead_rows_give_zero_and_touch_no_other(rows):
    x, chosen, share = route(rows)
    live = np.random.default_rng(1).random(rows) < 0.5
    live[0], live[-1] = True, False
    got = check(x, chosen, share, live)
    assert not got[~live].any()
    poisoned = np.where(live[:, None], x, np.float32(np.nan))
    assert np.array_equal(routed(poisoned, *weights(), np.int32(1), chosen, share, live), got)
    plan = plan_blocks(jnp.asarray(chosen), jnp.asarray(live), EXPERTS, 4)
    assert plan.count == np.sum(-(-np.bincount(chosen[live].ravel(), minlength=EXPERTS) // 4))
    nobody = routed(x, *weights(), np.int32(1), chosen, share, np.zeros(rows, bool))
    assert not np.asarray(nobody).any()
    assert plan_blocks(jnp.asarray(chosen), jnp.zeros(rows, bool), EXPERTS, 4).count == 0


def abreast() -> tuple[FusedExperts, TransposedWeight]:
    up, down = weights()
    return FusedExperts(jnp.asarray(up.transpose(0, 3, 1, 2))), TransposedWeight(jnp.asarray(down.swapaxes(2, 3)))


@cpu_only
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65])
def test_experts_that_lie_abreast_give_the_same(rows):
    """By windows or all at once; a dead row is zero, and an expert that nobody chose is not heard even where it
    overflows.
    """
    x, chosen, share = route(rows)
    live = np.arange(rows) != 1
    stacks = abreast()
    got = np.asarray(routed(x, *stacks, np.int32(1), chosen, share, live))
    assert np.abs(got - dense(x, 1, chosen, share, live)).max() <= 5e-6 and (rows == 1 or not got[1].any())
    products = str(jax.make_jaxpr(expert_mlp)(x, *stacks, np.int32(1), chosen, share, live)).count("dot_general")
    loops = str(jax.make_jaxpr(expert_mlp)(x, *stacks, np.int32(1), chosen, share, live)).count("while[")
    assert (products == 2 and not loops) if rows in ALL_EXPERTS_ROWS else loops
    lonely = np.broadcast_to(np.arange(CHOSEN, dtype=np.int32), chosen.shape)
    broken = FusedExperts(stacks[0].array.at[1, :, CHOSEN:].set(np.inf))
    again = np.asarray(routed(x, broken, stacks[1], np.int32(1), lonely, share, live))
    np.testing.assert_array_equal(again, routed(x, *stacks, np.int32(1), lonely, share, live))


def test_a_row_does_not_depend_on_the_order_of_the_others():
    x, chosen, share = route(65)
    order = np.random.default_rng(2).permutation(65)
    live = np.ones(65, bool)
    a = routed(x, *weights(), np.int32(0), chosen, share, live)
    b = routed(x[order], *weights(), np.int32(0), chosen[order], share[order], live)
    assert np.array_equal(np.asarray(a)[order], b)


def test_the_whole_layer_against_its_formula():
    """Router: softmax over all experts, the best K, renormalised. The shared expert stands behind a gate of its own."""
    loaded, at = numpy_model(tiny_config(moe=True, repeats=1), seed=5), ONLY_LAYER
    layer = nnx.merge(loaded.graph, loaded.params).decoder.blocks[0].layers[0]
    graph, experts, rest = nnx.split(layer.mlp, Expert, ...)
    moe = nnx.merge(graph, experts, jax.tree.map(lambda w: w[at], rest))
    x = 2 * np.random.default_rng(6).normal(size=(2, 7, loaded.cfg.hidden_size)).astype(np.float32)
    live = np.ones((2, 7), bool)
    live[0, :3] = False
    got = jax.jit(lambda x: moe(x, at, live))(x).sum(x.dtype).reshape(x.shape)

    w = {name: np.asarray(getattr(moe, name)[...], np.float64) for name in ("router", "shared_gate", "gate_up", "down")}
    shared = {name: np.asarray(getattr(moe.shared, name)[...], np.float64) for name in ("gate", "up", "down")}
    want = np.zeros(x.shape)
    for row in np.ndindex(2, 7):
        v = x[row].astype(np.float64)
        p = np.exp(w["router"] @ v)
        best = np.argsort(-p)[: loaded.cfg.experts_per_token]
        for e in best if live[row] else ():
            gate, up = np.split(w["gate_up"][at, e] @ v, 2)
            want[row] += p[e] / p[best].sum() * (w["down"][at, e] @ (silu(gate) * up))
        plain = shared["down"] @ (silu(shared["gate"] @ v) * (shared["up"] @ v))
        want[row] += plain / (1 + np.exp(-(w["shared_gate"] @ v)))
    assert float(np.abs(got - want).max()) <= 1e-5


@cache
def planner(experts: int, block: int):
    return jax.jit(lambda chosen, live: plan_blocks(chosen, live, experts, block))


@st.composite
def routings(draw):
    """A few fixed shapes, so that few programs are compiled."""
    rows, k, experts, block = draw(
        st.sampled_from([(1, 2, 4, 1), (3, 2, 5, 2), (8, 3, 4, 4), (20, 1, 3, 4), (20, 2, 9, 8), (2, 2, 16, 1)])
    )
    chosen = [draw(st.permutations(range(experts)))[:k] for _ in range(rows)]
    live = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return np.array(chosen, np.int32), np.array(live), experts, block


@settings(max_examples=150, deadline=None, derandomize=True)
@given(routings())
def test_the_plan_of_blocks(routing):
    chosen, live, experts, block = routing
    rows, k = chosen.shape
    plan = jax.tree.map(np.asarray, planner(experts, block)(chosen, live))
    sizes = np.bincount(chosen[live].ravel(), minlength=experts)
    blocks = -(-sizes // block)
    places = len(plan.source)

    assert plan.count == blocks.sum() and plan.count * block <= places == len(plan.expert) * block
    assert np.array_equal(np.bincount(plan.expert[: plan.count], minlength=experts), blocks)
    assert (plan.expert >= 0).all() and (plan.expert < experts).all()  # blocks out of use too: they may be prefetched

    alive = plan.place[live].ravel()
    assert len(set(alive.tolist())) == len(alive) and (alive < plan.count * block).all()  # everyone has a place, alone
    assert (plan.place[~live] == places).all()  # and dead rows have none
    assert np.array_equal(plan.expert[alive // block], chosen[live].ravel())  # in a block of its own expert
    assignments = np.arange(rows * k).reshape(rows, k)
    assert np.array_equal(plan.source[alive], assignments[live].ravel())
    empty = np.ones(places, bool)
    empty[alive] = False
    assert (plan.source[empty] == rows * k).all()
    for e in range(experts):  # an expert's rows in their own order: the layout is a function of the routing alone
        assert (np.diff(plan.place[live][chosen[live] == e]) > 0).all()


def test_the_size_of_a_block_follows_the_mean_run():
    assert choose_block(1, 8, 256) == 1
    for rows in range(1, 5000, 37):
        block, mean = choose_block(rows, 8, 256), rows * 8 / 256
        assert block in (1, 2, 4, 8, 16, 32, 64) and (block >= mean or block == 64) and (block == 1 or block < 2 * mean)


@cache
def window_planner(experts: int, sizes: tuple[int, ...]):
    return jax.jit(lambda chosen, live: plan_windows(chosen, live, experts, sizes))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from([(20, 1, 3), (20, 2, 9), (40, 2, 3), (1, 2, 4)]),
    st.sampled_from([(1,), (4,), (2, 4, 6), (4, 8)]),
    st.data(),
)
def test_the_plan_of_windows(shape, sizes, data):
    rows, k, experts = shape
    favourites = data.draw(st.permutations(range(experts)))  # so that some runs are longer than any window
    chosen = np.array([data.draw(st.sampled_from([favourites, favourites[::-1]]))[:k] for _ in range(rows)], np.int32)
    live = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    plan = jax.tree.map(np.asarray, window_planner(experts, sizes)(chosen, live))
    runs = np.bincount(chosen[live].ravel(), minlength=experts)
    places = window_places(rows * k, experts, sizes)
    assert len(plan.source) == places

    step, longest = sizes[0], sizes[-1]
    owner = np.full(places, -1)
    for c, size in enumerate(sizes):
        for w in range(plan.first[c], plan.first[c + 1]):
            span = slice(plan.start[w], plan.start[w] + size)
            assert plan.start[w] + size <= places and (owner[span] == -1).all()  # within the layout, and no two overlap
            owner[span] = plan.expert[w]
        rest = -(-(runs % longest) // step) * step == size
        full = runs // longest if size == longest else 0
        used = plan.expert[plan.first[c] : plan.first[c + 1]]
        assert np.array_equal(np.bincount(used, minlength=experts), rest + full)
    assert np.array_equal(owner[plan.place[live]], chosen[live])  # everyone in a window of the expert it chose
    assert (plan.place[~live] == places).all()
    alive = plan.place[live].ravel()
    assert len(set(alive.tolist())) == len(alive)
    assert np.array_equal(plan.source[alive], np.arange(rows * k).reshape(rows, k)[live].ravel())
    assert (np.delete(plan.source, alive) == rows * k).all()


def test_the_sizes_of_windows_follow_the_mean_run():
    assert choose_windows(1, 8, 256) == (1,) and choose_windows(256, 8, 256) == (8,)
    assert choose_windows(512, 8, 64) == (16, 32, 48, 64, 80, 96, 112, 128)
    assert choose_windows(2048, 8, 64) == (64, 128, 192, 256, 320, 384, 448, 512)
    for rows in range(300, 5000, 37):
        sizes, mean = choose_windows(rows, 8, 256), rows * 8 / 256
        assert sizes == (8,) or (sizes[0] >= 16 and sizes[-1] >= min(2 * mean, 512) and len(sizes) <= 8)


@cpu_only
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_a_window_of_any_size(dtype):
    """So a prompt's keys, values and states do not depend on what else is read beside it."""
    rng = np.random.default_rng(3)
    for outputs, inputs in ((512, 1024), (1024, 256), (384, 192), (192, 96)):
        w, x = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((outputs, inputs), (512, inputs)))
        of = jax.jit(linear)
        want = of(x, w)
        for rows in (16, 32, 48, 64, 96, 128, 192, 320, 448):
            assert jnp.array_equal(of(x[:rows], w), want[:rows]), (outputs, inputs, rows)


@cpu_only
def test_embedding_rows_are_read_as_bits_and_have_their_gradient():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(640, 32)), jnp.bfloat16)
    ids = jnp.array([[3, 3, 639], [0, 5, 3]])
    take = jax.jit(lambda w: embedding_lookup(w, ids, jnp.bfloat16))
    assert jnp.array_equal(take(w), w[ids])
    assert "f32[640,32]" not in take.lower(w).compile().as_text()  # converted whole, once a call
    share = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 32)), jnp.bfloat16)
    got, want = (
        jax.grad(lambda w, f=f: jnp.sum(f(w) * share).astype(jnp.float32))(w) for f in (take, lambda w: w[ids])
    )
    assert jnp.array_equal(got, want) and got[3].any()
