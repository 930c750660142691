"""The emulator of PTX: instructions, threads that diverge and reconverge, memory."""

import re
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scripts import ptx_emulator
from scripts.ptx_emulator.ptx import EmulationError
from scripts.ptx_emulator.thread_group import HANDLERS
from tests.helpers.ptx import each_thread, run_ptx

WORDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40).map(lambda words: np.array(words, np.uint32))
BF16 = ml_dtypes.bfloat16


def nearest_bfloat16(x: Fraction) -> float:
    """Round by trying all neighbours in exact arithmetic."""
    close = np.asarray(float(x), np.float64).astype(np.float32).astype(BF16)
    neighbours = [np.array((int(close.view(np.uint16)) + d) & 0xFFFF, np.uint16).view(BF16) for d in (-1, 0, 1)]
    finite = [n for n in neighbours if np.isfinite(float(n))]
    return float(min(finite, key=lambda n: (abs(Fraction(float(n)) - x), int(n.view(np.uint16)) & 1)))


# Instructions


@settings(max_examples=30, deadline=None)
@given(WORDS, st.integers(0, 2**32 - 1), st.integers(0, 0xFFFF))
def test_bytes_are_selected(words: np.ndarray, other: int, selector: int) -> None:
    got = each_thread(f"prmt.b32 $0, $1, $2, {selector};", [words, np.full_like(words, other)], np.uint32)
    for word, out in zip(words, got, strict=True):
        joined = int(word).to_bytes(4, "little") + other.to_bytes(4, "little")
        expected = []
        for n in range(4):
            byte = joined[selector >> 4 * n & 7]
            expected.append((0xFF if byte & 0x80 else 0) if selector >> 4 * n & 8 else byte)
        assert int(out).to_bytes(4, "little") == bytes(expected)


@settings(max_examples=30, deadline=None)
@given(WORDS, st.integers(0, 40))
def test_shifts_by_any_amount(words: np.ndarray, amount: int) -> None:
    signed = words.view(np.int32)
    expected = {
        "shl.b32": [int(w) << amount & 0xFFFFFFFF for w in words],
        "shr.u32": [int(w) >> amount for w in words],
        "shr.s32": [(int(w) >> amount) & 0xFFFFFFFF for w in signed],
        "bfe.u32": [int(w) >> amount & 31 for w in words],
    }
    for op, result in expected.items():
        operands = f"{amount}, 5" if op.startswith("bfe") else str(amount)
        assert each_thread(f"{op} $0, $1, {operands};", [words], np.uint32).tolist() == result, op


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2**16 - 1)] * 3), min_size=1, max_size=20))
@example([(336, 58712, 1)])  # a tie except for the last number, which is too small for a sum in float64
def test_bfloat16_is_multiplied_and_added_with_one_rounding(bits: list[tuple[int, int, int]]) -> None:
    """Numbers of any size, subnormal ones included."""
    parts = [np.array([row[n] for row in bits], np.uint16).view(BF16) for n in range(3)]
    finite = np.all([np.isfinite(part.astype(np.float32)) for part in parts], axis=0)
    a, b, c = (np.where(finite, part, BF16(1)) for part in parts)
    words = [x.view(np.uint16).astype(np.uint32) << 16 | x.view(np.uint16) for x in (a, b, c)]
    got = each_thread("fma.rn.bf16x2 $0, $1, $2, $3;", words, np.uint32)
    for n, out in enumerate(got):
        exact = Fraction(float(a[n])) * Fraction(float(b[n])) + Fraction(float(c[n]))
        halves = np.array([out & 0xFFFF, out >> 16], np.uint16).view(BF16).astype(np.float64)
        assert halves[0] == halves[1]
        if abs(exact) < Fraction(float(ml_dtypes.finfo(BF16).max)):
            assert halves[0] == nearest_bfloat16(exact)


