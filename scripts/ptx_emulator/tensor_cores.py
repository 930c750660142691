"""Products of small matrices that a warp, or four of them, hold together, and the moves that bring matrices to registers.

Sums are made in float32, in numpy's order; how the hardware adds and rounds within one product NVIDIA does not say.
"""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np

from scripts.ptx_emulator.machine import WARP, Lanes, Mask, Step, opcode
from scripts.ptx_emulator.ptx import EmulationError, Instruction, Operand, Vector

LANE = np.arange(WARP)
ROW, QUAD = LANE // 4, LANE % 4  # "groupID" and "threadID_in_group" of the manual


def parts_of(operand: Operand) -> list[Operand]:
    return operand.parts if isinstance(operand, Vector) else [operand]


def whole_warps(mask: Mask, group: int = WARP) -> Any:
    """Numbers of the warps, or groups of warps, that run; None: all."""
    if mask is None:
        return slice(None)
    some = mask.reshape(-1, group)
    if (some.any(1) != some.all(1)).any():
        raise EmulationError("some threads of a warp take part, others do not")
    return some[:, 0]


def _words(lanes: Lanes, operand: Operand, group: int = WARP) -> list[Any]:
    """uint32 `[groups, threads]` of each register."""
    return [lanes.whole(lanes.read(part, np.uint32)).reshape(-1, group) for part in parts_of(operand)]


def numbers(words: Any, kind: str) -> Any:
    """float32 `[..., 2]` of words of two bfloat16 or float16, or `[..., 1]` of one tf32."""
    if kind == "tf32":  # the bits below the first ten are not read
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    half = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}[kind]
    return np.stack([(words >> np.uint32(s)).astype(np.uint16).view(half).astype(np.float32) for s in (0, 16)], axis=-1)


