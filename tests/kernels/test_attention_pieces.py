"""Attention of few rows, whose cache is cut into pieces: their borders, and the same bits however the work is cut."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import triton_decode
from kernels_pallas.attention.shapes import AttentionShape, attention_inputs
from kernels_pallas.attention.tile_sizes import DECODE_TILES, JOIN_PIECES, PIECES
from kernels_pallas.attention.triton_decode import count_pieces, piece_bounds
from kernels_pallas.partial_sums import PartialSums
from tests.helpers.attention import exact_attention, first_rows, random_inputs
from tests.helpers.numerics import assert_close

BORDERS = [0, PIECES[0].size, PIECES[0].end, PIECES[0].end + PIECES[1].size, PIECES[1].end]


def attend(args: tuple[Any, ...]) -> np.ndarray:
    """Run the kernels, traced anew: the tests change their constants."""
    q, keys, values, layer, positions, valid, gates = args
    interpret = jax.default_backend() == "cpu"

    def kernels(q: Any, keys: Any, values: Any, positions: Any, valid: Any, gates: Any) -> Any:
        return triton_decode.decode_attention(q, keys, values, layer, positions, valid, gates, interpret=interpret)

    return np.asarray(jax.jit(kernels)(q, keys, values, positions, valid, gates), np.float32)


def inputs(ends: np.ndarray, rows: int, kv_len: int, dtype: str, heads: tuple[int, int] = (2, 1)) -> tuple[Any, ...]:
    """Windows of rows whose last positions are `ends`. Rows that would begin before the cache are padding."""
    shape = AttentionShape(2, *heads, head_dim=16, kv_len=kv_len, batch=len(ends))
    positions = ends[:, None] - rows + 1 + np.arange(rows)
    q, *rest = random_inputs(attention_inputs(shape, rows, dtype), np.maximum(positions, 0), positions >= 0)
    return (q / 4).astype(dtype), *rest


def one_row(args: tuple[Any, ...], sequence: int, row: int, kv_len: int) -> tuple[Any, ...]:
    """A row alone in its window, its sequence alone in the batch, with a cache of another length."""
    q, keys, values, layer, positions, valid, gates = args
    only = np.s_[sequence : sequence + 1, row : row + 1]

    def resized(cache: Any) -> Any:
        cache = cache[:, sequence : sequence + 1]
        more = max(kv_len - cache.shape[3], 0)
        return jnp.pad(cache, ((0, 0),) * 3 + ((0, more), (0, 0)), constant_values=100)[:, :, :, :kv_len]

    its_gates: PartialSums = first_rows(gates, len(q), *only)
    return q[only], resized(keys), resized(values), layer, positions[only], valid[only], its_gates


def test_pieces_cover_the_cache_without_gaps_and_hold_whole_tiles() -> None:
    begin, end = (np.asarray(bound) for bound in jax.jit(piece_bounds)(jnp.arange(600)))
    assert begin[0] == 0 and (begin[1:] == end[:-1]).all()
    sizes = end - begin
    for pieces, start in zip(PIECES, (0, *(pieces.end for pieces in PIECES)), strict=False):
        assert (sizes[(begin >= start) & (begin < pieces.end)] == pieces.size).all()
    assert all(pieces.size % tile.kv == 0 for pieces in PIECES for tile in DECODE_TILES.values())
    lengths = np.unique(np.concatenate([begin, begin + 1, end - 1]))
    counts = [int((begin < length).sum()) for length in lengths]
    assert [int(count_pieces(int(length), np)) for length in lengths] == counts
    assert np.asarray(jax.jit(count_pieces)(jnp.asarray(lengths))).tolist() == counts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_windows_on_both_sides_of_the_borders_of_pieces(rows: int, dtype: str) -> None:
    """Sequences of unequal lengths in one batch, an idle one among them. Keys after the last row must not be seen."""
    ends = np.array([border + more for border in BORDERS for more in (-1, 0, 3)])  # -1: an idle sequence
    kv_len = BORDERS[-1] + 64
    q, keys, values, *rest = inputs(ends, rows, kv_len, dtype)
    beyond = (np.arange(kv_len) > ends[:, None])[None, :, None, :, None]
    keys, values = (jnp.where(beyond, 100, array).astype(dtype) for array in (keys, values))
    args = (q, keys, values, *rest)
    got = attend(args)
    assert_close(got, exact_attention(args), dtype)
    assert not got[0].any()


@pytest.mark.parametrize(
    ("batch", "heads", "dtype"),
    [(1, (8, 1), "float32"), (2, (4, 2), "float32"), (5, (3, 1), "float32"), (2, (4, 2), "bfloat16")],
)
def test_a_row_has_the_same_bits_alone_and_with_a_cache_of_another_length(
    batch: int, heads: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a window of 16, joined in tiles of a few pieces. Rounding to bfloat16 may hide another order of sums."""
    monkeypatch.setattr(triton_decode, "JOIN_PIECES", 16)
    ends = np.array([2300, 40, 2047, 8, 1100])[:batch]
    args = inputs(ends, 16, 2560, dtype, heads)
    got = attend(args)
    assert_close(got, exact_attention(args), dtype)
    for sequence in range(batch):
        for row, kv_len in ((15, 8192), (12, int(ends[sequence]) // 64 * 64 + 64)):
            alone = attend(one_row(args, sequence, row, kv_len))
            assert np.array_equal(alone[0, 0], got[sequence, row]), (sequence, row, kv_len)


def test_more_pieces_than_are_joined_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long contexts, with pieces of every size: against the formula, and bit for bit in windows of 1, 5 and 16 rows."""
    monkeypatch.setattr(triton_decode, "DECODE_PROGRAMS", 8)  # interpreted programs begin with a copy of the cache
    ends, kv_len = np.array([60_000, 33_000]), 60_032
    assert count_pieces(int(ends[0]), np) > JOIN_PIECES
    args = inputs(ends, 16, kv_len, "float32")
    got = attend(args)
    assert_close(got, exact_attention(args), "float32")
    q, keys, values, layer, positions, valid, gates = args
    for rows in (1, 5):
        last = np.s_[:, 16 - rows :]
        window = (
            q[last],
            keys,
            values,
            layer,
            positions[last],
            valid[last],
            first_rows(gates, 2, *np.s_[:2, 16 - rows :]),
        )
        assert np.array_equal(attend(window), got[last]), rows
    alone = attend(one_row(args, 0, 13, 131_072))
    assert np.array_equal(alone[0, 0], got[0, 13])


@pytest.mark.parametrize(("name", "number"), [("DECODE_PROGRAMS", 1), ("DECODE_PROGRAMS", 30), ("MAX_TEMP_BYTES", 1)])
def test_who_computes_a_piece_and_when_changes_no_bit(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces dealt out to more or fewer programs, and sequences one after the other to save memory."""
    args = inputs(np.array([700, 20, 1000]), 5, 1024, "float32", (4, 2))
    want = attend(args)
    monkeypatch.setattr(triton_decode, name, number)
    assert np.array_equal(attend(args), want)


def test_memory_for_pieces_is_bounded_and_holds_no_padding() -> None:
    """The sums of a piece are one row of float32 a pair. Many long sequences take turns."""

    def sums(batch: int, rows: int, kv_len: int) -> list[int]:
        """Bytes of the largest result of each kernel that reads the cache."""
        shape = AttentionShape(1, 16, 2, 256, kv_len=kv_len, batch=batch)
        specs = attention_inputs(shape, rows, jnp.bfloat16)
        program = jax.make_jaxpr(triton_decode.decode_attention)(*specs)
        calls = [eqn for eqn in program.eqns if eqn.primitive.name == "pallas_call"][::2]
        return [max(out.aval.size * out.aval.dtype.itemsize for out in eqn.outvars) for eqn in calls]

    assert sums(1, 1, 131_072) == [16 * 400 * 1024]
    assert sums(1, 5, 131_072) == [5 * 16 * 400 * 1024]
    many = sums(64, 5, 32_768)
    assert max(many) <= triton_decode.MAX_TEMP_BYTES and sum(many) == 64 * 5 * 16 * 208 * 1024
