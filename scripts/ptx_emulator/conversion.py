"""Instructions that turn numbers of one type into another, and how numbers are rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from scripts.ptx_emulator.machine import TYPES, Lanes, Mask, Step, opcode
from scripts.ptx_emulator.ptx import EmulationError, Instruction

PAIRS = {"bf16x2": "bf16", "f16x2": "f16", "f32x2": "f32"}
LEAST = np.finfo(np.float32).tiny
ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")


def rounding(i: Instruction) -> str:
    return next((word for word in i.words if word in ROUNDINGS), "rn")


def sum_to_odd(a: Any, b: Any) -> Any:
    """a + b in float64, towards zero and with the last bit set where that is not exact: rounded once more to fewer bits, it comes
    out as if rounded once."""
    near = a + b
    part = near - a
    rest = (a - (near - part)) + (b - part)  # what `near` lacks, exactly
    inexact = (rest != 0) & np.isfinite(near)
    if not np.any(inexact):
        return near
    toward = np.where(rest * near < 0, np.nextafter(near, 0), near)
    return np.where(inexact, (toward.view(np.uint64) | np.uint64(1)).view(np.float64), near)


def to_odd(x: Any) -> Any:
    """float64 -> float32, rounded as `sum_to_odd` is."""
    near = x.astype(np.float32)
    toward = np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    inexact = (toward.astype(np.float64) != x) & np.isfinite(x)
    return (toward.view(np.uint32) | inexact.astype(np.uint32)).view(np.float32)


def rounded(x: Any, dtype: Any, way: str = "rn") -> Any:
    """float64 -> a shorter one; `way` as PTX names it."""
    x = np.asarray(x)
    if dtype == np.float64:
        return x
    if dtype in (ml_dtypes.bfloat16, np.float16):
        if way != "rn":
            raise EmulationError(f"rounding '{way}' to 16 bits is not known here")
        return to_odd(x).astype(dtype)
    near = x.astype(np.float32)
    exact = near.astype(np.float64)
    limit = {"rm": np.float32(-np.inf), "rp": np.float32(np.inf), "rz": np.float32(0)}.get(way)
    if limit is None:
        return near
    too_far = {"rm": exact > x, "rp": exact < x, "rz": np.abs(exact) > np.abs(x)}[way]
    return np.where(too_far, np.nextafter(near, limit), near)


def flushed(x: Any) -> Any:
    """Numbers below the least normal one as zeros."""
    return np.where(np.abs(x) < LEAST, np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def computes(i: Instruction, kind: str, fn: Callable[..., Any], operands: int | None = None) -> Step:
    """A step that gives `fn` the sources as arrays of a type, and writes what comes back."""
    target, sources = i.operands[0], i.operands[1 : None if operands is None else 1 + operands]
    dtype, ftz = TYPES[kind], "ftz" in i.words

    def run(lanes: Lanes, mask: Mask) -> None:
        values = [lanes.read(source, dtype) for source in sources]
        if ftz:
            values = [flushed(v) for v in values]
        out = np.asarray(fn(*values))
        lanes.write(target, flushed(out) if ftz else out, mask)

    return run


@opcode("cvt")
def _convert(i: Instruction) -> Step:
    target, *sources = i.operands
    to, source = i.words[-2], i.words[-1]
    way = rounding(i)
    if to in PAIRS and source == "f32":  # the first source becomes the high half
        half = TYPES[PAIRS[to]]

        def pair(high: Any, low: Any) -> Any:
            high, low = (
                rounded(x.astype(np.float64), half, way).view(np.uint16).astype(np.uint32) for x in (high, low)
            )
            return high << np.uint32(16) | low

        return computes(i, "f32", pair, 2)
    if to == "tf32" and way == "rna":  # to 10 bits behind the first one, halves away from zero
        return computes(i, "b32", lambda x: (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000), 1)
    if to not in TYPES or source not in TYPES:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    dtype = TYPES[to]
    ints = [np.issubdtype(TYPES[kind], np.integer) for kind in (to, source)]

    def one(x: Any) -> Any:
        if all(ints):
            if "sat" in i.words:
                limits = np.iinfo(dtype)
                x = np.clip(x.astype(object), limits.min, limits.max)
            return np.asarray(x).astype(dtype)
        if ints[0]:  # a number outside the type becomes the nearest in it
            whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[way](x.astype(np.float64))
            limits = np.iinfo(dtype)
            inside = np.clip(
                np.nan_to_num(whole, posinf=float(limits.max), neginf=float(limits.min)), limits.min, limits.max
            )
            return np.where(whole >= limits.max, dtype(limits.max), inside.astype(dtype))
        if ints[1]:
            return rounded(x.astype(np.float64), dtype, way)
        wide = x.astype(np.float64)
        if way.endswith("i"):
            wide = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[way](wide)
        if "sat" in i.words:
            wide = np.where(wide > 0, np.minimum(wide, 1), 0)
        return rounded(wide, dtype, way)

    return computes(i, source, one, len(sources))
