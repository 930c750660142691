"""Kernels unpack words of stored weights to numbers: every code, table and high bit, in jnp and in emulated PTX."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.packed import ptx_ops
from kernels_pallas.packed.dequantize import split_scale
from kernels_pallas.packed.formats import FORMATS
from kernels_pallas.packed.layout import PackedLayout
from kernels_pallas.packed.ptx_ops import JNP_OPS, PTX_OPS
from kernels_pallas.packed.unpack import PAIR_SCALE, unpack_bf16x2, unpack_f32
from kernels_pallas.weights.quantized import INDEX_BITS
from tests.helpers.ptx import each_thread

pytestmark = pytest.mark.fast

# The nibbles of a word in the order of elements: low ones of four bytes, then high ones.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
ENTRY = st.integers(-128, 127)
HALF = st.lists(st.integers(0, 127), min_size=8, max_size=8)
SIGN = st.sampled_from([1, -1])
TABLES = st.one_of(  # any numbers; numbers of one sign in each half, as in the formats; consecutive numbers
    st.lists(ENTRY, min_size=16, max_size=16),
    st.tuples(HALF, SIGN, HALF, SIGN).map(lambda made: [made[1] * t for t in made[0]] + [made[3] * t for t in made[2]]),
    st.integers(-128, 112).map(lambda first: list(range(first, first + 16))),
)


def numbers(layout: PackedLayout, word: int, high: int = 0) -> list[list[float]]:
    """Return the numbers of a word, by way of float32 and by way of pairs of bfloat16."""
    args = (layout, jnp.full(1, word, jnp.uint32), JNP_OPS, jnp.full(1, high, jnp.uint32) if high else None)
    values, bias = unpack_f32(*args)
    halves = [half for pair in unpack_bf16x2(*args) for half in JNP_OPS.split_bf16x2(pair)]
    return [[float(m[0]) - bias for m in values], [float(half[0]) * PAIR_SCALE for half in halves]]


@settings(max_examples=60, deadline=None)
@given(TABLES, st.integers(0, 2**32 - 1))
def test_a_word_of_codes_looks_up_eight_entries(table: list[int], word: int) -> None:
    expected = [table[word >> 4 * n & 15] for n in ORDER]
    assert numbers(PackedLayout("codes4", 32, tuple(table)), word) == [expected, expected]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2**16 - 1), st.integers(-128, 0))
def test_a_word_of_codes_and_their_high_bits(word: int, high: int, first: int) -> None:
    for name, bits in (("codes5", 1), ("codes6", 2)):
        layout = PackedLayout(name, 32, tuple(range(first, first + (16 << bits))))
        top = [high >> bits * n & ((1 << bits) - 1) for n in ORDER]
        expected = [first + (word >> 4 * n & 15) + 16 * t for n, t in zip(ORDER, top, strict=True)]
        assert numbers(layout, word, high) == [expected, expected]


@pytest.mark.parametrize("name", ["codes5", "codes6"])
def test_all_high_bits(name: str) -> None:
    """The high bits of a word take every value, beside nibbles that are zero."""
    bits = INDEX_BITS[name] - 4
    high = np.arange(1 << 8 * bits, dtype=np.uint32)
    layout = PackedLayout(name, 32, tuple(range(16 << bits)))
    values, bias = unpack_f32(layout, jnp.zeros(high.shape, jnp.uint32), JNP_OPS, jnp.asarray(high))
    for n, m in zip(ORDER, values, strict=True):
        assert (np.asarray(m) - bias == 16 * (high >> bits * n & ((1 << bits) - 1))).all()


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=4, max_size=4))
def test_a_word_of_bytes(four: bytes) -> None:
    word = int.from_bytes(four, "little")
    assert numbers(PackedLayout("codes8", 32), word) == [list(np.frombuffer(four, np.int8))] * 2
    small = bytes(b & 0xBF if b & 0x7F == 0x7F else b for b in four)  # 0x7F and 0xFF are no numbers
    expected = list(np.frombuffer(small, ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert numbers(PackedLayout("fp8", 128), int.from_bytes(small, "little")) == [expected, expected]


def test_a_number_by_its_scale_is_bfloat16_within_a_rounding() -> None:
    """Every code by float16 scales, of all sizes: the nearest bfloat16, or in a few cases the second nearest."""
    rng = np.random.default_rng(0)
    codes = np.arange(-128, 128, dtype=np.float32)
    scales = (
        np.concatenate([rng.normal(size=300), 2.0 ** rng.uniform(-24, 15, 300)]).astype(np.float16).astype(np.float32)
    )
    column = jnp.asarray(codes[:, None] / PAIR_SCALE)
    pair = JNP_OPS.mul_split_scale(JNP_OPS.pack_bf16x2(column, column), *split_scale(jnp.asarray(scales), JNP_OPS))
    got, same = JNP_OPS.split_bf16x2(pair)
    got, same = np.asarray(got, np.float32), np.asarray(same, np.float32)  # type: ignore[assignment]
    exact = codes[:, None] * scales[None]
    nearest = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (got == same).all() and (got == nearest).mean() > 0.999
    assert (np.abs(got - exact) <= 2.0**-8 * np.abs(exact)).all()


@pytest.fixture
def emulated_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the assembly of `PTX_OPS` outside of a kernel, on the emulator."""

    def run(text: str, args: Sequence[Any], dtype: Any, registers: str) -> Any:
        return jnp.asarray(each_thread(text, [np.asarray(arg) for arg in args], dtype, registers))

    monkeypatch.setattr(ptx_ops, "_asm", run)


