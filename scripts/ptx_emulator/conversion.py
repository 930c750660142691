"""Rounding of floating-point numbers, and the instruction that converts between types."""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from .ptx import DTYPES, PtxInstruction, unsupported
from .thread_group import Executor, Mask, ThreadGroup, handles

PACKED_TYPES = {"bf16x2": "bf16", "f16x2": "f16", "f32x2": "f32"}  # types of two elements, and the type of an element
ROUNDING_MODES = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")  # PTX ISA, "Rounding Modifiers"
ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def rounding_mode(inst: PtxInstruction) -> str:
    return next((token for token in inst.tokens if token in ROUNDING_MODES), "rn")


def add_round_to_odd(a: Any, b: Any) -> Any:
    """Return a + b in float64, rounded to odd: if inexact, truncated and with the last bit set.

    A second rounding to a shorter type then gives the correctly rounded sum (Boldo and Melquiond, "Emulation of a FMA
    and correctly rounded sums: proved algorithms using rounding to odd", 2008). The error term is Knuth's TwoSum.
    """
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)  # exactly a + b - total
    inexact = (error != 0) & np.isfinite(total)
    if not np.any(inexact):
        return total
    truncated = np.where(error * total < 0, np.nextafter(total, 0), total)
    return np.where(inexact, (truncated.view(np.uint64) | np.uint64(1)).view(np.float64), total)


def float32_round_to_odd(x: Any) -> Any:
    """Convert float64 to float32, rounded as `add_round_to_odd` does."""
    nearest = x.astype(np.float32)
    too_large = np.abs(nearest.astype(np.float64)) > np.abs(x)
    truncated = np.where(too_large, np.nextafter(nearest, np.float32(0)), nearest)
    inexact = (truncated.astype(np.float64) != x) & np.isfinite(x)
    return (truncated.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)


def round_float64(inst: PtxInstruction, x: Any, dtype: Any) -> Any:
    """Convert float64 to a floating-point dtype, rounded as the instruction says."""
    x, mode = np.asarray(x), rounding_mode(inst)
    if dtype == np.float64:
        return x
    if dtype in (ml_dtypes.bfloat16, np.float16):
        if mode != "rn":
            raise unsupported(inst)
        return float32_round_to_odd(x).astype(dtype)
    nearest = x.astype(np.float32)
    if mode not in ("rm", "rp", "rz"):
        return nearest
    exact = nearest.astype(np.float64)
    if mode == "rz":
        return np.where(np.abs(exact) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)
    wrong_side, limit = (exact > x, -np.inf) if mode == "rm" else (exact < x, np.inf)
    return np.where(wrong_side, np.nextafter(nearest, np.float32(limit)), nearest)


def flush_subnormals(x: Any) -> Any:
    """Replace subnormal float32 numbers by zeros of the same sign (the modifier `.ftz`)."""
    if x.dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def elementwise(inst: PtxInstruction, types: Sequence[str], fn: Callable[..., Any]) -> Executor:
    """Return an executor that passes the sources, read as these PTX types, to `fn` and writes the result."""
    target, dtypes, flush = inst.operands[0], [DTYPES[kind] for kind in types], "ftz" in inst.tokens

    def execute(group: ThreadGroup, mask: Mask) -> None:
        values = [group.read(*source) for source in zip(inst.operands[1:], dtypes, strict=False)]
        if flush:
            values = [flush_subnormals(value) for value in values]
        result = np.asarray(fn(*values))
        group.write(target, flush_subnormals(result) if flush else result, mask)

    return execute


@handles("cvt")
def _convert(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Data Movement and Conversion Instructions: cvt"."""
    to, source = inst.tokens[-2:]
    mode, saturate = rounding_mode(inst), "sat" in inst.tokens
    if to in PACKED_TYPES and source == "f32":  # the first source becomes the high half
        half = DTYPES[PACKED_TYPES[to]]

        def pack(high: Any, low: Any) -> Any:
            halves = (round_float64(inst, x.astype(np.float64), half) for x in (high, low))
            high, low = (x.view(np.uint16).astype(np.uint32) for x in halves)
            return high << np.uint32(16) | low

        return elementwise(inst, ("f32", "f32"), pack)
    if to == "tf32" and mode == "rna":  # 10 bits of mantissa; halves are rounded away from zero
        return elementwise(inst, ["b32"], lambda x: (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if to not in DTYPES or source not in DTYPES:
        raise unsupported(inst)
    dtype = DTYPES[to]
    to_integer, from_integer = (np.issubdtype(DTYPES[kind], np.integer) for kind in (to, source))

    def convert(x: Any) -> Any:
        if not to_integer:
            value = x.astype(np.float64)
            if mode.endswith("i"):
                value = ROUND_TO_INTEGER[mode](value)
            if saturate and not from_integer:
                value = np.where(value > 0, np.minimum(value, 1), 0)
            return round_float64(inst, value, dtype)
        limits = np.iinfo(dtype)
        if from_integer:
            return np.asarray(np.clip(x.astype(object), limits.min, limits.max) if saturate else x).astype(dtype)
        rounded = ROUND_TO_INTEGER[mode](x.astype(np.float64))  # out of range: the nearest number in it; NaN: 0
        finite = np.nan_to_num(rounded, posinf=float(limits.max), neginf=float(limits.min))
        clipped = np.clip(finite, limits.min, limits.max).astype(dtype)
        return np.where(rounded >= limits.max, dtype(limits.max), clipped)

    return elementwise(inst, [source], convert)