def test_rounding_modes() -> None:
    x = np.array([1 + 2.0**-24, -1 - 2.0**-24 - 2.0**-30, 2.0**-140, 1.5], np.float32)
    y = np.array([2.0**-30, -(2.0**-30), 2.0**-140, 0], np.float32)
    up, down = (each_thread(f"add.{mode}.f32 $0, $1, $2;", [x, y], np.float32, "fff") for mode in ("rp", "rm"))
    exact = x.astype(np.float64) + y
    assert (down <= exact).all() and (exact <= up).all() and (down < up).sum() == 2
    toward = each_thread("cvt.rzi.s32.f32 $0, $1;", [np.array([-2.7, 2.7, 3e9, np.nan], np.float32)], np.int32, "rf")
    assert toward.tolist() == [-2, 2, 2**31 - 1, 0]
    pair = each_thread("cvt.rn.bf16x2.f32 $0, $1, $2;", [np.array([x], np.float32) for x in (1, 2)], np.uint32, "rff")
    assert pair.view(BF16).astype(float).tolist() == [2, 1]  # the first source is the high half


def test_forms_of_compute_capability_10() -> None:
    """The largest of three numbers, pairs of float32, and bfloat16 added to float32."""
    a, b, c = (np.array([x], np.float32) for x in (1.5, -2, 7))
    assert each_thread("max.f32 $0, $1, $2, $3;", [a, b, c], np.float32, "ffff") == [7]
    assert each_thread("min.f32 $0, $1, $2;", [a, b], np.float32, "fff") == [-2]
    pairs = [np.array(x, np.float32).view(np.uint64) for x in ([1.5, 2], [3, -4])]
    assert each_thread("add.rn.f32x2 $0, $1, $2;", pairs, np.uint64, "lll").view(np.float32).tolist() == [4.5, -2]
    small = np.array([1.5], BF16).view(np.uint16)
    assert each_thread("add.rn.f32.bf16 $0, $1, $2;", [small, c], np.float32, "fhf") == [8.5]
    with pytest.raises(EmulationError, match="is not supported"):
        each_thread("add.rn.f32 $0, $1, $2, $3;", [a, b, c], np.float32, "ffff")


def test_a_carry_passes_from_word_to_word() -> None:
    a, b = np.array([2**64 - 3, 5], np.uint64), np.array([7, 2**40], np.uint64)
    words = [(x >> np.uint64(s)).astype(np.uint32) for x in (a, b) for s in (0, 32)]
    text = "add.cc.u32 %r20, $1, $3; addc.u32 $0, $2, $4;"
    got = each_thread(text, words, np.uint32)
    assert got.tolist() == [int(x) >> 32 & 0xFFFFFFFF for x in (int(a[0]) + 7, 5 + 2**40)]


def test_bit_operations() -> None:
    a, b, c = (np.random.default_rng(n).integers(0, 2**32, 50).astype(np.uint32) for n in range(3))
    majority = each_thread("lop3.b32 $0, $1, $2, $3, 0xE8;", [a, b, c], np.uint32)
    assert (majority == a & b | a & c | b & c).all()
    joined = [int(high) << 32 | int(low) for low, high in zip(a, b, strict=True)]
    left, right = (each_thread(f"shf.{mode}.b32 $0, $1, $2, 37;", [a, b], np.uint32) for mode in ("l.wrap", "r.clamp"))
    assert left.tolist() == [word << 5 >> 32 & 0xFFFFFFFF for word in joined]
    assert right.tolist() == b.tolist()  # clamped to 32
    words = np.append(a >> np.arange(50, dtype=np.uint32) % 32, np.uint32(0))
    assert each_thread("popc.b32 $0, $1;", [words], np.uint32).tolist() == [int(word).bit_count() for word in words]
    assert each_thread("clz.b32 $0, $1;", [words], np.uint32).tolist() == [
        32 - int(word).bit_length() for word in words
    ]


def test_an_unsupported_instruction_or_unset_register_is_named() -> None:
    with pytest.raises(EmulationError, match=r"'vote\.sync"):
        run_ptx("vote.sync.any.pred %p1, %p1, -1;", [np.zeros(1, np.uint32)])
    with pytest.raises(EmulationError, match="%r40 is read before"):
        run_ptx("add.s32 %r4, %r40, 1;", [np.zeros(1, np.uint32)])


