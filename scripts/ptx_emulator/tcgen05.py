"""Tensor cores of compute capability 10.0: products that one thread starts, tensor memory, and barriers.

Tensor memory has 128 lanes of 512 columns of 32 bits for each block; an address is lane * 2^16 + column (PTX ISA,
"Tensor Memory Addressing"). A product of 128 rows uses one lane a row, a product of 64 rows 16 of each warp's 32 lanes.
"""

from functools import partial
from typing import Any

import numpy as np

from .ptx import Address, DestPair, EmulationError, Operand, PtxInstruction, immediate, registers_of, unsupported
from .tensor_cores import active_units, matrix_index, multiply, unpack_values
from .thread_group import WARP_SIZE, Executor, Mask, ThreadGroup, handles

NUM_LANES, NUM_COLUMNS = 128, 512
SWIZZLE_BYTES = np.array([16, 0, 128, 0, 64, 0, 32, 0])  # by bits 61 to 63 of a matrix descriptor; 0: not supported
KINDS = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::tf32": {2: "tf32"}}  # element type, by its instruction descriptor


def _tensor_memory(group: ThreadGroup) -> Any:
    if group.tensor_memory is None:
        group.tensor_memory = np.full((group.num_blocks, NUM_LANES, NUM_COLUMNS), 0xFFFFFFFF, np.uint32)
        group.awaits_product = np.zeros((group.num_blocks, NUM_COLUMNS), bool)
    return group.tensor_memory


