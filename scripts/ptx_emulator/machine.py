"""Execution of one kernel: the threads of many blocks run together, one instruction at a time, as numpy arrays.

Where threads diverge at a branch, the threads at the earliest basic block run and the others wait, so that all of them
reconverge after the branch.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from . import arithmetic, conversion, movement, tcgen05, tensor_cores  # noqa: F401  (handlers)
from .memory import Memory
from .ptx import EmulationError, Imm, Kernel, Name, PtxInstruction
from .thread_group import HANDLERS, Executor, ThreadGroup, handles

MAX_THREADS_AT_ONCE = 1 << 16  # a trade of memory for time
MAX_INSTRUCTIONS = 50_000_000  # of a kernel, before it counts as one that does not end
JUMPS = ("bra", "brx", "ret", "exit")


def launch(
    kernel: Kernel, grid: Sequence[int], threads: int, shared_bytes: int, memory: Memory, params: Sequence[int]
) -> None:
    """Run a kernel once; it changes the global `memory`. Arguments are those of `ThreadGroup`.

    Raises:
        EmulationError: the kernel is wrong, or an instruction is not supported.
    """
    if len(params) != len(kernel.params):
        raise EmulationError(f"{kernel.name} takes {len(kernel.params)} parameters, not {len(params)}")
    executors = _executors(kernel)
    num_blocks, at_once = int(np.prod(grid)), max(1, MAX_THREADS_AT_ONCE // threads)
    for first in range(0, num_blocks, at_once):
        block_ids = np.arange(first, min(first + at_once, num_blocks))
        _run(kernel, executors, ThreadGroup(kernel, block_ids, grid, threads, shared_bytes, memory, params))


@cache
def _executors(kernel: Kernel) -> list[list[tuple[Executor, PtxInstruction]]]:
    """Return the executors of each basic block with their instructions."""
    unknown = [inst.text for block in kernel.basic_blocks for inst in block if inst.opcode not in HANDLERS]
    if unknown:
        raise EmulationError(f"{kernel.name}: the instruction '{unknown[0]}' is not supported")
    return [[(HANDLERS[inst.opcode](inst), inst) for inst in block] for block in kernel.basic_blocks]


def _run(kernel: Kernel, executors: list[list[tuple[Executor, PtxInstruction]]], group: ThreadGroup) -> None:
    end = len(executors)
    next_block = np.where(group.thread < group.special_registers["%ntid.x"], 0, end)  # the basic block of each thread
    waiting = np.zeros(group.num_threads, bool)  # at a barrier
    num_executed = 0
    while True:
        runnable = np.where(waiting, end, next_block)
        current = int(runnable.min())
        if current == end:
            if not waiting.any():
                return
            _pass_barriers(group, next_block, waiting)
            continue
        running = runnable == current
        running_mask = None if running.all() else running
        num_executed += len(executors[current])
        if num_executed > MAX_INSTRUCTIONS:
            raise EmulationError(f"{kernel.name} does not end: {MAX_INSTRUCTIONS} instructions")
        next_block[running] = current + 1
        for execute, inst in executors[current]:
            mask = running_mask
            if inst.guard is not None:
                guarded = group.read_all(inst.guard, np.bool_) == inst.guard_value
                mask = guarded if mask is None else guarded & mask
            if inst.opcode in JUMPS:
                jumping = running if mask is None else mask
                next_block[jumping] = end if inst.opcode in ("ret", "exit") else _jump_targets(group, inst)[jumping]
            elif inst.tokens[:2] == ("bar", "sync"):
                waiting |= running
            elif mask is None or mask.any():
                try:
                    with np.errstate(all="ignore"):
                        execute(group, mask)
                except EmulationError as error:
                    raise EmulationError(f"{kernel.name}: '{inst.text}': {error}") from None


def _jump_targets(group: ThreadGroup, inst: PtxInstruction) -> Any:
    """Return `[num_threads]`, the basic block that each thread would jump to."""
    label = inst.operands[-1]
    assert isinstance(label, Name)
    if inst.opcode == "bra":
        return group.broadcast(group.kernel.labels[label.text])
    table = np.array([group.kernel.labels[name] for name in group.kernel.branch_tables[label.text]])
    index = group.read_all(inst.operands[0], np.uint32)
    return table[np.minimum(index, len(table) - 1)]  # threads that do not jump may hold any index


def _pass_barriers(group: ThreadGroup, next_block: Any, waiting: Any) -> None:
    """Release the waiting threads; all waiting threads of a block must be at the same barrier."""
    for block in range(group.num_blocks):
        positions = next_block[waiting & (group.block == block)]
        if len(positions) and (positions != positions[0]).any():
            raise EmulationError(f"{group.kernel.name}: threads of a block wait at different barriers")
        group.barrier_epoch[block] += len(positions) > 0
    waiting[:] = False


@handles(*JUMPS, "bar", "fence", "griddepcontrol", "membar")
def _control(inst: PtxInstruction) -> Executor:
    """PTX ISA, "Control Flow Instructions" and "Parallel Synchronization and Communication Instructions: bar, membar".

    `_run` executes jumps and barriers. Fences do nothing: memory is accessed in the order of the instructions.
    """
    if inst.tokens[:2] == ("bar", "sync") and inst.operands != (Imm(0),):
        raise EmulationError(f"only the barrier 0 of a whole block is supported, not '{inst.text}'")
    return lambda group, mask: None