def _left(words: list[Any], kind: str) -> Any:
    """`[warps, 16, k]` from four registers a thread: rows ROW and ROW + 8, two parts of the columns."""
    each = 2 if kind != "tf32" else 1
    out = np.empty((len(words[0]), 16, 8 * each), np.float32)
    for n, word in enumerate(words):
        values = numbers(np.ascontiguousarray(word), kind)
        for e in range(each):
            out[:, ROW + 8 * (n % 2), each * QUAD + 4 * each * (n // 2) + e] = values[:, :, e]
    return out


def _right(words: list[Any], kind: str) -> Any:
    """`[warps, k, 8]` from registers that hold two parts of the rows."""
    each = 2 if kind != "tf32" else 1
    out = np.empty((len(words[0]), 4 * each * len(words), 8), np.float32)
    for n, word in enumerate(words):
        values = numbers(np.ascontiguousarray(word), kind)
        for e in range(each):
            out[:, each * QUAD + 4 * each * n + e, ROW] = values[:, :, e]
    return out


@opcode("mma")
def _mma(i: Instruction) -> Step:
    shape, kinds = i.words[3], i.words[6:]
    kind = kinds[1]
    known = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")}
    if i.words[4:6] != ("row", "col") or kinds[0] != "f32" or kinds[3] != "f32" or (shape, kind) not in known:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    target, a, b, c = i.operands

    def run(lanes: Lanes, mask: Mask) -> None:
        whole_warps(mask)
        left, right = _left(_words(lanes, a), kind), _right(_words(lanes, b), kind)
        product = np.matmul(left, right)
        for n, (part, add) in enumerate(zip(parts_of(target), _words(lanes, c), strict=True)):
            value = product[:, ROW + 8 * (n // 2), 2 * QUAD + n % 2] + add.view(np.float32)
            lanes.write(part, value.reshape(-1), mask)

    return run


@opcode("ldmatrix", "stmatrix")
def _matrices(i: Instruction) -> Step:
    """Matrices of 8 rows of 16 bytes; the addresses of those of matrix n are in threads 8 n to 8 n + 7."""
    many, turned = int(i.words[i.words.index("m8n8") + 1][1:]), "trans" in i.words
    load = i.op == "ldmatrix"
    where, parts = (i.operands[1], parts_of(i.operands[0])) if load else (i.operands[0], parts_of(i.operands[1]))

    def run(lanes: Lanes, mask: Mask) -> None:
        some = whole_warps(mask)
        named = np.zeros((lanes.count // WARP, WARP), bool)  # threads whose addresses count
        named[some, : 8 * many] = True
        places, by = lanes.places("shared", where, named.reshape(-1)), lanes.by("shared")[named.reshape(-1)]
        if load:
            rows = lanes.shared.lines(places, 16, by).view(np.uint16).reshape(-1, many, 8, 8)
            for n, part in enumerate(parts):
                halves = [rows[:, n, 2 * QUAD + e, ROW] if turned else rows[:, n, ROW, 2 * QUAD + e] for e in (0, 1)]
                value = np.zeros((lanes.count // WARP, WARP), np.uint32)
                value[some] = halves[0].astype(np.uint32) | halves[1].astype(np.uint32) << np.uint32(16)
                lanes.write(part, value.reshape(-1), mask)
            return
        rows = np.empty((len(places) // (8 * many), many, 8, 8), np.uint16)
        for n, part in enumerate(parts):
            word = lanes.whole(lanes.read(part, np.uint32)).reshape(-1, WARP)[some]
            for e in (0, 1):
                row, column = (2 * QUAD + e, ROW) if turned else (ROW, 2 * QUAD + e)
                rows[:, n, row, column] = (word >> np.uint32(16 * e)).astype(np.uint16)
        lanes.shared.store_lines(places, rows.reshape(-1, 8).view(np.uint8), by)

    return run


# Hopper: products of four warps, one or both matrices in shared memory


def places_of_matrix(descriptor: Any, width: int, rows: int, columns: int, size: int, turned: bool) -> Any:
    """int64 `[n, rows, columns]`: where elements of n matrices lie in the shared memory of their blocks, columns along the sum.

    Args:
        descriptor: int64 `[n]`, which has the beginning and two distances.
        width: bytes of a line; places are swapped, in units of 16 bytes, by the number of the line.
        size: bytes of an element.
        turned: neighbours along the rows lie together, not those along the columns.

    Layouts are the canonical ones of the manual (9.7.15.5.1).
    """
    begin = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    each = 16 // size
    row, column = np.arange(rows)[:, None], np.arange(columns)[None]
    leading, stride = leading[:, None, None], stride[:, None, None]
    if not turned:
        unit = leading if width == 16 else 16  # from one unit of a row to the next
        offset = row % 8 * width + row // 8 * stride + column // each * unit + column % each * size
    else:
        per_line = width // size
        far, near = (stride, leading) if width == 16 else (leading, stride)
        offset = row % per_line * size + row // per_line * far + column % 8 * width + column // 8 * near
    places = begin[:, None, None] + offset
    swap = {16: 0, 32: 1, 64: 3, 128: 7}[width]
    return places ^ (places >> 7 & swap) << 4


def _product_groups(i: Instruction) -> Step:
    """Products read shared memory until somebody waits for their group."""
    if i.words[1] == "fence":
        return lambda lanes, mask: None
    left = int(i.operands[0].value) if i.operands else 0  # type: ignore[union-attr]

    def run(lanes: Lanes, mask: Mask) -> None:
        here = np.zeros(len(lanes.closed), bool)
        here[whole_warps(mask, 4 * WARP)] = True
        if i.words[1] == "commit_group":
            lanes.closed = lanes.closed + here
            return
        kept = []
        for groups, places, size, number in lanes.products:
            done = here[groups] & (number < lanes.closed[groups] - left)
            if done.any():  # they have read up to now
                by = np.broadcast_to(
                    lanes.by("shared").reshape(-1, 4 * WARP)[groups[done], :1, None], places[done].shape
                )
                lanes.shared.load(places[done], size, by=by)
            if not done.all():
                kept.append((groups[~done], places[~done], size, number[~done]))
        lanes.products = kept

    return run


@opcode("wgmma")
def _wgmma(i: Instruction) -> Step:
    if i.words[1] in ("fence", "commit_group", "wait_group"):
        return _product_groups(i)
    m, n, k = (int(x) for x in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", i.words[4]).groups())  # type: ignore[union-attr]
    accumulated, kind, other = i.words[5:]
    if i.words[1] != "mma_async" or accumulated != "f32" or kind != other or kind not in ("bf16", "f16", "tf32"):
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    target, a, b, *flags = i.operands
    scale, signs, turns = flags[0], flags[1:3], [getattr(x, "value", 0) == 1 for x in flags[3:]]
    if any(getattr(x, "value", 0) != 1 for x in signs):
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    group, size = 4 * WARP, 4 if kind == "tf32" else 2

    def matrix(lanes: Lanes, operand: Operand, rows: int, turned: bool, some: Any) -> Any:
        descriptor = lanes.whole(lanes.read(operand, np.uint64)).reshape(-1, group)[some]
        if (descriptor != descriptor[:, :1]).any():
            raise EmulationError("the threads of a product name different matrices")
        descriptor = descriptor[:, 0].view(np.int64)
        mode = np.unique(descriptor >> 62 & 3)
        if len(mode) > 1 or np.any(descriptor >> 49 & 7):
            raise EmulationError("descriptors of matrices that differ in more than their place are not known here")
        places = places_of_matrix(descriptor, {0: 16, 1: 128, 2: 64, 3: 32}[int(mode[0])], rows, k, size, turned)
        of_group = lanes.block.reshape(-1, group)[some, 0]
        room = len(lanes.shared.bytes) // lanes.blocks
        if int(places.max()) + size > lanes.shared_bytes:
            raise EmulationError("a matrix reaches beyond the shared memory of its block")
        places = places + of_group[:, None, None] * room
        by = np.broadcast_to(lanes.by("shared").reshape(-1, group)[some, :1, None], places.shape)
        [words] = lanes.shared.load(places, size, by=by)
        groups = np.arange(lanes.count // group)[some]
        lanes.products.append((groups, places, size, lanes.closed[groups]))
        return numbers(words.astype(np.uint32), kind)[..., 0]

    def run(lanes: Lanes, mask: Mask) -> None:
        some = whole_warps(mask, group)
        right = matrix(lanes, b, n, turns[-1] if turns else False, some)
        if isinstance(a, Vector):
            words = [np.ascontiguousarray(word[some]).reshape(-1, WARP) for word in _words(lanes, a, group)]
            left = _left(words, kind).reshape(-1, m, k)
        else:
            left = matrix(lanes, a, m, turns[0] if turns else False, some)
        product = np.matmul(left, right.transpose(0, 2, 1)).reshape(-1, 4, 16, n)
        adds = lanes.whole(lanes.read(scale, np.bool_))
        for number, part in enumerate(parts_of(target)):
            columns = 8 * (number // 4) + 2 * QUAD + number % 2
            value = np.zeros((lanes.count // group, 4, WARP), np.float32)
            value[some] = product[:, :, ROW + 8 * (number // 2 % 2), columns]
            value = value.reshape(-1)
            before = lanes.registers.get(part.name)  # type: ignore[union-attr]
            if before is not None:
                value = np.where(adds, value + lanes.whole(before).view(np.float32), value)
            lanes.write(part, value, mask)

    return run