@handles("elect")
def _elect(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Parallel Synchronization and Communication Instructions: elect.sync": the first thread of a warp."""
    target = inst.operands[0]
    assert isinstance(target, DestPair)

    def execute(group: ThreadGroup, mask: Mask) -> None:
        active_units(mask)
        group.write(target.first, np.uint32(0), mask)
        group.write(target.second, group.thread % WARP_SIZE == 0, mask)

    return execute


@handles("tcgen05")
def _tcgen05(inst: PtxInstruction) -> Executor:
    """PTX ISA, "TensorCore 5th Generation Family Instructions". Loads and stores end at once, so waits do nothing."""
    handlers = {"alloc": _allocate, "ld": _move, "st": _move, "mma": _product, "commit": _commit}
    operation = inst.tokens[1].split("::")[0]
    if operation in ("relinquish_alloc_permit", "dealloc", "wait", "fence"):
        return lambda group, mask: None
    if operation not in handlers or "cta_group::2" in inst.tokens:
        raise unsupported(inst)
    return handlers[operation](inst)


def _allocate(inst: PtxInstruction) -> Executor:
    """PTX ISA, "tcgen05.alloc": one range of columns a block, from 0; its address is written to shared memory."""

    def execute(group: ThreadGroup, mask: Mask) -> None:
        _tensor_memory(group)
        threads = group.active(mask)
        index = group.memory_index("shared", inst.operands[0], threads)
        group.shared_memory.store(index, [np.zeros(len(threads), np.uint32)], 4, group.owner("shared")[threads])

    return execute


def _move(inst: PtxInstruction) -> Executor:
    """PTX ISA, "tcgen05.ld", "tcgen05.st": a warp's 32 lanes, or 16 of them in two ranges of columns."""
    is_load, shape, operands = inst.tokens[1] == "ld", inst.tokens[4], list(inst.operands)
    if shape not in ("32x32b", "16x32bx2") or inst.type != "b32" or len(inst.tokens) != 7:
        raise unsupported(inst)
    address = operands.pop(1 if is_load else 0)
    registers = registers_of(operands.pop(0 if is_load else -1))
    lanes, column_distance = (16, immediate(operands[0])) if operands else (WARP_SIZE, 0)

    def execute(group: ThreadGroup, mask: Mask) -> None:
        active_units(mask)
        memory, threads = _tensor_memory(group), group.active(mask)
        base = group.broadcast(group.address(address))[threads]
        warp_lane, warp = threads % WARP_SIZE, group.thread[threads] // WARP_SIZE % 4
        lane, column = (base >> 16) + warp_lane % lanes, (base & 0xFFFF) + warp_lane // lanes * column_distance
        if (lane // WARP_SIZE != warp).any() or (column + len(registers) > NUM_COLUMNS).any():
            raise EmulationError("tensor memory beyond the lanes of a warp, or its last column")
        block = group.block[threads]
        for n, register in enumerate(registers):
            if not is_load:
                memory[block, lane, column + n] = group.read_all(register, np.uint32)[threads]
                continue
            if group.awaits_product[block, column + n].any():
                raise EmulationError("tensor memory is read before the wait for its product")
            value = np.zeros(group.num_threads, np.uint32)
            value[threads] = memory[block, lane, column + n]
            group.write(register, value, mask)

    return execute


def _product(inst: PtxInstruction) -> Executor:
    """PTX ISA, "tcgen05.mma". One thread of a block starts it; the bits are those of "Instruction Descriptor"."""
    target, a, b, instruction_descriptor, accumulate = inst.operands
    kinds = KINDS.get(inst.tokens[3])
    if kinds is None:
        raise unsupported(inst)
    size, k = (4, 8) if inst.tokens[3] == "kind::tf32" else (2, 16)

    def execute(group: ThreadGroup, mask: Mask) -> None:
        memory, threads = _tensor_memory(group), group.active(mask)
        block = group.block[threads]
        if len(np.unique(block)) != len(block):
            raise EmulationError("several threads of a block start one product")
        descriptors = np.unique(group.read_all(instruction_descriptor, np.uint32)[threads])
        if len(descriptors) != 1:
            raise EmulationError("blocks start products of different shapes")
        bits = int(descriptors[0])
        type_a, type_b, transpose_a, transpose_b = bits >> 7 & 7, bits >> 10 & 7, bits >> 15 & 1, bits >> 16 & 1
        if bits >> 4 & 3 != 1 or type_a != type_b or type_a not in kinds or bits & 0x600C:
            raise EmulationError(f"the instruction descriptor {bits:#x} is not supported")
        kind, n, m = kinds[type_a], (bits >> 17 & 63) * 8, (bits >> 24 & 31) * 16
        matrix_b = _read_matrix(group, b, threads, (n, k, size), bool(transpose_b), kind)
        if isinstance(a, Address):
            words = np.ascontiguousarray(memory[_tensor_index(group, a, threads, m, 8)])
            matrix_a = unpack_values(words, kind).reshape(len(block), m, k)
        else:
            matrix_a = _read_matrix(group, a, threads, (m, k, size), bool(transpose_a), kind)
        product = multiply(matrix_a, matrix_b, kind)
        index = _tensor_index(group, target, threads, m, n)
        before = np.ascontiguousarray(memory[index]).view(np.float32)
        accumulates = group.read_all(accumulate, np.bool_)[threads][:, None, None]
        memory[index] = np.where(accumulates, before + product, product).astype(np.float32).view(np.uint32)
        for number, columns in zip(block, index[2][:, 0], strict=True):
            awaits_product = group.awaits_product[number]
            awaits_product[columns] = True
            group.on_product_end[int(number)].append(partial(awaits_product.__setitem__, columns, False))

    return execute


def _tensor_index(group: ThreadGroup, operand: Operand, threads: Any, rows: int, columns: int) -> tuple[Any, Any, Any]:
    """Return block, lane and column of each element of a matrix in tensor memory.

    A matrix of 64 rows may begin at lane 16, and then uses the second half of each warp's lanes.
    """
    if rows not in (64, NUM_LANES):
        raise EmulationError(f"products of {rows} rows are not supported")
    address = group.broadcast(group.address(operand))[threads][:, None, None]
    row = np.arange(rows)
    lane = (address >> 16) + (row if rows == NUM_LANES else row // 16 * WARP_SIZE + row % 16)[:, None]
    if lane.max() >= NUM_LANES:
        raise EmulationError(f"a matrix beyond the {NUM_LANES} lanes of tensor memory")
    return group.block[threads][:, None, None], lane, (address & 0xFFFF) + np.arange(columns)


def _read_matrix(
    group: ThreadGroup, operand: Operand, threads: Any, shape: tuple[int, int, int], transposed: bool, kind: str
) -> Any:
    """Return float32 `[threads, rows, columns]` from shared memory, which must not change until the product ends.

    `shape`: rows, columns, bytes of an element.
    """
    descriptor, block = group.read_all(operand, np.uint64)[threads].view(np.int64), group.block[threads]
    swizzle = SWIZZLE_BYTES[descriptor >> 61 & 7]
    if np.any(swizzle == 0) or np.any(descriptor >> 52 & 1):
        raise EmulationError("the swizzling or the offset mode of a matrix descriptor is not supported")
    index = matrix_index(group, block, descriptor, swizzle, shape, transposed)
    owner = np.broadcast_to(group.owner("shared")[threads][:, None, None], index.shape)
    [words] = group.shared_memory.load(index, shape[2], owner=owner, hold=True)
    for number, held in zip(block, index, strict=True):
        group.on_product_end[int(number)].append(partial(group.shared_memory.release, held, shape[2]))
    return unpack_values(words.astype(np.uint32), kind)[..., 0]


def _commit(inst: PtxInstruction) -> Executor:
    """PTX ISA, "tcgen05.commit": the barrier receives an arrival when all products of the block have ended."""

    def execute(group: ThreadGroup, mask: Mask) -> None:
        threads = group.active(mask)
        index = group.memory_index("shared", inst.operands[0], threads)
        [states] = group.shared_memory.load(index, 8)
        for thread, barrier, state in zip(threads, index, states, strict=True):
            phase, expected, pending = int(state) >> 63, int(state) >> 32 & 0xFFFF, (int(state) & 0xFFFF) - 1
            if pending == 0:
                phase, pending = phase ^ 1, expected
            group.shared_memory.store(barrier, [np.uint64(phase << 63 | expected << 32 | pending)], 8)
            callbacks = group.on_product_end.pop(int(group.block[thread]), [])
            group.on_barrier[int(barrier)].extend(callbacks)

    return execute


@handles("mbarrier")
def _mbarrier(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".

    The eight bytes of a barrier hold the phase (bit 63), the arrivals that a phase expects (bits 32 to 47) and the
    arrivals that are pending (bits 0 to 15). The ISA leaves the layout open.
    """
    if inst.tokens[1] == "inval":
        return lambda group, mask: None
    if inst.tokens[1] == "init":
        return _init_barrier(*inst.operands)
    if inst.tokens[1] != "try_wait" or "parity" not in inst.tokens:
        raise unsupported(inst)
    return _try_wait(*inst.operands)


def _init_barrier(barrier: Operand, expected: Operand) -> Executor:
    def execute(group: ThreadGroup, mask: Mask) -> None:
        threads = group.active(mask)
        count = group.read_all(expected, np.uint32)[threads].astype(np.uint64)
        index = group.memory_index("shared", barrier, threads)
        group.shared_memory.store(index, [count << np.uint64(32) | count], 8, group.owner("shared")[threads])

    return execute


def _try_wait(target: Operand, barrier: Operand, parity: Operand) -> Executor:
    """Tell each thread whether the phase of this parity has completed, and end the products that it waited for."""

    def execute(group: ThreadGroup, mask: Mask) -> None:
        threads = group.active(mask)
        index = group.memory_index("shared", barrier, threads)
        [states] = group.shared_memory.load(index, 8)
        completed = (states >> np.uint64(63)).astype(np.uint32) != group.read_all(parity, np.uint32)[threads]
        for address in np.unique(index[completed]):
            for callback in group.on_barrier.pop(int(address), []):
                callback()
        result = np.zeros(group.num_threads, bool)
        result[threads] = completed
        group.write(target, result, mask)

    return execute
