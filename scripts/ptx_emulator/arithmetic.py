"""Arithmetic, logic, comparison and selection of registers."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from .conversion import PACKED_TYPES, add_round_to_odd, elementwise, round_float64
from .ptx import DTYPES, DestPair, EmulationError, PtxInstruction, Reg, immediate, unsupported
from .thread_group import Executor, Mask, ThreadGroup, handles, unsigned

FLOAT_TYPES = ("f32", "f64", "f16", "bf16", *PACKED_TYPES)
CARRY = Reg("CC.CF", 32)  # the carry flag
Operation = tuple[int, Callable[..., Any]]  # number of sources, function of them

FLOAT_OPERATIONS: dict[str, Operation] = {
    "add": (2, add_round_to_odd), "sub": (2, lambda a, b: add_round_to_odd(a, -b)), "mul": (2, lambda a, b: a * b),
    "fma": (3, lambda a, b, c: add_round_to_odd(a * b, c)), "mad": (3, lambda a, b, c: add_round_to_odd(a * b, c)),
    "div": (2, lambda a, b: a / b), "neg": (1, lambda a: -a), "abs": (1, np.abs), "rcp": (1, lambda a: 1 / a),
    "min": (2, lambda *values: reduce(np.fmin, values)), "max": (2, lambda *values: reduce(np.fmax, values)),
    "sqrt": (1, np.sqrt), "rsqrt": (1, lambda a: 1 / np.sqrt(a)), "ex2": (1, np.exp2), "lg2": (1, np.log2),
    "sin": (1, np.sin), "cos": (1, np.cos), "tanh": (1, np.tanh),
}  # fmt: skip


def _divide(a: Any, b: Any) -> Any:
    if np.any(b == 0):
        raise EmulationError("an integer is divided by zero")
    return (np.abs(a.astype(object)) // np.abs(b.astype(object)) * np.sign(a) * np.sign(b)).astype(a.dtype)


INTEGER_OPERATIONS: dict[str, Operation] = {
    "add": (2, np.add), "sub": (2, np.subtract), "min": (2, np.minimum), "max": (2, np.maximum),
    "and": (2, np.bitwise_and), "or": (2, np.bitwise_or), "xor": (2, np.bitwise_xor), "not": (1, np.invert),
    "neg": (1, np.negative), "abs": (1, np.abs), "div": (2, _divide), "rem": (2, lambda a, b: a - _divide(a, b) * b),
}  # fmt: skip


@handles(*(INTEGER_OPERATIONS | FLOAT_OPERATIONS))
def _arithmetic(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Integer Arithmetic", "Floating Point", "Half Precision" and "Logic and Shift Instructions"."""
    if "cc" in inst.tokens:
        return _extended_precision(inst)
    is_float = inst.type in FLOAT_TYPES
    if inst.opcode in ("mul", "mad") and not is_float:
        return _integer_product(inst)
    table = FLOAT_OPERATIONS if is_float else INTEGER_OPERATIONS
    if inst.opcode not in table:
        raise unsupported(inst)
    num_sources, fn = table[inst.opcode]
    if is_float and inst.opcode in ("min", "max"):
        num_sources = max(num_sources, len(inst.operands) - 1)  # they take three sources, too
    if len(inst.operands) != num_sources + 1:
        raise unsupported(inst)
    if not is_float:
        return elementwise(inst, [inst.type] * num_sources, fn)
    return _float_operation(inst, fn, num_sources)


def _float_operation(inst: PtxInstruction, fn: Callable[..., Any], num_sources: int) -> Executor:
    """Apply a function in float64 and round to the type; of a packed type, to each of its two elements.

    PTX ISA, "Mixed Precision Floating Point Instructions": float32, but all sources except the last have 16 bits.
    """
    mixed = inst.tokens[-2] == "f32" and inst.type in ("bf16", "f16")
    dtype = np.dtype(np.float32 if mixed else DTYPES[PACKED_TYPES.get(inst.type, inst.type)])

    def apply(*values: Any) -> Any:
        result = round_float64(inst, fn(*(value.astype(np.float64) for value in values)), dtype)
        if "sat" not in inst.tokens:
            return result
        return np.where(result > 0, np.minimum(result, dtype.type(1)), dtype.type(0))

    if inst.type not in PACKED_TYPES:
        return elementwise(inst, [inst.type] * (num_sources - 1) + ["f32" if mixed else inst.type], apply)
    bits, pair = unsigned(dtype), np.dtype(f"u{2 * dtype.itemsize}")
    shifts = (pair.type(0), pair.type(8 * dtype.itemsize))

    def apply_to_pair(*pairs: Any) -> Any:
        results = (apply(*((value >> shift).astype(bits).view(dtype) for value in pairs)) for shift in shifts)
        low, high = (np.asarray(result).view(bits).astype(pair) for result in results)
        return low | high << shifts[1]

    return elementwise(inst, [f"b{8 * pair.itemsize}"] * num_sources, apply_to_pair)