# Threads


LOOP = """
    mov.b32 %r4, 0;
    mov.b32 %r5, 0;
$again:
    setp.ge.u32 %p1, %r4, %r0;
    @%p1 bra $done;
    add.s32 %r5, %r5, %r4;
    add.s32 %r4, %r4, 1;
    bra $again;
$done:
    mul.wide.u32 %rd9, %r3, 4;
    add.s64 %rd9, %rd9, %rd0;
    st.global.b32 [%rd9], %r5;
"""
BRANCH_TABLE = """
    and.b32 %r4, %r0, 3;
    $table: .branchtargets $two, $one, $two, $three;
    brx.idx %r4, $table;
$one:
    mov.b32 %r5, 1;
    bra $done;
$two:
    mov.b32 %r5, 2;
    bra $done;
$three:
    mov.b32 %r5, 3;
$done:
    mul.wide.u32 %rd9, %r3, 4;
    add.s64 %rd9, %rd9, %rd0;
    st.global.b32 [%rd9], %r5;
"""
REVERSE = """
    mul.wide.u32 %rd8, %r3, 4;
    add.s64 %rd9, %rd8, %rd0;
    add.s64 %rd10, %rd8, %rd1;
    shl.b32 %r4, %r0, 2;
    {fill}
    {barrier}
    sub.s32 %r5, 252, %r4;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd10], %r6;
"""
STORE = "ld.global.b32 %r7, [%rd9]; st.shared.b32 [%r4], %r7;"
COPY = "cp.async.ca.shared.global [%r4], [%rd9], 4; cp.async.commit_group;"
NUMBERS = np.arange(128, dtype=np.uint32)


