"""Where the rows of an expert stand: blocks of one size for kernels, windows of several sizes for loops."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.grouped_matmul import triton_plan
from kernels_pallas.grouped_matmul.plan import (
    Blocks,
    align_blocks,
    align_windows,
    choose_block_size,
    choose_kernel_block,
    choose_window_sizes,
    drop_invalid,
    moe_align_block_size,
    num_block_slots,
    num_places,
)
from kernels_pallas.platform import interpret_kernels

pytestmark = pytest.mark.fast


@cache
def jitted(align: Callable[..., Any], num_experts: int, sizes: Any) -> Callable[..., Any]:
    return jax.jit(lambda topk_ids, valid: align(drop_invalid(topk_ids, valid, num_experts), num_experts, sizes))


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Draw experts of rows, valid rows, the number of experts, and a block size: few shapes, so few compilations."""
    rows, k, experts, block_size = draw(
        st.sampled_from([(1, 2, 4, 1), (3, 2, 5, 2), (8, 3, 4, 4), (20, 1, 3, 4), (20, 2, 9, 8), (2, 2, 16, 1)])
    )
    topk_ids = [draw(st.permutations(range(experts)))[:k] for _ in range(rows)]
    valid = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return np.array(topk_ids, np.int32), np.array(valid), experts, block_size


