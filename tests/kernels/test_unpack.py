"""Words of stored weights to numbers, as kernels unpack them: every code, table and high bit in arithmetic, and a GPU's
own instructions, emulated, beside it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.packed import dequantize as packed_words
from kernels_pallas.packed import ptx_ops as instructions
from kernels_pallas.packed.dequantize import Form
from kernels_pallas.packed.ptx_ops import ARITHMETIC, MACHINE
from kernels_pallas.packed.unpack import PAIR_SCALE, floats, pairs
from kernels_pallas.weights.quantized import INDICES
from tests.helpers.ptx import each_thread

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
    scales = (
        np.concatenate([rng.normal(size=300), 2.0 ** rng.uniform(-24, 15, 300)]).astype(np.float16).astype(np.float32)
    )
    column = jnp.asarray(codes[:, None] / PAIR_SCALE)
    [pair] = packed_words._scaled_pairs(
        [ARITHMETIC.pair(column, column)], [jnp.asarray(scales)], lambda x: x, ARITHMETIC
    )
    got, same = ARITHMETIC.split(pair)
    got, same = np.asarray(got, np.float32), np.asarray(same, np.float32)
    exact = codes[:, None] * scales[None]
    nearest = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (got == same).all() and (got == nearest).mean() > 0.999
    assert (np.abs(got - exact) <= 2.0**-8 * np.abs(exact)).all()


@pytest.fixture
def emulated_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """`MACHINE` outside of a kernel: its assembly is run by the emulator."""

    def run(text: str, args: Sequence[Any], dtype: Any, kinds: str) -> Any:
        return jnp.asarray(each_thread(text, [np.asarray(arg) for arg in args], dtype, kinds))

    monkeypatch.setattr(instructions, "_asm", run)


FORMS = {
    "iq4_nl": Form("codes4", 32, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    "a table of any numbers": Form("codes4", 32, (5, -3, 127, -128, 0, 64, -64, 1, -1, 90, -90, 33, 2, -77, 17, 4)),
    "q4_k": Form("codes4", 32, tuple(range(16))),
    "q5_k": Form("codes5", 32, tuple(range(32))),
    "q6_k": Form("codes6", 16, tuple(range(-32, 32))),
    "q8_0": Form("codes8", 32),
    "fp8": Form("fp8", 128),
}


@pytest.mark.usefixtures("emulated_machine")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_instructions_of_a_gpu_give_the_bits_of_arithmetic(form: Form) -> None:
    rng = np.random.default_rng(0)
    four = rng.integers(0, 256, (600, 4)).astype(np.uint8)
    if form.layout == "fp8":
        four[four & 0x7F == 0x7F] = 0x7E  # 0x7F and 0xFF are no numbers
    word = jnp.asarray(four.view(np.uint32).reshape(-1))
    many = INDICES.get(form.layout, 4) - 4
    high = jnp.asarray(rng.integers(0, 1 << 8 * many, 600).astype(np.uint32)) if many else None
    for machine, plain in zip(pairs(form, word, MACHINE, high), pairs(form, word, ARITHMETIC, high), strict=True):
        np.testing.assert_array_equal(np.asarray(machine), np.asarray(plain))
    (machine, bias), (plain, same) = (floats(form, word, ops, high) for ops in (MACHINE, ARITHMETIC))
    assert bias == same
    for one, other in zip(machine, plain, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.usefixtures("emulated_machine")
def test_scales_are_applied_by_a_gpu_as_by_arithmetic() -> None:
    rng = np.random.default_rng(1)
    m, scale, rest = (jnp.asarray(rng.normal(size=500).astype(np.float32)) for _ in range(3))
    exact = np.float64(np.asarray(m)) * np.float64(np.asarray(scale)) + np.float64(np.asarray(rest))
    np.testing.assert_array_equal(np.asarray(MACHINE.fused(m, scale, rest)), exact.astype(np.float32))
    joined = MACHINE.pair(m, scale)
    np.testing.assert_array_equal(joined, ARITHMETIC.pair(m, scale))
    for one, other in zip(MACHINE.split(joined), ARITHMETIC.split(joined), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint16), np.asarray(other).view(np.uint16))
    high, low = ARITHMETIC.pair(scale, scale), ARITHMETIC.pair(scale * 2.0**-9, scale * 2.0**-9)
    np.testing.assert_array_equal(MACHINE.scaled(joined, high, low), ARITHMETIC.scaled(joined, high, low))
    assert (np.asarray(MACHINE.constant(0x12345678, (40,))) == 0x12345678).all()