def test_threads_diverge_in_a_loop_and_reconverge() -> None:
    [out] = run_ptx(LOOP, [np.zeros(100, np.uint32)], threads=50, blocks=2)
    assert out.tolist() == [n * (n - 1) // 2 for n in range(50)] * 2


def test_a_branch_table() -> None:
    assert run_ptx(BRANCH_TABLE, [np.zeros(32, np.uint32)])[0].tolist() == [2, 1, 2, 3] * 8


@pytest.mark.parametrize("fill", [STORE, COPY + "cp.async.wait_group 0;"])
def test_a_block_reverses_its_numbers_in_shared_memory(fill: str) -> None:
    out = run_ptx(
        REVERSE.format(fill=fill, barrier="bar.sync 0;"), [NUMBERS, np.zeros_like(NUMBERS)], 64, 2, shared=256
    )[1]
    assert out.tolist() == [*range(63, -1, -1), *range(127, 63, -1)]


@pytest.mark.parametrize(
    ("fill", "barrier", "message"),
    [
        (STORE, "", "a race: shared memory is read"),
        (COPY, "bar.sync 0;", "before a copy to it has arrived"),
        (COPY + "cp.async.wait_group 1;", "bar.sync 0;", "before a copy to it has arrived"),
        (COPY + "cp.async.wait_group 0;", "", "a race: shared memory is read"),
        (STORE, "bar.sync 0; mov.b32 %r8, 0; st.shared.b32 [%r8], %r0;", "a race: shared memory is written"),
    ],
)
def test_races_are_found(fill: str, barrier: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run_ptx(REVERSE.format(fill=fill, barrier=barrier), [NUMBERS, np.zeros_like(NUMBERS)], 64, 2, shared=256)


def test_blocks_may_not_write_different_values_to_one_address() -> None:
    text = "st.global.b32 [%rd0], %r1;"
    with pytest.raises(EmulationError, match="a race: global memory is written"):
        run_ptx(text, [np.zeros(4, np.uint32)], blocks=2)
    assert run_ptx(text, [np.full(4, 9, np.uint32)])[0].tolist() == [0, 9, 9, 9]


def test_threads_that_wait_at_different_barriers() -> None:
    text = "setp.eq.s32 %p1, %r0, 3; @%p1 bra $other; bar.sync 0; bra $end; $other: bar.sync 0; $end: mov.b32 %r4, 0;"
    with pytest.raises(EmulationError, match="different barriers"):
        run_ptx(text, [np.zeros(1, np.uint32)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("st.global.b32 [%rd1+16], %r0;", "in no buffer"),
        ("ld.global.b32 %r4, [%rd0+-4];", "in no buffer"),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd0+12];", "not aligned"),
        ("ld.global.b32 %r4, [%rd0+1048576];", "which has"),
        ("st.global.b32 [%rd0], %r0;", "in no result"),
        ("mov.b32 %r4, 64; ld.shared.b32 %r5, [%r4];", "of shared memory, of which a block has 64 bytes"),
        ("$loop: bra $loop;", "does not end"),
    ],
)
def test_wrong_accesses_are_errors(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.ptx_emulator.machine.MAX_INSTRUCTIONS", 10_000)
    with pytest.raises(EmulationError, match=message):
        run_ptx(text, [np.zeros(4, np.uint32), np.zeros(4, np.uint32)], shared=64)


def test_memory_that_was_never_written_holds_nan() -> None:
    text = "mov.b32 %r4, 0; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd0], %r5;"
    assert np.isnan(run_ptx(text, [np.zeros(1, np.float32)], shared=64)[0]).all()


@pytest.mark.parametrize(("mode", "offset"), [("bfly", 5), ("down", 3), ("up", 2), ("idx", 7)])
def test_values_go_from_thread_to_thread(mode: str, offset: int) -> None:
    clamp = 0 if mode == "up" else 31
    text = f"""
    shfl.sync.{mode}.b32 %r4, %r0, {offset}, {clamp}, -1;
    mul.wide.u32 %rd9, %r0, 4;
    add.s64 %rd9, %rd9, %rd0;
    st.global.b32 [%rd9], %r4;
    """
    lanes = np.arange(32)
    source = {"bfly": lanes ^ offset, "down": lanes + offset, "up": lanes - offset, "idx": np.full(32, offset)}[mode]
    expected = np.where((source >= 0) & (source < 32), source, lanes)
    assert run_ptx(text, [np.zeros(32, np.uint32)])[0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("operation", "expected"), [("add.s32", 16 * 31), ("max.s32", 31), ("min.u32", 0), ("or.b32", 31)]
)
def test_a_warp_reduces_to_one_value(operation: str, expected: int) -> None:
    text = f"""
    redux.sync.{operation} %r4, %r0, -1;
    mul.wide.u32 %rd9, %r0, 4;
    add.s64 %rd9, %rd9, %rd0;
    st.global.b32 [%rd9], %r4;
    """
    assert run_ptx(text, [np.zeros(32, np.uint32)])[0].tolist() == [expected] * 32


def test_atomics_run_one_thread_after_the_other() -> None:
    text = """
    mov.b32 %r4, 2;
    atom.global.add.u32 %r5, [%rd0], %r4;
    red.global.max.u32 [%rd0+4], %r0;
    mul.wide.u32 %rd9, %r0, 4;
    add.s64 %rd9, %rd9, %rd0;
    st.global.b32 [%rd9+8], %r5;
    """
    assert run_ptx(text, [np.zeros(34, np.uint32)])[0].tolist() == [64, 31, *range(0, 64, 2)]


def test_the_readme_lists_every_handler_and_existing_tests() -> None:
    readme = Path(ptx_emulator.__file__).with_name("README.md").read_text()
    listed: dict[str, str] = {}
    for opcodes, handler, tests in re.findall(r"^\| (`.*?) \| `([\w.]+)` \| .*? \| (.*) \|$", readme, re.MULTILINE):
        listed |= dict.fromkeys(re.findall(r"`(\w+)`", opcodes), handler)
        for name in re.findall(r"`(test_\w+)`", tests):
            assert any(f"def {name}(" in file.read_text() for file in Path(__file__).parent.glob("test_emulat*.py")), (
                name
            )
    handlers = {
        opcode: f"{handler.__module__.split('.')[-1]}.{handler.__name__}" for opcode, handler in HANDLERS.items()
    }
    assert listed == handlers
