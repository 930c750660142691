"""The tree of common beginnings against a comparison of every pair of prompts."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpjax.engine import prefix_tree
from mtpjax.engine.prefix_tree import Beginning, PrefixTree, beginnings, border_below
from mtpjax.engine.prompt_chunks import GRID

pytestmark = pytest.mark.fast


@st.composite
def rows_of_prompts(draw: st.DrawFn) -> list[list[int]]:
    """Prompts of some blocks out of two, and a few tokens behind them."""
    prompts = []
    for _ in range(draw(st.integers(1, 6))):
        blocks = draw(st.lists(st.integers(0, 1), max_size=4))
        rest = draw(st.lists(st.integers(0, 1), max_size=3))
        prompts.append([t for block in blocks for t in [block] * GRID] + rest)
    return prompts


def shared(a: list[int], b: list[int]) -> tuple[int, bool]:
    """Return the longest beginning that two sequences can share, and whether it is all of both; (0, False) for none."""
    if a == b and len(a) >= GRID:
        return len(a), True
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return border_below(common), False


def tree_of(prompts: list[list[int]]) -> PrefixTree:
    tree = PrefixTree()
    tree.add(enumerate(prompts))
    return tree


@given(rows_of_prompts())
@settings(max_examples=60)
def test_equal_keys_are_equal_tokens(prompts: list[list[int]]) -> None:
    found: dict[bytes, tuple[list[int], bool]] = {}
    for rows in prompts:
        path = beginnings(rows)
        assert [b.length for b in path] == sorted(b.length for b in path)
        assert [b.length for b in path if not b.is_whole] == list(range(GRID, max(len(rows), 1), GRID))
        assert [b.length for b in path if b.is_whole] == [len(rows)] * (len(rows) >= GRID)
        for b in path:  # a border also knows the token after it
            tokens = rows[: b.length + (not b.is_whole)]
            assert found.setdefault(b.key, (tokens, b.is_whole)) == (tokens, b.is_whole)
    assert len({(tuple(tokens), whole) for tokens, whole in found.values()}) == len(found)


@given(rows_of_prompts())
@settings(max_examples=60)
def test_branches_are_where_two_prompts_part(prompts: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "MIN_SAVED_TOKENS", 0)
        tree = tree_of(prompts)
        for i, rows in enumerate(prompts):
            want = {shared(rows, other) for j, other in enumerate(prompts) if j != i} - {(0, False)}
            assert [(b.length, b.is_whole) for b in tree.branches(i)] == sorted(want)


@given(rows_of_prompts())
@settings(max_examples=60)
def test_reading_branches_once_reads_no_more_tokens(prompts: list[list[int]]) -> None:
    tree, read, num_read = tree_of(prompts), set[bytes](), 0
    for i, rows in enumerate(prompts):
        last = 0
        for branch in tree.branches(i):
            num_read += 0 if branch.key in read else branch.length - last
            read.add(branch.key)
            last = branch.length
        num_read += len(rows) - last
    assert num_read <= sum(map(len, prompts))
    if read:
        assert num_read <= sum(map(len, prompts)) - prefix_tree.MIN_SAVED_TOKENS


@given(rows_of_prompts())
@settings(max_examples=30)
def test_requests_that_are_gone_do_not_count(prompts: list[list[int]]) -> None:
    tree = tree_of(prompts)
    tree.add([(0, [1] * 300)])  # is there already
    tree.remove([0, 0, 99])
    rest = tree_of(prompts)
    rest.remove([0])
    alone = PrefixTree()
    alone.add((i, rows) for i, rows in enumerate(prompts) if i)
    for i in range(1, len(prompts)):
        assert tree.branches(i) == rest.branches(i) == alone.branches(i)
    assert tree.branches(0) == []
    kept = tree_of(prompts)
    kept.retain(range(1, len(prompts)))
    assert 0 not in kept and all(kept.branches(i) == alone.branches(i) for i in range(1, len(prompts)))
    tree.remove(range(len(prompts)))
    assert all(tree.count(b.key) == 0 for rows in prompts for b in beginnings(rows))


def test_a_tree_of_three_levels() -> None:
    """A root of 640 tokens, two branches of 320 more, two prompts on each: parents stand before children."""
    root, prompts = [5] * 640, list[list[int]]()
    for a in range(2):
        prompts += [[*root, *[a] * 320, 7, b] for b in range(2)]
    tree = tree_of(prompts)
    lengths = [[b.length for b in tree.branches(i)] for i in range(4)]
    assert lengths == [[576, 960]] * 4  # the tokens after the root differ, so it is shared up to the border before
    paths = [tree.branches(i) for i in range(4)]
    assert paths[0][0] == paths[3][0] and paths[0][1] == paths[1][1] != paths[2][1]
    assert all(isinstance(b, Beginning) and a.length < b.length for path in paths for a, b in pairwise(path))