def _integer_product(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Integer Arithmetic Instructions: mul, mad": the low or high half of the product, or all of it."""
    half, dtype = inst.tokens[1], np.dtype(DTYPES[inst.type])
    bits = 8 * dtype.itemsize
    if half != "lo" and bits == 64:
        raise unsupported(inst)
    double = f"{'s' if dtype.kind == 'i' else 'u'}{2 * bits}"

    def multiply(a: Any, b: Any, *addend: Any) -> Any:
        if half != "lo":
            a, b = a.astype(DTYPES[double]), b.astype(DTYPES[double])
        product = (a * b >> a.dtype.type(bits)).astype(dtype) if half == "hi" else a * b
        return product + addend[0] if addend else product

    types = [inst.type, inst.type, double if half == "wide" else inst.type]
    return elementwise(inst, types[: len(inst.operands) - 1], multiply)


@handles("addc", "madc")
def _extended_precision(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Extended-Precision Integer Arithmetic Instructions: add.cc, addc, mad.cc, madc"."""
    if inst.type != "u32" or inst.opcode not in ("add", "addc", "mad", "madc"):
        raise unsupported(inst)
    target, *sources = inst.operands
    shift = np.uint64(32 if "hi" in inst.tokens else 0)

    def execute(group: ThreadGroup, mask: Mask) -> None:
        a, b, *addend = (group.read(source, np.uint32).astype(np.uint64) for source in sources)
        total = (a * b >> shift & np.uint64(0xFFFFFFFF)) + addend[0] if addend else a + b
        if inst.opcode.endswith("c"):
            total = total + group.registers[CARRY.name].astype(np.uint64)
        group.write(target, np.asarray(total.astype(np.uint32)), mask)
        if "cc" in inst.tokens:
            group.write(CARRY, np.asarray((total >> np.uint64(32)).astype(np.uint32)), mask)

    return execute


@handles("shl", "shr")
def _shift(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Logic and Shift Instructions: shl, shr". A shift by the width or more leaves only the sign."""
    left = inst.opcode == "shl"

    def shift(value: Any, amount: Any) -> Any:
        bits = 8 * value.dtype.itemsize
        clamped = np.minimum(amount, np.uint32(bits - 1)).astype(value.dtype)
        if not left and value.dtype.kind == "i":
            return value >> clamped
        return np.where(amount < bits, value << clamped if left else value >> clamped, value.dtype.type(0))

    return elementwise(inst, (inst.type, "u32"), shift)


@handles("shf")
def _funnel_shift(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Logic and Shift Instructions: shf": shift two joined words; the high (left) or low (right) word."""
    left, wrap = inst.tokens[1] == "l", inst.tokens[2] == "wrap"

    def shift(low: Any, high: Any, amount: Any) -> Any:
        distance = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        joined = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return ((joined << distance) >> np.uint64(32) if left else joined >> distance).astype(np.uint32)

    return elementwise(inst, ["u32"] * 3, shift)


@handles("bfe")
def _bit_field_extract(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Integer Arithmetic Instructions: bfe". A signed type extends the sign of the last bit of the field."""
    dtype = np.dtype(DTYPES[inst.type])
    one, most = np.uint64(1), np.uint64(63)

    def extract(source: Any, begin: Any, size: Any) -> Any:
        value = source.astype(np.uint64)
        first, length = (x.astype(np.uint64) & np.uint64(255) for x in (begin, size))
        field = np.where(length < 64, (one << np.minimum(length, most)) - one, ~np.uint64(0))
        result = np.where(first < 64, value >> np.minimum(first, most), np.uint64(0)) & field
        if dtype.kind == "i":
            last = np.minimum(first + length - one, np.uint64(8 * dtype.itemsize - 1))
            negative = (value >> last & one == 1) & (length > 0)
            result = np.where(negative, result | ~field, result)
        return np.asarray(result).astype(unsigned(dtype))

    return elementwise(inst, (f"b{8 * dtype.itemsize}", "u32", "u32"), extract)


@handles("prmt")
def _permute_bytes(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Data Movement and Conversion Instructions: prmt", in the default mode."""
    if len(inst.tokens) > 2:
        raise unsupported(inst)

    def permute(a: Any, b: Any, selector: Any) -> Any:
        joined = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result: Any = np.uint32(0)
        for n in range(4):
            nibble = selector >> np.uint32(4 * n)
            shift = np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64)
            byte = (joined >> shift).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * n)
        return result

    return elementwise(inst, ["b32"] * 3, permute)


@handles("lop3")
def _lookup_logic(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Logic and Shift Instructions: lop3": bit 4a + 2b + c of the last operand."""
    table = immediate(inst.operands[4])

    def look_up(a: Any, b: Any, c: Any) -> Any:
        result: Any = np.uint32(0)
        for n in range(8):
            if table >> n & 1:
                result = result | (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        return result

    return elementwise(inst, ["b32"] * 3, look_up)


@handles("clz", "popc")
def _count_bits(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Integer Arithmetic Instructions: clz, popc"."""

    def count(a: Any) -> Any:
        if inst.opcode == "popc":
            return np.bitwise_count(a).astype(np.uint32)
        return np.sum([a >> a.dtype.type(n) == 0 for n in range(8 * a.dtype.itemsize)], axis=0, dtype=np.uint32)

    return elementwise(inst, [inst.type], count)


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: (a != b) & (a == a) & (b == b), "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),  # u: true if an operand is NaN
    "equ": lambda a, b: ~(a < b) & ~(a > b), "neu": lambda a, b: a != b, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip


@handles("setp")
def _compare(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Comparison and Selection Instructions: setp", with an optional predicate that is combined."""
    compare = COMPARISONS[inst.tokens[1]]
    combine = next((INTEGER_OPERATIONS[x][1] for x in inst.tokens[2:-1] if x in ("and", "or", "xor")), None)
    if isinstance(inst.operands[0], DestPair):
        raise unsupported(inst)
    if combine is None:
        return elementwise(inst, [inst.type] * 2, compare)
    return elementwise(inst, (inst.type, inst.type, "pred"), lambda a, b, predicate: combine(compare(a, b), predicate))


@handles("selp")
def _select(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Comparison and Selection Instructions: selp"."""
    kind = f"b{8 * np.dtype(DTYPES[inst.type]).itemsize}"
    return elementwise(inst, (kind, kind, "pred"), lambda a, b, predicate: np.where(predicate, a, b))
