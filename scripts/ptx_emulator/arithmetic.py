"""Instructions that compute with registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from scripts.ptx_emulator.conversion import PAIRS, computes, rounded, rounding, sum_to_odd
from scripts.ptx_emulator.machine import TYPES, Lanes, Mask, Step, opcode, unsigned
from scripts.ptx_emulator.ptx import Both, EmulationError, Instruction, Reg

FLOATS = ("f32", "f64", "f16", "bf16")
CARRY = "CC.CF"  # name of the flag


def _float_op(i: Instruction, kind: str, fn: Callable[..., Any], size: int) -> Step:
    """An operation in float64, rounded to the type, or to each half of a pair."""
    way = rounding(i)
    clamp = "sat" in i.words

    def one(*values: Any) -> Any:
        out = rounded(fn(*(v.astype(np.float64) for v in values)), values[0].dtype, way)
        return np.where(out > 0, np.minimum(out, out.dtype.type(1)), out.dtype.type(0)) if clamp else out

    if kind not in PAIRS:
        return computes(i, kind, one, size)
    half = np.dtype(TYPES[PAIRS[kind]])
    bits, whole = unsigned(half), np.dtype(f"u{2 * half.itemsize}")
    up = whole.type(8 * half.itemsize)

    def two(*values: Any) -> Any:
        low, high = (one(*((v >> whole.type(s)).astype(bits).view(half) for v in values)) for s in (0, int(up)))
        return np.asarray(low).view(bits).astype(whole) | np.asarray(high).view(bits).astype(whole) << up

    return computes(i, f"b{8 * whole.itemsize}", two, size)


FLOAT_OPS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, sum_to_odd), "sub": (2, lambda a, b: sum_to_odd(a, -b)), "mul": (2, lambda a, b: a * b),
    "fma": (3, lambda a, b, c: sum_to_odd(a * b, c)), "mad": (3, lambda a, b, c: sum_to_odd(a * b, c)),
    "div": (2, lambda a, b: a / b),
    "min": (2, lambda *values: reduce(np.fmin, values)), "max": (2, lambda *values: reduce(np.fmax, values)),
    "neg": (1, lambda a: -a), "abs": (1, np.abs), "rcp": (1, lambda a: 1 / a),
    "sqrt": (1, np.sqrt), "rsqrt": (1, lambda a: 1 / np.sqrt(a)), "ex2": (1, np.exp2), "lg2": (1, np.log2), "sin": (1, np.sin),
    "cos": (1, np.cos), "tanh": (1, np.tanh),
}  # fmt: skip


def _signed_div(a: Any, b: Any) -> Any:
    if np.any(b == 0):
        raise EmulationError("an integer is divided by zero")
    return (np.abs(a.astype(object)) // np.abs(b.astype(object)) * np.sign(a) * np.sign(b)).astype(a.dtype)


INTEGER_OPS: dict[str, tuple[int, Callable[..., Any]]] = {
    "add": (2, lambda a, b: a + b), "sub": (2, lambda a, b: a - b), "min": (2, np.minimum), "max": (2, np.maximum),
    "and": (2, lambda a, b: a & b), "or": (2, lambda a, b: a | b), "xor": (2, lambda a, b: a ^ b), "not": (1, np.invert),
    "neg": (1, np.negative), "abs": (1, np.abs), "div": (2, _signed_div), "rem": (2, lambda a, b: a - _signed_div(a, b) * b),
}  # fmt: skip


@opcode(*(INTEGER_OPS | FLOAT_OPS))
def _plain(i: Instruction) -> Step:
    kind = i.words[-1]
    if "cc" in i.words:
        return _with_carry(i)
    if i.op in ("mul", "mad") and kind not in FLOATS and kind not in PAIRS:
        return _product(i)
    table = FLOAT_OPS if kind in FLOATS or kind in PAIRS else INTEGER_OPS
    if i.op not in table:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    size, fn = table[i.op]
    if table is FLOAT_OPS and i.op in ("min", "max"):
        size = max(size, len(i.operands) - 1)  # two or three
    if len(i.operands) != size + 1:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    if i.words[-2] == "f32" and kind in ("bf16", "f16"):
        return _mixed(i, size, fn)
    return _float_op(i, kind, fn, size) if table is FLOAT_OPS else computes(i, kind, fn, size)


def _mixed(i: Instruction, size: int, fn: Callable[..., Any]) -> Step:
    """In float32, where all sources but the last are of the 16-bit type."""
    target, *sources = i.operands
    kinds = [TYPES[i.words[-1]]] * (size - 1) + [np.float32]
    way = rounding(i)

    def run(lanes: Lanes, mask: Mask) -> None:
        values = [lanes.read(source, kind).astype(np.float64) for source, kind in zip(sources, kinds, strict=True)]
        lanes.write(target, np.asarray(rounded(fn(*values), np.dtype(np.float32), way)), mask)

    return run


def _product(i: Instruction) -> Step:
    """mul and mad of integers: the low half of the product, the high one, or all of it."""
    part, kind = i.words[1], TYPES[i.words[-1]]
    bits = 8 * np.dtype(kind).itemsize
    target, *sources = i.operands
    wide = {8: np.int16, 16: np.int32, 32: np.int64}.get(bits) if np.issubdtype(kind, np.signedinteger) else (
        {8: np.uint16, 16: np.uint32, 32: np.uint64}.get(bits)
    )  # fmt: skip
    if part != "lo" and wide is None:
        raise EmulationError(f"the instruction '{i.text}' is not known here")

    def run(lanes: Lanes, mask: Mask) -> None:
        a, b = (lanes.read(source, kind) for source in sources[:2])
        if part == "lo":
            out = a * b
        else:
            out = a.astype(wide) * b.astype(wide)
            if part == "hi":
                out = (out >> out.dtype.type(bits)).astype(kind)
        if len(sources) == 3:
            out = out + lanes.read(sources[2], out.dtype)
        lanes.write(target, np.asarray(out), mask)

    return run


@opcode("addc", "madc")
def _with_carry(i: Instruction) -> Step:
    """32-bit words of longer numbers: `addc` and `madc` take the carry that the last one with `cc` left."""
    if i.words[-1] != "u32" or i.op not in ("add", "addc", "mad", "madc"):
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    target, *sources = i.operands
    shift = np.uint64(32 if "hi" in i.words else 0)

    def run(lanes: Lanes, mask: Mask) -> None:
        values = [lanes.read(source, np.uint32).astype(np.uint64) for source in sources]
        total = (
            (values[0] * values[1] >> shift & np.uint64(0xFFFFFFFF)) + values[2]
            if "mad" in i.op
            else values[0] + values[1]
        )
        if i.op.endswith("c"):
            total = total + lanes.registers[CARRY].astype(np.uint64)
        lanes.write(target, np.asarray(total.astype(np.uint32)), mask)
        if "cc" in i.words:
            lanes.write(Reg(CARRY, 32), np.asarray((total >> np.uint64(32)).astype(np.uint32)), mask)

    return run


@opcode("shl", "shr")
def _shift(i: Instruction) -> Step:
    """By amounts of any size; those of the width or more leave nothing but the sign."""
    kind, left = TYPES[i.words[-1]], i.op == "shl"
    bits = 8 * np.dtype(kind).itemsize
    target, source, amount = i.operands

    def run(lanes: Lanes, mask: Mask) -> None:
        value, by = lanes.read(source, kind), lanes.read(amount, np.uint32)
        signed = np.issubdtype(value.dtype, np.signedinteger)
        inside = np.minimum(by, np.uint32(bits - 1)).astype(value.dtype)
        out = value << inside if left else value >> inside
        if not (signed and not left):
            out = np.where(by < bits, out, value.dtype.type(0))
        lanes.write(target, np.asarray(out), mask)

    return run


@opcode("shf")
def _funnel(i: Instruction) -> Step:
    """The high (left) or low (right) half of two words together, shifted."""
    left, wrap = i.words[1] == "l", i.words[2] == "wrap"

    def run(a: Any, b: Any, c: Any) -> Any:
        by = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return computes(i, "u32", run, 3)


@opcode("bfe")
def _field(i: Instruction) -> Step:
    """Bits from a place on, so many; of a signed type with the sign of the last of them."""
    kind = TYPES[i.words[-1]]
    bits = 8 * np.dtype(kind).itemsize
    target, source, begin, size = i.operands

    def run(lanes: Lanes, mask: Mask) -> None:
        value = lanes.read(source, unsigned(kind)).astype(np.uint64)
        at, many = (lanes.read(x, np.uint32).astype(np.uint64) & np.uint64(255) for x in (begin, size))
        out = np.where(at < 64, value >> np.minimum(at, np.uint64(63)), np.uint64(0))
        keep = np.where(many < 64, (np.uint64(1) << np.minimum(many, np.uint64(63))) - np.uint64(1), ~np.uint64(0))
        out = out & keep
        if np.issubdtype(kind, np.signedinteger):
            last = np.minimum(at + many - np.uint64(1), np.uint64(bits - 1))
            negative = (value >> last & np.uint64(1) == 1) & (many > 0)
            out = np.where(negative, out | ~keep, out)
        lanes.write(target, np.asarray(out).astype(unsigned(kind)), mask)

    return run


@opcode("prmt")
def _permute(i: Instruction) -> Step:
    if len(i.words) > 2:
        raise EmulationError(f"the instruction '{i.text}' is not known here")

    def run(a: Any, b: Any, selector: Any) -> Any:
        both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.uint32(0)
        for n in range(4):
            nibble = selector >> np.uint32(4 * n)
            byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(
                255
            )
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            out = out | np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * n)
        return out

    return computes(i, "b32", run, 3)


@opcode("lop3")
def _logic(i: Instruction) -> Step:
    """Any function of three bits: bit 4a + 2b + c of the last operand."""
    table = i.operands[4].value  # type: ignore[union-attr]

    def run(a: Any, b: Any, c: Any) -> Any:
        out = np.uint32(0)
        for n in range(8):
            if table >> n & 1:
                out = out | (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        return out

    return computes(i, "b32", run, 3)


@opcode("clz", "popc")
def _count(i: Instruction) -> Step:
    bits = 8 * np.dtype(TYPES[i.words[-1]]).itemsize

    def run(a: Any) -> Any:
        ones = np.zeros(np.shape(a), np.uint32)
        for n in range(bits):
            if i.op == "popc":
                ones = ones + (a >> a.dtype.type(n) & a.dtype.type(1)).astype(np.uint32)
            else:
                ones = ones + (a >> a.dtype.type(n) == 0)
        return ones.astype(np.uint32)

    return computes(i, i.words[-1], run, 1)


COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: (a != b) & (a == a) & (b == b), "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b), "neu": lambda a, b: a != b, "equ": lambda a, b: ~(a < b) & ~(a > b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip


@opcode("setp")
def _compare(i: Instruction) -> Step:
    """A comparison, perhaps joined with a predicate."""
    kind, fn = TYPES[i.words[-1]], COMPARISONS[i.words[1]]
    join = next((w for w in i.words[2:-1] if w in ("and", "or", "xor")), None)
    target = i.operands[0]
    if isinstance(target, Both):
        raise EmulationError(f"the instruction '{i.text}' is not known here")

    def run(lanes: Lanes, mask: Mask) -> None:
        a, b = (lanes.read(x, kind) for x in i.operands[1:3])
        out = np.asarray(fn(a, b), bool)
        if join:
            other = lanes.read(i.operands[3], np.bool_)
            out = {"and": out & other, "or": out | other, "xor": out ^ other}[join]
        lanes.write(target, np.asarray(out), mask)

    return run


@opcode("selp")
def _choose(i: Instruction) -> Step:
    kind = unsigned(TYPES[i.words[-1]])
    target, a, b, which = i.operands

    def run(lanes: Lanes, mask: Mask) -> None:
        lanes.write(target, np.where(lanes.read(which, np.bool_), lanes.read(a, kind), lanes.read(b, kind)), mask)

    return run
