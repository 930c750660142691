"""Words of stored weights to numbers, as kernels unpack them, in arithmetic: every code, table and high bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import packed_words
from kernels_pallas.instructions import ARITHMETIC
from kernels_pallas.packed_words import Form
from kernels_pallas.quantized import INDICES
from kernels_pallas.unpacking import PAIR_SCALE, floats, pairs

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of nibbles as elements: the low ones of four bytes, then the high ones
ENTRY = st.integers(-128, 127)
HALF = st.lists(st.integers(0, 127), min_size=8, max_size=8)
SIGN = st.sampled_from([1, -1])
TABLES = st.one_of(  # of any numbers; of a sign in each half, as the formats have them; one after the other
    st.lists(ENTRY, min_size=16, max_size=16),
    st.tuples(HALF, SIGN, HALF, SIGN).map(lambda made: [made[i + 1] * t for i in (0, 2) for t in made[i]]),
    st.integers(-128, 112).map(lambda first: list(range(first, first + 16))),
)


def numbers(form: Form, word: int, high: int = 0) -> list[list[float]]:
    """What a word holds, by float32 and by pairs."""
    args = (form, jnp.full(1, word, jnp.uint32), ARITHMETIC, jnp.full(1, high, jnp.uint32) if high else None)
    values, bias = floats(*args)
    halves = [half for pair in pairs(*args) for half in ARITHMETIC.split(pair)]
    return [[float(m[0]) - bias for m in values], [float(half[0]) * PAIR_SCALE for half in halves]]


@settings(max_examples=60, deadline=None)
@given(TABLES, st.integers(0, 2**32 - 1))
def test_a_word_of_codes_looks_up_eight_entries(table: list[int], word: int) -> None:
    want = [table[word >> 4 * n & 15] for n in ORDER]
    assert numbers(Form("codes4", 32, tuple(table)), word) == [want, want]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2**16 - 1), st.integers(-128, 0))
def test_a_word_of_codes_and_their_high_bits(word: int, high: int, first: int) -> None:
    for layout, bits in (("codes5", 1), ("codes6", 2)):
        form = Form(layout, 32, tuple(range(first, first + (16 << bits))))
        top = [high >> bits * n & ((1 << bits) - 1) for n in ORDER]
        want = [first + (word >> 4 * n & 15) + 16 * t for n, t in zip(ORDER, top, strict=True)]
        assert numbers(form, word, high) == [want, want]


@pytest.mark.parametrize("layout", ["codes5", "codes6"])
def test_all_high_bits(layout: str) -> None:
    """Each number that the high bits of a word can be, beside nibbles that are zero."""
    bits = INDICES[layout] - 4
    high = np.arange(1 << 8 * bits, dtype=np.uint32)
    form = Form(layout, 32, tuple(range(16 << bits)))
    values, bias = floats(form, jnp.zeros(high.shape, jnp.uint32), ARITHMETIC, jnp.asarray(high))
    for n, m in zip(ORDER, values, strict=True):
        assert (np.asarray(m) - bias == 16 * (high >> bits * n & ((1 << bits) - 1))).all()


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=4, max_size=4))
def test_a_word_of_bytes(four: bytes) -> None:
    word = int.from_bytes(four, "little")
    assert numbers(Form("codes8", 32), word) == [list(np.frombuffer(four, np.int8))] * 2
    small = bytes(b & 0xBF if b & 0x7F == 0x7F else b for b in four)  # 0x7F and 0xFF are no numbers
    want = list(np.frombuffer(small, ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert numbers(Form("fp8", 128), int.from_bytes(small, "little")) == [want, want]


def test_a_number_by_its_scale_is_bfloat16_within_a_rounding() -> None:
    """Every code by float16 scales, of all sizes: the nearest bfloat16, or in a few cases the second nearest."""
    rng = np.random.default_rng(0)
    codes = np.arange(-128, 128, dtype=np.float32)
    scales = np.concatenate([rng.normal(size=300), 2.0 ** rng.uniform(-24, 15, 300)]).astype(np.float16).astype(np.float32)
    column = jnp.asarray(codes[:, None] / PAIR_SCALE)
    [pair] = packed_words._scaled_pairs([ARITHMETIC.pair(column, column)], [jnp.asarray(scales)], lambda x: x, ARITHMETIC)
    got, same = ARITHMETIC.split(pair)
    got, same = np.asarray(got, np.float32), np.asarray(same, np.float32)
    exact = codes[:, None] * scales[None]
    nearest = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (got == same).all() and (got == nearest).mean() > 0.999
    assert (np.abs(got - exact) <= 2.0**-8 * np.abs(exact)).all()
