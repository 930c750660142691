"""Prompts are cut into few lengths, lose no token, and end together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpjax.engine.prompt_chunks import plan_chunks, split_prompts, usable_buckets

pytestmark = pytest.mark.fast

BUCKETS = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(st.integers(0, 500), BUCKETS)
def test_a_plan_covers_the_rows_with_the_least_padding(num_rows: int, buckets: list[int]) -> None:
    plan = plan_chunks(num_rows, buckets)
    assert set(plan) <= set(buckets) and plan[1:] == [max(buckets)] * len(plan[1:])
    padding = sum(plan) - num_rows
    assert padding >= 0
    if plan:  # no smaller first chunk covers the rows, and every chunk has a row that is no padding
        assert padding < plan[0]
        assert all(sum(plan) - plan[0] + bucket < num_rows for bucket in buckets if bucket < plan[0])
    else:
        assert num_rows == 0


def test_plans_of_the_largest_bucket_and_a_remainder() -> None:
    assert plan_chunks(0, (16, 64)) == []
    assert plan_chunks(1, (16, 64)) == [16]
    assert plan_chunks(17, (16, 64)) == [64]
    assert plan_chunks(128, (64, 16)) == [64, 64]
    assert plan_chunks(130, (64, 16)) == [16, 64, 64]


@given(BUCKETS, st.integers(2, 50))
def test_usable_buckets_are_shorter_than_a_sequence(buckets: list[int], max_model_len: int) -> None:
    usable = usable_buckets(buckets, max_model_len)
    assert usable and set(usable) <= set(buckets) and list(usable) == sorted(set(usable))
    if min(buckets) < max_model_len:
        assert set(usable) == {b for b in buckets if b < max_model_len}
    else:
        assert usable == (min(buckets),)


@given(st.lists(st.lists(st.integers(1, 99), max_size=30), min_size=1, max_size=4), BUCKETS)
def test_chunks_hold_every_token_and_the_one_after_it(prompts: list[list[int]], buckets: list[int]) -> None:
    chunks = list(split_prompts(prompts, buckets))
    lengths = [chunk.tokens.shape[1] for chunk in chunks]
    assert lengths == plan_chunks(max(map(len, prompts)), buckets)
    assert [chunk.num_rows_after for chunk in chunks] == [sum(lengths[i + 1 :]) for i in range(len(lengths))]
    for chunk in chunks:
        assert chunk.tokens.dtype == chunk.next_tokens.dtype == chunk.pad.dtype == np.int32
        assert chunk.tokens.shape == chunk.next_tokens.shape and chunk.pad.shape == (len(prompts),)
    for i, prompt in enumerate(prompts):
        tokens = [token for chunk in chunks for token in chunk.tokens[i, chunk.pad[i] :].tolist()]
        next_tokens = [token for chunk in chunks for token in chunk.next_tokens[i, chunk.pad[i] :].tolist()]
        assert tokens == prompt and next_tokens == (prompt[1:] + [0] if prompt else [])
        in_front = [chunk.pad[i] for chunk in chunks if chunk.pad[i]]
        assert in_front[:-1] == lengths[: max(len(in_front) - 1, 0)]  # no padding behind a token