@settings(max_examples=150, deadline=None, derandomize=True)
@given(routings())
def test_blocks(routing: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    topk_ids, valid, experts, block_size = routing
    rows, k = topk_ids.shape
    layout = jax.tree.map(np.asarray, jitted(moe_align_block_size, experts, block_size)(topk_ids, valid))
    blocks = -(-np.bincount(topk_ids[valid].ravel(), minlength=experts) // block_size)
    places = len(layout.sorted_token_ids)

    assert layout.num_blocks == blocks.sum()
    assert layout.num_blocks * block_size <= places == len(layout.expert_ids) * block_size
    assert np.array_equal(np.bincount(layout.expert_ids[: layout.num_blocks], minlength=experts), blocks)
    # Blocks out of use too name an expert that exists: they may be prefetched.
    assert (layout.expert_ids >= 0).all() and (layout.expert_ids < experts).all()

    used = layout.inverse_order[valid].ravel()
    assert len(set(used.tolist())) == len(used) and (used < layout.num_blocks * block_size).all()  # one place each
    assert (layout.inverse_order[~valid] == places).all()  # and none without an expert
    assert np.array_equal(layout.expert_ids[used // block_size], topk_ids[valid].ravel())
    assignments = np.arange(rows * k).reshape(rows, k)
    assert np.array_equal(layout.sorted_token_ids[used], assignments[valid].ravel())
    assert (np.delete(layout.sorted_token_ids, used) == rows * k).all()
    for e in range(experts):  # an expert's rows in their own order: the layout is a function of the routing alone
        assert (np.diff(layout.inverse_order[valid][topk_ids[valid] == e]) > 0).all()


def align_by_kernel(topk_ids: jax.Array, num_experts: int, block_size: int) -> Blocks:
    return triton_plan.align_blocks(topk_ids, num_experts, block_size, interpret=interpret_kernels())


def check_blocks(blocks: Blocks, topk_ids: np.ndarray, experts: int, block_size: int) -> None:
    """Each assignment of a valid row has one place, in a block of its expert, in the order of the assignments."""
    expert_ids, places = np.asarray(blocks.expert_ids), np.asarray(blocks.sorted_token_ids).reshape(-1, block_size)
    assert len(expert_ids) == len(places) == num_block_slots(topk_ids.size, experts, block_size)
    assert ((expert_ids >= 0) & (expert_ids <= experts)).all()  # a kernel skips the last number
    flat = topk_ids.ravel()
    for e in range(experts):
        (in_use,) = np.nonzero(expert_ids == e)
        run = np.flatnonzero(flat == e)
        assert len(in_use) == -(-len(run) // block_size)
        assert np.array_equal(in_use, in_use[:1] + np.arange(len(in_use)) if len(in_use) else in_use)
        padded = np.full(len(in_use) * block_size, flat.size)
        padded[: len(run)] = run
        assert np.array_equal(places[in_use].ravel(), padded)


@pytest.mark.parametrize("align", [align_blocks, align_by_kernel], ids=["xla", "triton"])
class TestAlignBlocks:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(routings())
    def test_any_routing(self, align: Callable[..., Blocks], routing: tuple[np.ndarray, np.ndarray, int, int]) -> None:
        topk_ids, valid, experts, block_size = routing
        check_blocks(
            jitted(align, experts, block_size)(topk_ids, valid),
            np.where(valid[:, None], topk_ids, experts),
            experts,
            block_size,
        )

    @pytest.mark.parametrize("rows", [1, 7, 33, 64, 257, 320])
    @pytest.mark.parametrize("block_size", [8, 16, 128])
    def test_many_rows(self, align: Callable[..., Blocks], rows: int, block_size: int) -> None:
        """Of 64 experts, six for a row: at random, all rows on the same, or all on the last, with invalid rows."""
        experts, rng = 64, np.random.default_rng(rows)
        chosen = np.argsort(rng.random((rows, experts)), axis=1)[:, :6].astype(np.int32)
        for topk_ids in (chosen, np.broadcast_to(np.array([5, 63, 0, 1, 2, 3], np.int32), chosen.shape)):
            for valid in (np.ones(rows, bool), rng.random(rows) < 0.7, np.zeros(rows, bool)):
                blocks = jitted(align, experts, block_size)(topk_ids, valid)
                check_blocks(blocks, np.where(valid[:, None], topk_ids, experts), experts, block_size)

    def test_all_assignments_on_one_expert(self, align: Callable[..., Blocks]) -> None:
        for expert in (0, 3, 7):
            topk_ids = np.full((1300, 1), expert, np.int32)
            check_blocks(jitted(align, 8, 16)(topk_ids, np.ones(1300, bool)), topk_ids, 8, 16)


def test_the_size_of_a_block_follows_the_mean_run() -> None:
    assert choose_block_size(1, 8, 256) == 1
    for rows in range(1, 5000, 37):
        block, mean = choose_block_size(rows, 8, 256), rows * 8 / 256
        assert block in (1, 2, 4, 8, 16, 32, 64) and (block >= mean or block == 64) and (block == 1 or block < 2 * mean)


def test_a_block_of_a_kernel_holds_the_mean_run_or_nearly_every_run() -> None:
    def sizes(rows: int) -> list[int]:
        return [choose_kernel_block(rows, 8, 256, sure=sure) for sure in (False, True)]

    assert [sizes(rows) for rows in (1, 64, 512, 2048)] == [[1, 1], [2, 8], [16, 32], [64, 128]]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from([(20, 1, 3), (20, 2, 9), (40, 2, 3), (1, 2, 4)]),
    st.sampled_from([(1,), (4,), (2, 4, 6), (4, 8)]),
    st.data(),
)
def test_windows(shape: tuple[int, int, int], sizes: tuple[int, ...], data: st.DataObject) -> None:
    rows, k, experts = shape
    favourites = data.draw(st.permutations(range(experts)))  # so that some runs are longer than any window
    topk_ids = np.array([data.draw(st.sampled_from([favourites, favourites[::-1]]))[:k] for _ in range(rows)], np.int32)
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    layout = jax.tree.map(np.asarray, jitted(align_windows, experts, sizes)(topk_ids, valid))
    runs = np.bincount(topk_ids[valid].ravel(), minlength=experts)
    places = num_places(rows * k, experts, sizes)
    assert len(layout.sorted_token_ids) == places

    step, longest = sizes[0], sizes[-1]
    owner = np.full(places, -1)
    for number, size in enumerate(sizes):
        for window in range(layout.first[number], layout.first[number + 1]):
            start = layout.starts[window]
            assert start + size <= places and (owner[start : start + size] == -1).all()  # no two windows overlap
            owner[start : start + size] = layout.expert_ids[window]
        rest = -(-(runs % longest) // step) * step == size
        whole = runs // longest if size == longest else 0
        used = layout.expert_ids[layout.first[number] : layout.first[number + 1]]
        assert np.array_equal(np.bincount(used, minlength=experts), rest + whole)
    assert np.array_equal(owner[layout.inverse_order[valid]], topk_ids[valid])
    assert (layout.inverse_order[~valid] == places).all()
    used = layout.inverse_order[valid].ravel()
    assert len(set(used.tolist())) == len(used)
    assert np.array_equal(layout.sorted_token_ids[used], np.arange(rows * k).reshape(rows, k)[valid].ravel())
    assert (np.delete(layout.sorted_token_ids, used) == rows * k).all()


def test_the_sizes_of_windows_follow_the_mean_run() -> None:
    assert choose_window_sizes(1, 8, 256) == (1,) and choose_window_sizes(256, 8, 256) == (8,)
    assert choose_window_sizes(512, 8, 64) == (16, 32, 48, 64, 80, 96, 112, 128)
    assert choose_window_sizes(2048, 8, 64) == (64, 128, 192, 256, 320, 384, 448, 512)
    for rows in range(300, 5000, 37):
        sizes, mean = choose_window_sizes(rows, 8, 256), rows * 8 / 256
        assert sizes == (8,) or (sizes[0] >= 16 and sizes[-1] >= min(2 * mean, 512) and len(sizes) <= 8)


def test_no_row_has_an_expert() -> None:
    layout = jitted(moe_align_block_size, 4, 4)(jnp.zeros((3, 2), jnp.int32), np.zeros(3, bool))
    assert layout.num_blocks == 0
