"""Instructions that move values: between registers and memory, between the threads of a warp, and copies that go on meanwhile."""

from __future__ import annotations

from typing import Any

import numpy as np

from scripts.ptx_emulator.machine import TYPES, WARP, Lanes, Mask, Step, opcode, unsigned
from scripts.ptx_emulator.memory import Memory
from scripts.ptx_emulator.ptx import Address, Both, EmulationError, Instruction, Name, Vector

SPACES = ("global", "shared", "local", "param")


def _memory(lanes: Lanes, space: str) -> Memory:
    return {"global": lanes.memory, "shared": lanes.shared, "local": lanes.local}[space]


def _some(by: Any, mask: Any) -> Any:
    return by if by is None or mask is None else by[mask]


def _space(i: Instruction) -> str:
    for word in i.words:
        if word.split("::")[0] in SPACES:
            return word.split("::")[0]
    raise EmulationError(f"the space of memory in '{i.text}' is not known here")


@opcode("mov")
def _move(i: Instruction) -> Step:
    target, source = i.operands
    kind = TYPES[i.words[-1]]
    kind = kind if kind == np.bool_ else unsigned(kind)
    return lambda lanes, mask: lanes.write(target, np.asarray(lanes.read(source, kind)), mask)


@opcode("cvta")
def _same_address(i: Instruction) -> Step:
    """Addresses of global memory are generic ones; those of shared memory have no use here but in it."""
    target, source = i.operands
    return lambda lanes, mask: lanes.write(target, np.asarray(lanes.read(source, np.uint64)), mask)


@opcode("ld")
def _load(i: Instruction) -> Step:
    space, kind = _space(i), TYPES[i.words[-1]]
    target, where = i.operands
    assert isinstance(where, Address)
    if space == "param":
        assert isinstance(where.base, Name)
        name = where.base.text
        return lambda lanes, mask: lanes.write(target, lanes.params[name], mask)
    parts = target.parts if isinstance(target, Vector) else [target]
    size = np.dtype(kind).itemsize

    def run(lanes: Lanes, mask: Mask) -> None:
        places, by = lanes.places(space, where, mask), _some(lanes.by(space), mask)
        found = _memory(lanes, space).load(places, size, len(parts), i.used, by)
        if mask is not None:
            loaded, found = found, []
            for some in loaded:
                all_of_them = np.zeros(lanes.count, some.dtype)
                all_of_them[mask] = some
                found.append(all_of_them)
        for part, value in zip(parts, found, strict=True):
            lanes.write(part, value.view(kind), mask)

    return run


@opcode("st")
def _store(i: Instruction) -> Step:
    space, kind = _space(i), unsigned(TYPES[i.words[-1]])
    where, source = i.operands
    parts = source.parts if isinstance(source, Vector) else [source]

    def run(lanes: Lanes, mask: Mask) -> None:
        some = slice(None) if mask is None else mask
        values = [lanes.whole(lanes.read(part, kind))[some] for part in parts]
        _memory(lanes, space).store(
            lanes.places(space, where, some), values, kind.itemsize, _some(lanes.by(space), some)
        )

    return run


@opcode("atom", "red")
def _atomic(i: Instruction) -> Step:
    """One thread after the other, in their order."""
    space, kind = _space(i), TYPES[i.words[-1]]
    change = next((w for w in i.words if w in ("add", "min", "max", "or", "and", "exch")), None)
    if change is None:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    do = {
        "add": lambda a, b: a + b, "min": np.minimum, "max": np.maximum, "or": lambda a, b: a | b, "and": lambda a, b: a & b,
        "exch": lambda a, b: b,
    }[change]  # fmt: skip
    target, where, source = (Name("_"), *i.operands) if i.op == "red" else i.operands
    size = np.dtype(kind).itemsize

    def run(lanes: Lanes, mask: Mask) -> None:
        some = np.arange(lanes.count) if mask is None else np.flatnonzero(mask)
        memory, values = _memory(lanes, space), lanes.whole(lanes.read(source, kind))
        before = np.zeros(lanes.count, kind)
        for lane, place in zip(some, lanes.places(space, where, some), strict=True):
            [old] = memory.load(place, size)
            before[lane] = old.view(kind)
            memory.store(place, [np.asarray(do(before[lane], values[lane])).view(old.dtype)], size)
        lanes.write(target, before, mask)

    return run


