"""Prompts are cut into few lengths, at multiples of `GRID` rows of each prompt, lose no token, and end together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtpjax.engine.prompt_chunks import (
    GRID,
    join_rows,
    mtp_rows_of_chunks,
    plan_chunks,
    split_prompts,
    usable_buckets,
)

pytestmark = pytest.mark.fast

ODD_BUCKETS = st.lists(st.integers(1, 40), min_size=1, max_size=4)
WHOLE_BUCKETS = st.lists(st.integers(1, 4).map(lambda n: n * GRID), min_size=1, max_size=3)
BUCKETS = ODD_BUCKETS | st.builds(list.__add__, WHOLE_BUCKETS, st.lists(st.integers(1, 150), max_size=2))
LENGTHS = st.lists(st.integers(0, 700), min_size=1, max_size=4)


@given(LENGTHS, BUCKETS)
def test_a_plan_covers_the_rows(lengths: list[int], buckets: list[int]) -> None:
    plan, longest = plan_chunks(lengths, buckets), max(lengths)
    assert set(plan) <= set(buckets) and sum(plan) >= longest and bool(plan) == bool(longest)
    if 0 < longest <= max(buckets):
        assert plan == [min(b for b in buckets if b >= longest)]
    elif any(b % GRID == 0 for b in buckets):
        assert all(chunk % GRID == 0 for chunk in plan[:-1])


def test_plans_with_the_default_buckets() -> None:
    def plan(*lengths: int) -> list[int]:
        return plan_chunks(lengths, (16, 64, 256, 512))

    assert plan(0) == [] and plan(1) == [16] and plan(17) == [64] and plan(300) == [512]
    assert plan(512) == [512] and plan(1024) == [512, 512]
    assert plan(520) == [512, 16]  # 8 rows are left
    assert plan(520, 12) == [512, 16]
    assert plan(520, 30) == [64, 512]  # the 30 rows do not fit into a last chunk of 16
    assert plan(530) == [64, 512]
    assert plan(2047) == [512, 512, 512, 512]


@given(BUCKETS, st.integers(2, 50))
def test_usable_buckets_are_shorter_than_a_sequence(buckets: list[int], max_model_len: int) -> None:
    usable = usable_buckets(buckets, max_model_len)
    assert usable and set(usable) <= set(buckets) and list(usable) == sorted(set(usable))
    if min(buckets) < max_model_len:
        assert set(usable) == {b for b in buckets if b < max_model_len}
    else:
        assert usable == (min(buckets),)


@given(LENGTHS, BUCKETS, st.integers(0, 99))
def test_chunks_hold_every_token_and_the_one_after_it(lengths: list[int], buckets: list[int], following: int) -> None:
    prompts = [[1 + (7 * b + t) % 90 for t in range(n)] for b, n in enumerate(lengths)]
    chunks = list(split_prompts(prompts, buckets, [following] * len(prompts)))
    assert [chunk.tokens.shape[1] for chunk in chunks] == plan_chunks(lengths, buckets)
    for chunk in chunks:
        assert chunk.tokens.dtype == chunk.next_tokens.dtype == chunk.pad.dtype == np.int32
        assert chunk.tokens.shape == chunk.next_tokens.shape and chunk.pad.shape == (len(prompts),)
    for i, prompt in enumerate(prompts):
        parts = [chunk.tokens[i, chunk.pad[i] :].tolist() for chunk in chunks]
        assert [token for part in parts for token in part] == prompt
        next_tokens = [token for chunk in chunks for token in chunk.next_tokens[i, chunk.pad[i] :].tolist()]
        assert next_tokens == (prompt[1:] + [following] if prompt else [])
        if prompt:
            assert parts[-1]  # the hidden state of the last row is taken from the last chunk
        if len(parts) > 1 and any(b % GRID == 0 for b in buckets):
            assert all(len(part) % GRID == 0 for part in parts[:-1])
    if chunks:
        joined = join_rows(chunks, [chunk.tokens for chunk in chunks])
        assert all(joined[i, joined.shape[1] - n :].tolist() == prompts[i] for i, n in enumerate(lengths))


@given(LENGTHS, BUCKETS, st.integers(1, 300))
def test_the_mtp_head_reads_enough_rows_without_a_gap(lengths: list[int], buckets: list[int], wanted: int) -> None:
    chunks = list(split_prompts([[1] * n for n in lengths], buckets))
    read = mtp_rows_of_chunks(chunks, wanted)
    for i, length in enumerate(lengths):
        is_read = [
            t >= chunk.tokens.shape[1] - rows
            for chunk, rows in zip(chunks, read, strict=True)
            for t in range(chunk.pad[i], chunk.tokens.shape[1])
        ]
        assert all(is_read[len(is_read) - min(wanted, length) :])


def test_the_mtp_head_reads_few_numbers_of_rows() -> None:
    buckets, numbers = (16, 64, 256, 512), set()
    for length in range(1, 3000, 7):
        chunks = list(split_prompts([[1] * length, [1] * (length // 2)], buckets))
        rows = mtp_rows_of_chunks(chunks, 64)
        numbers |= {(chunk.tokens.shape[1], number) for chunk, number in zip(chunks, rows, strict=True)}
        assert len(chunks) < 2 or chunks[-1].tokens.shape[1] == 16 or set(rows[:-1]) <= {0, 64}
    assert numbers <= {(bucket, number) for bucket in buckets for number in (0, 16, 64)}
