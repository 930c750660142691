"""Tensor cores of compute capability 10.0: products that one thread starts, in a memory of their own, and barriers that tell of
their end.

That memory has 128 lanes of 512 columns of 32 bits for each block; an address is lane * 2^16 + column. Products of 128 rows have
one in each lane, those of 64 rows 16 of them in the first half of each warp's 32 lanes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from scripts.ptx_emulator.machine import WARP, Lanes, Mask, Step, opcode
from scripts.ptx_emulator.ptx import Address, Both, EmulationError, Instruction, Operand
from scripts.ptx_emulator.tensor_cores import numbers, parts_of, places_of_matrix, whole_warps

LANES, COLUMNS = 128, 512
WIDTHS = {0: 16, 2: 128, 4: 64, 6: 32}  # bytes of a line, by the swizzle of a descriptor
KINDS = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::tf32": {2: "tf32"}}


def _tensor_memory(lanes: Lanes) -> Any:
    if lanes.tensor_memory is None:
        lanes.tensor_memory = np.full((lanes.blocks, LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
        lanes.unfinished = np.zeros((lanes.blocks, COLUMNS), bool)
    return lanes.tensor_memory


def _rows(count: int) -> Any:
    """The lane of each row of a product."""
    if count not in (64, LANES):
        raise EmulationError(f"products of {count} rows are not known here")
    row = np.arange(count)
    return row if count == LANES else row // 16 * WARP + row % 16


def _threads(lanes: Lanes, mask: Mask) -> Any:
    return np.arange(lanes.count) if mask is None else np.flatnonzero(mask)


@opcode("elect")
def _elect(i: Instruction) -> Step:
    """The first thread of each warp."""
    target = i.operands[0]
    assert isinstance(target, Both)

    def run(lanes: Lanes, mask: Mask) -> None:
        whole_warps(mask)
        lanes.write(target.first, np.uint32(0), mask)
        lanes.write(target.second, lanes.thread % WARP == 0, mask)

    return run


@opcode("tcgen05")
def _tcgen05(i: Instruction) -> Step:
    made = {"alloc": _alloc, "ld": _move, "st": _move, "mma": _product, "commit": _commit}
    if i.words[1].split("::")[0] in ("relinquish_alloc_permit", "dealloc", "wait", "fence"):
        return lambda lanes, mask: None
    if i.words[1] not in made or "cta_group::2" in i.words:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    return made[i.words[1]](i)


def _alloc(i: Instruction) -> Step:
    """One stretch of columns a block; where it begins is written to shared memory."""

    def run(lanes: Lanes, mask: Mask) -> None:
        _tensor_memory(lanes)
        threads = _threads(lanes, mask)
        places = lanes.places("shared", i.operands[0], threads)
        lanes.shared.store(places, [np.zeros(len(threads), np.uint32)], 4, lanes.by("shared")[threads])

    return run


def _move(i: Instruction) -> Step:
    """Between registers and tensor memory: a warp's 32 lanes, or 16 of them in two stretches of columns."""
    load, shape = i.words[1] == "ld", i.words[4]
    if shape not in ("32x32b", "16x32bx2") or i.words[-1] != "b32" or len(i.words) != 7:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    where, held = (i.operands[1], i.operands[0]) if load else (i.operands[0], i.operands[1 if shape == "32x32b" else 2])
    apart = 0 if shape == "32x32b" else int(i.operands[2 if load else 1].value)  # type: ignore[union-attr]
    parts = parts_of(held)

    def run(lanes: Lanes, mask: Mask) -> None:
        whole_warps(mask)
        memory, threads = _tensor_memory(lanes), _threads(lanes, mask)
        address = lanes.whole(lanes.address(where))[threads]
        own, warp = threads % WARP, lanes.thread[threads] // WARP % 4
        half = WARP if not apart else 16
        lane, column = (address >> 16) + own % half, (address & 0xFFFF) + own // half * apart
        if (lane // WARP != warp).any() or (column + len(parts) > COLUMNS).any():
            raise EmulationError("tensor memory beyond the lanes of a warp, or its last column")
        block = lanes.block[threads]
        for n, part in enumerate(parts):
            if not load:
                memory[block, lane, column + n] = lanes.whole(lanes.read(part, np.uint32))[threads]
                continue
            if lanes.unfinished[block, column + n].any():
                raise EmulationError("tensor memory is read before its product was waited for")
            value = np.zeros(lanes.count, np.uint32)
            value[threads] = memory[block, lane, column + n]
            lanes.write(part, value, mask)

    return run


def _product(i: Instruction) -> Step:
    """One thread of a block starts it; its shape and types are in a word, matrices of shared memory in descriptors."""
    target, a, b, about, adds = i.operands
    kinds = KINDS.get(i.words[3])
    if kinds is None:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    size = 4 if i.words[3] == "kind::tf32" else 2
    k = 32 // size

    def run(lanes: Lanes, mask: Mask) -> None:
        memory, threads = _tensor_memory(lanes), _threads(lanes, mask)
        block = lanes.block[threads]
        if len(np.unique(block)) != len(block):
            raise EmulationError("several threads of a block start one product")
        words = np.unique(lanes.whole(lanes.read(about, np.uint32))[threads])
        if len(words) != 1:
            raise EmulationError("blocks start products of different shapes")
        word = int(words[0])
        types, turned = [word >> 7 & 7, word >> 10 & 7], [word >> 15 & 1, word >> 16 & 1]
        if word >> 4 & 3 != 1 or types[0] != types[1] or types[0] not in kinds or word & 0x600C:
            raise EmulationError(f"products as {word:#x} says are not known here")
        kind, n, m = kinds[types[0]], (word >> 17 & 63) * 8, (word >> 24 & 31) * 16
        right = _matrix(lanes, b, threads, (n, k, size), bool(turned[1]), kind)
        if isinstance(a, Address):
            held = np.ascontiguousarray(memory[_cells(lanes, a, threads, m, 8)])
            left = numbers(held, kind).reshape(len(block), m, k)
        else:
            left = _matrix(lanes, a, threads, (m, k, size), bool(turned[0]), kind)
        product = np.matmul(left, right.transpose(0, 2, 1))
        at = _cells(lanes, target, threads, m, n)
        before = np.ascontiguousarray(memory[at]).view(np.float32)
        added = lanes.whole(lanes.read(adds, np.bool_))[threads][:, None, None]
        memory[at] = np.where(added, before + product, product).astype(np.float32).view(np.uint32)
        for one, columns in zip(block, at[2][:, 0], strict=True):
            lanes.unfinished[one, columns] = True
            lanes.started.setdefault(int(one), []).append(partial(lanes.unfinished[one].__setitem__, columns, False))

    return run


def _cells(lanes: Lanes, operand: Operand, threads: Any, rows: int, columns: int) -> tuple[Any, Any, Any]:
    """Block, lane and column of each element of a matrix in tensor memory. One of 64 rows may be in the second half of lanes."""
    address = lanes.whole(lanes.address(operand))[threads][:, None, None]
    lane = (address >> 16) + _rows(rows)[:, None]
    if lane.max() >= LANES:
        raise EmulationError(f"a matrix beyond the {LANES} lanes of tensor memory")
    return lanes.block[threads][:, None, None], lane, (address & 0xFFFF) + np.arange(columns)


def _matrix(lanes: Lanes, operand: Operand, threads: Any, shape: tuple[int, int, int], turned: bool, kind: str) -> Any:
    descriptor = lanes.whole(lanes.read(operand, np.uint64))[threads].view(np.int64)
    mode = np.unique(descriptor >> 61 & 7)
    if len(mode) != 1 or int(mode[0]) not in WIDTHS or np.any(descriptor >> 49 & 15):
        raise EmulationError("descriptors of matrices that differ in more than their place are not known here")
    rows, columns, size = shape
    places = places_of_matrix(descriptor, WIDTHS[int(mode[0])], rows, columns, size, turned)
    places = places + (lanes.block[threads] * (len(lanes.shared.bytes) // lanes.blocks))[:, None, None]
    by = np.broadcast_to(lanes.by("shared")[threads][:, None, None], places.shape)
    [words] = lanes.shared.load(places, size, by=by, until_released=True)
    for block, read in zip(lanes.block[threads], places, strict=True):
        lanes.started.setdefault(int(block), []).append(partial(lanes.shared.release, read, size))
    return numbers(words.astype(np.uint32), kind)[..., 0]


def _commit(i: Instruction) -> Step:
    """The barrier is arrived at when all products that were started have ended."""

    def run(lanes: Lanes, mask: Mask) -> None:
        threads = _threads(lanes, mask)
        places = lanes.places("shared", i.operands[0], threads)
        [state] = lanes.shared.load(places, 8)
        for thread, place, old in zip(threads, places, state, strict=True):
            phase, count, left = int(old) >> 63, int(old) >> 32 & 0xFFFF, int(old) & 0xFFFF
            left -= 1
            if left == 0:
                phase, left = phase ^ 1, count
            lanes.shared.store(place, [np.uint64(phase << 63 | count << 32 | left)], 8)
            lanes.ends.setdefault(int(place), []).extend(lanes.started.pop(int(lanes.block[thread]), []))

    return run


@opcode("mbarrier")
def _mbarrier(i: Instruction) -> Step:
    """In the eight bytes of a barrier: which phase it is in, how many arrivals end a phase, and how many are left."""
    what = i.words[1]
    if what == "init":

        def begin(lanes: Lanes, mask: Mask) -> None:
            threads = _threads(lanes, mask)
            count = lanes.whole(lanes.read(i.operands[1], np.uint32))[threads].astype(np.uint64)
            places = lanes.places("shared", i.operands[0], threads)
            lanes.shared.store(places, [count << np.uint64(32) | count], 8, lanes.by("shared")[threads])

        return begin
    if what == "inval":
        return lambda lanes, mask: None
    if what != "try_wait" or "parity" not in i.words:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    target, where, parity = i.operands

    def wait(lanes: Lanes, mask: Mask) -> None:
        threads = _threads(lanes, mask)
        places = lanes.places("shared", where, threads)
        [state] = lanes.shared.load(places, 8)
        wanted = lanes.whole(lanes.read(parity, np.uint32))[threads]
        ended = (state >> np.uint64(63)).astype(np.uint32) != wanted
        for place in np.unique(places[ended]):
            for end in lanes.ends.pop(int(place), []):
                end()
        done = np.zeros(lanes.count, bool)
        done[threads] = ended
        lanes.write(target, done, mask)

    return wait
