"""`OutputRows` selects the rows that numpy's indexing selects, from the whole chunk and from its last rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtpjax.decoding.output_rows import NO_ROWS, OutputRows

pytestmark = pytest.mark.fast

MAX_ROWS = 9
HIDDEN = jnp.asarray(np.random.default_rng(0).normal(size=(2, MAX_ROWS, 3)), jnp.float32)


@st.composite
def chunks_and_rows(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A chunk length, and rows inside the chunk, in any order, with repetitions, some counted from the end."""
    chunk_rows = draw(st.integers(1, MAX_ROWS))
    return chunk_rows, draw(st.lists(st.integers(-chunk_rows, chunk_rows - 1), max_size=5))


@settings(max_examples=100, deadline=None)
@given(chunks_and_rows(), st.integers(0, MAX_ROWS))
def test_selected_rows_are_those_of_numpy(chunk: tuple[int, list[int]], more: int) -> None:
    chunk_rows, rows = chunk
    selection, hidden = OutputRows.at(*rows), HIDDEN[:, :chunk_rows]
    assert np.array_equal(selection.take(hidden), np.asarray(hidden)[:, rows])
    assert selection.count(chunk_rows) == len(rows)
    # The last rows of the chunk are enough, if all selected rows are among them.
    needed = selection.num_trailing_rows(chunk_rows)
    assert needed == max((chunk_rows - row % chunk_rows for row in rows), default=0)
    num_given = min(needed + more, chunk_rows)
    assert np.array_equal(selection.take(hidden[:, chunk_rows - num_given :], chunk_rows), np.asarray(hidden)[:, rows])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, MAX_ROWS))
def test_none_last_and_all_are_selections_of_any_chunk(chunk_rows: int) -> None:
    hidden = HIDDEN[:, :chunk_rows]
    for selection, want in ((OutputRows.none(), []), (OutputRows.last(), [-1]), (OutputRows.all(), slice(None))):
        taken = np.asarray(selection.take(hidden))
        assert np.array_equal(taken, np.asarray(hidden)[:, want])
        assert selection.count(chunk_rows) == taken.shape[1] == selection.num_trailing_rows(chunk_rows)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, MAX_ROWS), st.integers(0, 5), st.booleans(), chunks_and_rows())
def test_a_row_outside_the_chunk_is_refused(chunk_rows: int, distance: int, before: bool, others: tuple) -> None:
    row = -chunk_rows - 1 - distance if before else chunk_rows + distance
    inside = [r for r in others[1] if -chunk_rows <= r < chunk_rows]
    message = f"output row {row} is outside a chunk of {chunk_rows} rows"
    with pytest.raises(IndexError, match=message):
        OutputRows.at(*inside, row).take(HIDDEN[:, :chunk_rows])
    with pytest.raises(IndexError, match=message):
        OutputRows.at(row).take(HIDDEN[:, :1], chunk_rows)


def test_selections_are_values() -> None:
    """A static argument of a jitted function must be hashable; equal selections share a program."""
    assert OutputRows.at(0, -1) == OutputRows((0, -1)) and hash(OutputRows.at(0, -1)) == hash(OutputRows((0, -1)))
    assert OutputRows.none() == NO_ROWS != OutputRows.all()