@opcode("shfl")
def _shuffle(i: Instruction) -> Step:
    """Each thread gets a value of another one of its warp, or keeps its own where that one is outside its segment."""
    way, (target, source, other, clamp, _) = i.words[2], i.operands
    found_at = None
    if isinstance(target, Both):
        target, found_at = target.first, target.second

    def run(lanes: Lanes, mask: Mask) -> None:
        value = lanes.whole(lanes.read(source, np.uint32)).reshape(-1, WARP)
        by, c = (lanes.whole(lanes.read(x, np.uint32)).astype(np.int64).reshape(-1, WARP) for x in (other, clamp))
        lane = np.arange(WARP)
        segment, limit = c >> 8 & 31, c & 31
        last, first = lane & segment | limit & ~segment, lane & segment
        source_lane = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | by & ~segment}[way]
        inside = source_lane >= last if way == "up" else source_lane <= last
        chosen = np.where(inside, source_lane, lane) % WARP
        lanes.write(target, np.take_along_axis(value, chosen, axis=1).reshape(-1), mask)
        if found_at is not None:
            lanes.write(found_at, inside.reshape(-1), mask)

    return run


REDUCTIONS: dict[str, Any] = {
    "add": np.add, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@opcode("redux")
def _reduce(i: Instruction) -> Step:
    """One number of all threads of a warp."""
    target, source, members = i.operands
    if len(i.words) != 4 or i.words[2] not in REDUCTIONS:
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    do, kind = REDUCTIONS[i.words[2]], TYPES[i.words[3]]

    def run(lanes: Lanes, mask: Mask) -> None:
        if (lanes.whole(lanes.read(members, np.uint32)) != np.uint32(0xFFFFFFFF)).any():
            raise EmulationError("of a part of a warp it is not known here")
        value = lanes.whole(lanes.read(source, kind)).reshape(-1, WARP)
        lanes.write(target, np.repeat(do.reduce(value, axis=1), WARP).astype(kind), mask)

    return run


@opcode("cp")
def _copy(i: Instruction) -> Step:
    """Copies to shared memory arrive as late as they may: when a thread waits for their group."""
    if i.words[1] != "async":
        raise EmulationError(f"the instruction '{i.text}' is not known here")
    if i.words[2] == "commit_group":

        def commit(lanes: Lanes, mask: Mask) -> None:
            lanes.committed = lanes.committed + (1 if mask is None else mask.astype(np.int64))

        return commit
    if i.words[2] in ("wait_group", "wait_all"):
        left = i.operands[0].value if i.operands else -1  # type: ignore[union-attr]  # -1: those of no group yet, too
        return lambda lanes, mask: _arrive(lanes, mask, int(left))
    to, source, size, *used = i.operands
    count = int(size.value)  # type: ignore[union-attr]

    def begin(lanes: Lanes, mask: Mask) -> None:
        threads = np.arange(lanes.count) if mask is None else np.flatnonzero(mask)
        places, origins = lanes.places("shared", to, threads), lanes.places("global", source, threads)
        many = lanes.whole(lanes.read(used[0], np.uint32) if used else np.uint32(count))[threads]
        if not np.isin(many, (0, count)).all():
            raise EmulationError("a copy of a part of its bytes is not known here")
        lines = np.zeros((len(threads), count), np.uint8)  # bytes that are not used count as zero
        lines[many > 0] = lanes.memory.lines(origins[many > 0], count, lanes.by("global")[threads[many > 0]])
        lanes.shared.expect(places, count, lanes.by("shared")[threads])
        lanes.copies.append((threads, places, lines, lanes.committed[threads]))

    return begin


def _arrive(lanes: Lanes, mask: Mask, left: int) -> None:
    """All groups of a thread but the last `left` ones have come."""
    waiting = np.ones(lanes.count, bool) if mask is None else mask
    kept = []
    for threads, places, lines, group in lanes.copies:
        here = waiting[threads] & (group < lanes.committed[threads] - left)
        if here.any():
            lanes.shared.store_lines(places[here], lines[here], lanes.by("shared")[threads[here]])
        if not here.all():
            kept.append((threads[~here], places[~here], lines[~here], group[~here]))
    lanes.copies = kept
