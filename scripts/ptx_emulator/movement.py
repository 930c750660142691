"""Data movement: between registers and memory, between the threads of a warp, and asynchronous copies."""

from typing import Any

import numpy as np

from .conversion import elementwise
from .ptx import DTYPES, Address, DestPair, EmulationError, Name, PtxInstruction, immediate, registers_of, unsupported
from .thread_group import WARP_SIZE, Executor, Mask, PendingCopy, ThreadGroup, handles, unsigned

STATE_SPACES = ("global", "shared", "local", "param")  # PTX ISA, "State Spaces"


def _state_space(inst: PtxInstruction) -> str:
    for token in inst.tokens:
        if token.split("::")[0] in STATE_SPACES:
            return token.split("::")[0]
    raise unsupported(inst)


@handles("mov", "cvta")
def _move(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Data Movement and Conversion Instructions: mov, cvta".

    Generic addresses are addresses of global memory. An address of shared memory is used in no other state space.
    """
    kind = "pred" if inst.type == "pred" else f"b{8 * np.dtype(DTYPES[inst.type]).itemsize}"
    return elementwise(inst, [kind], lambda value: value)


@handles("ld")
def _load(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Data Movement and Conversion Instructions: ld"."""
    space, dtype = _state_space(inst), np.dtype(DTYPES[inst.type])
    target, address = inst.operands
    assert isinstance(address, Address)
    if space == "param":
        assert isinstance(address.base, Name)
        param = address.base.text
        return lambda group, mask: group.write(target, group.params[param], mask)
    registers = registers_of(target)

    def execute(group: ThreadGroup, mask: Mask) -> None:
        index, owner = group.memory_index(space, address, mask), group.owner(space)
        if owner is not None and mask is not None:
            owner = owner[mask]
        loaded = group.memory(space).load(index, dtype.itemsize, len(registers), inst.used_bytes, owner)
        for register, values in zip(registers, loaded, strict=True):
            if mask is not None:
                active, values = values, np.zeros(group.num_threads, values.dtype)
                values[mask] = active
            group.write(register, values.view(dtype), mask)

    return execute


@handles("st")
def _store(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Data Movement and Conversion Instructions: st"."""
    space, dtype = _state_space(inst), unsigned(DTYPES[inst.type])
    address, source = inst.operands

    def execute(group: ThreadGroup, mask: Mask) -> None:
        threads = slice(None) if mask is None else mask
        values = [group.read_all(register, dtype)[threads] for register in registers_of(source)]
        index, owner = group.memory_index(space, address, threads), group.owner(space)
        group.memory(space).store(index, values, dtype.itemsize, None if owner is None else owner[threads])

    return execute


REDUCTIONS: dict[str, Any] = {
    "add": np.add, "min": np.fmin, "max": np.fmax, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
ATOMICS = REDUCTIONS | {"min": np.minimum, "max": np.maximum, "exch": lambda old, new: new}


@handles("atom", "red")
def _atomic(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Parallel Synchronization and Communication Instructions: atom, red": one thread after the other."""
    space, dtype = _state_space(inst), DTYPES[inst.type]
    combine = next((ATOMICS[token] for token in inst.tokens if token in ATOMICS), None)
    if combine is None:
        raise unsupported(inst)
    target, address, source = (Name("_"), *inst.operands) if inst.opcode == "red" else inst.operands
    size = np.dtype(dtype).itemsize

    def execute(group: ThreadGroup, mask: Mask) -> None:
        threads = group.active(mask)
        memory, values = group.memory(space), group.read_all(source, dtype)
        before = np.zeros(group.num_threads, dtype)
        for thread, index in zip(threads, group.memory_index(space, address, threads), strict=True):
            [old] = memory.load(index, size)
            before[thread] = old.view(dtype)
            memory.store(index, [np.asarray(combine(before[thread], values[thread])).view(old.dtype)], size)
        group.write(target, before, mask)

    return execute


@handles("shfl")
def _shuffle(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Data Movement and Conversion Instructions: shfl.sync".

    Each thread gets the value of another thread of its warp, or keeps its own if that thread is outside its segment.
    """
    mode, (targets, source, offset, clamp, _) = inst.tokens[2], inst.operands
    target, in_range = targets if isinstance(targets, DestPair) else (targets, Name("_"))

    def execute(group: ThreadGroup, mask: Mask) -> None:
        value = group.read_all(source, np.uint32).reshape(-1, WARP_SIZE)
        b, c = (group.read_all(x, np.uint32).astype(np.int64).reshape(-1, WARP_SIZE) for x in (offset, clamp))
        lane = np.arange(WARP_SIZE)
        segment, limit = c >> 8 & 31, c & 31
        last, first = lane & segment | limit & ~segment, lane & segment
        source_lane = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}[mode]
        valid = source_lane >= last if mode == "up" else source_lane <= last
        chosen = np.where(valid, source_lane, lane) % WARP_SIZE
        group.write(target, np.take_along_axis(value, chosen, axis=1).reshape(-1), mask)
        group.write(in_range, valid.reshape(-1), mask)

    return execute


@handles("redux")
def _reduce(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Parallel Synchronization and Communication Instructions: redux.sync", for whole warps."""
    target, source, members = inst.operands
    if len(inst.tokens) != 4 or inst.tokens[2] not in REDUCTIONS:
        raise unsupported(inst)
    reduction, dtype = REDUCTIONS[inst.tokens[2]], DTYPES[inst.type]

    def execute(group: ThreadGroup, mask: Mask) -> None:
        if (group.read_all(members, np.uint32) != np.uint32(0xFFFFFFFF)).any():
            raise EmulationError("a reduction of some threads of a warp is not supported")
        value = group.read_all(source, dtype).reshape(-1, WARP_SIZE)
        group.write(target, np.repeat(reduction.reduce(value, axis=1), WARP_SIZE).astype(dtype), mask)

    return execute


@handles("cp")
def _async_copy(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Data Movement and Conversion Instructions: cp.async, cp.async.commit_group, cp.async.wait_group".

    Data arrive as late as the ISA allows: when a thread waits for their commit group.
    """
    if inst.tokens[1] != "async":
        raise unsupported(inst)
    if inst.tokens[2] == "commit_group":
        return _commit_copies
    if inst.tokens[2] in ("wait_group", "wait_all"):
        num_pending = (
            immediate(inst.operands[0]) if inst.operands else -1
        )  # -1: copies without a group must arrive, too
        return lambda group, mask: _finish_copies(group, mask, num_pending)
    target, source, copied, *used = inst.operands
    size = immediate(copied)

    def execute(group: ThreadGroup, mask: Mask) -> None:
        threads = group.active(mask)
        targets = group.memory_index("shared", target, threads)
        sources = group.memory_index("global", source, threads)
        num_read = (group.read_all(used[0], np.uint32) if used else group.broadcast(np.uint32(size)))[threads]
        if not np.isin(num_read, (0, size)).all():
            raise EmulationError("a copy of some of its bytes is not supported")
        data, read = np.zeros((len(threads), size), np.uint8), num_read > 0  # bytes that are not read count as zeros
        data[read] = group.global_memory.load_bytes(sources[read], size, group.owner("global")[threads[read]])
        group.shared_memory.begin_copy(targets, size, group.owner("shared")[threads])
        group.pending_copies.append(PendingCopy(threads, targets, data, group.copy_groups[threads]))

    return execute


def _commit_copies(group: ThreadGroup, mask: Mask) -> None:
    group.copy_groups = group.copy_groups + (1 if mask is None else mask.astype(np.int64))


def _finish_copies(group: ThreadGroup, mask: Mask, num_pending: int) -> None:
    """Write the data of all copy groups of the waiting threads except the last `num_pending` ones."""
    waiting = np.ones(group.num_threads, bool) if mask is None else mask
    still_pending = []
    for copy in group.pending_copies:
        threads, addresses, data, commit_group = copy
        done = waiting[threads] & (commit_group < group.copy_groups[threads] - num_pending)
        if done.any():
            group.shared_memory.store_bytes(addresses[done], data[done], group.owner("shared")[threads[done]])
        if not done.all():
            still_pending.append(PendingCopy(*(field[~done] for field in copy)))
    group.pending_copies = still_pending