LAYOUTS = {
    name: PackedLayout(FORMATS[name].layout, FORMATS[name].group, FORMATS[name].table)
    for name in ("iq4_nl", "q4_k", "q5_k", "q6_k", "q8_0", "fp8")
}
LAYOUTS["a table of any numbers"] = PackedLayout(
    "codes4", 32, (5, -3, 127, -128, 0, 64, -64, 1, -1, 90, -90, 33, 2, -77, 17, 4)
)


@pytest.mark.usefixtures("emulated_ptx")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_instructions_of_a_gpu_give_the_bits_of_arithmetic(layout: PackedLayout) -> None:
    rng = np.random.default_rng(0)
    four = rng.integers(0, 256, (600, 4)).astype(np.uint8)
    if layout.layout == "fp8":
        four[four & 0x7F == 0x7F] = 0x7E  # 0x7F and 0xFF are no numbers
    word = jnp.asarray(four.view(np.uint32).reshape(-1))
    num_high_bits = INDEX_BITS.get(layout.layout, 4) - 4
    high = jnp.asarray(rng.integers(0, 1 << 8 * num_high_bits, 600).astype(np.uint32)) if num_high_bits else None
    for ptx, expected in zip(
        unpack_bf16x2(layout, word, PTX_OPS, high), unpack_bf16x2(layout, word, JNP_OPS, high), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ptx), np.asarray(expected))
    (f32, bias), (wide, same) = (unpack_f32(layout, word, ops, high) for ops in (PTX_OPS, JNP_OPS))
    assert bias == same
    for one, other in zip(f32, wide, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.usefixtures("emulated_ptx")
def test_scales_are_applied_by_a_gpu_as_by_arithmetic() -> None:
    rng = np.random.default_rng(1)
    m, scale, rest = (jnp.asarray(rng.normal(size=500).astype(np.float32)) for _ in range(3))
    exact = np.float64(np.asarray(m)) * np.float64(np.asarray(scale)) + np.float64(np.asarray(rest))
    np.testing.assert_array_equal(np.asarray(PTX_OPS.fma(m, scale, rest)), exact.astype(np.float32))
    joined = PTX_OPS.pack_bf16x2(m, scale)
    np.testing.assert_array_equal(joined, JNP_OPS.pack_bf16x2(m, scale))
    for one, other in zip(PTX_OPS.split_bf16x2(joined), JNP_OPS.split_bf16x2(joined), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint16), np.asarray(other).view(np.uint16))
    high, low = JNP_OPS.pack_bf16x2(scale, scale), JNP_OPS.pack_bf16x2(scale * 2.0**-9, scale * 2.0**-9)
    np.testing.assert_array_equal(
        PTX_OPS.mul_split_scale(joined, high, low), JNP_OPS.mul_split_scale(joined, high, low)
    )
    assert (np.asarray(PTX_OPS.opaque_constant(0x12345678, (40,))) == 0x12345678).all()
