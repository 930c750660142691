"""Execution of a compiled CUDA program without a GPU: its thunks in order, on its buffers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .hlo import HloInstruction
from .machine import launch
from .memory import GUARD_BYTES, UNSET_BYTE, Memory
from .ptx import EmulationError, Kernel
from .xla_dump import AsyncDone, AsyncStart, Branches, Buffer, BufferArray, Copy, Launch, Loop, Slice, Thunk, XlaDump

MAX_BLOCKS = 1 << 40  # of a grid, as owners of global memory
Allocations = dict[int, Any]  # uint8 arrays by number


class EmulatedProgram:
    """A program that XLA compiled for CUDA.

    Args:
        folder: what XLA dumped when it compiled the program, with its PTX and all constants
            (`--xla_dump_to=FOLDER --xla_dump_emitter_re=ptx --xla_dump_large_constants=true`).
        find_races: look for races in the first run of each launch, which doubles its time.
    Raises:
        EmulationError: as `XlaDump`.
    Attributes:
        num_launched: kernels run so far.
    """

    def __init__(self, folder: Path, find_races: bool = True):
        self.dump, self.num_launched, self.find_races = XlaDump(folder), 0, find_races
        self._async_thunks: dict[int, list[Thunk]] = {}
        self._checked_launches: set[int] = set()
        instructions, constants = self.dump.module.instructions, self.dump.constants
        self._constants = {number: _constant_bytes(instructions[name]) for name, number in constants.items()}

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Return the results of the program as numpy arrays. `args`: an array for each parameter, in order."""
        if len(args) != len(self.dump.parameters):
            raise EmulationError(f"the program takes {len(self.dump.parameters)} arrays, not {len(args)}")
        allocations = {n: np.full(size, UNSET_BYTE, np.uint8) for n, size in self.dump.allocation_sizes.items()}
        for number, arg in enumerate(args):
            allocations[self.dump.parameters[number]][:] = np.ascontiguousarray(arg).reshape(-1).view(np.uint8)
        for number, constant in self._constants.items():
            allocations[number][: len(constant)] = constant
        self._run(self.dump.thunks, allocations)
        return [_view(allocations, result).copy() for result in self.dump.results]

    def _run(self, thunks: list[Thunk], allocations: Allocations) -> None:
        for thunk in thunks:
            match thunk:
                case Launch():
                    find_races = self.find_races and id(thunk) not in self._checked_launches
                    run_kernel(self.dump.kernels[thunk.kernel], thunk, allocations, find_races)
                    self._checked_launches.add(id(thunk))
                    self.num_launched += 1
                case AsyncStart(number, inner):
                    self._async_thunks[number] = inner
                case AsyncDone(number):  # run the thunks as late as allowed
                    self._run(self._async_thunks.pop(number), allocations)
                case Copy(source, target):
                    _bytes(allocations, target)[:] = _bytes(allocations, source)
                case Loop(condition, predicate, body):
                    self._run(condition, allocations)
                    while _bytes(allocations, predicate)[0]:
                        self._run(body, allocations)
                        self._run(condition, allocations)
                case Branches(selector, branches):
                    value, last = _view(allocations, selector)[()], len(branches) - 1
                    in_range = int(value) if 0 <= value <= last else last
                    self._run(branches[int(not value) if value.dtype == bool else in_range], allocations)
                case Slice():
                    _copy_slice(thunk, allocations)


def _copy_slice(copy: Slice, allocations: Allocations) -> None:
    array, part = _view(allocations, copy.array), _view(allocations, copy.part)
    starts = [s if isinstance(s, int) else int(_view(allocations, s).reshape(())) for s in copy.starts]
    sizes = zip(starts, array.shape, part.shape, strict=True)
    clamped = [(min(max(start, 0), size - part_size), part_size) for start, size, part_size in sizes]
    window = tuple(slice(start, start + size) for start, size in clamped)
    if copy.update:
        array[window] = part
    else:
        part[...] = array[window]


def _bytes(allocations: Allocations, buffer: Buffer) -> Any:
    return allocations[buffer.allocation][buffer.offset : buffer.offset + buffer.size]


def _view(allocations: Allocations, array: BufferArray) -> Any:
    return _bytes(allocations, array.buffer).view(array.dtype).reshape(array.shape)


def _constant_bytes(inst: HloInstruction) -> Any:
    """Return the bytes of a constant from the text of its instruction."""
    [(_, dtype, _)] = inst.arrays()
    literal = inst.text[inst.text.index("constant(") + 9 :].split(")")[0]
    if "..." in literal:
        raise EmulationError(f"the constant '{inst.name}' was not written out")
    literal = re.sub(r"/\*.*?\*/", "", literal)
    values: list[Any]
    if np.issubdtype(dtype, np.integer):
        values = [int(n) for n in re.findall(r"-?\d+", literal)]
    else:
        booleans = {"true": 1.0, "false": 0.0}
        values = [booleans[n] if n in booleans else float(n) for n in re.findall(r"-?[\w.+\-]+", literal)]
    return np.array(values).astype(dtype).view(np.uint8)


def run_kernel(kernel: Kernel, launched: Launch, allocations: Allocations, find_races: bool = True) -> None:
    """Run one launch in a memory that holds its buffers and nothing else; overlapping buffers share their bytes.

    `find_races` doubles the time.
    """
    spans: list[list[int]] = []  # allocation, first byte, last byte + 1
    span_of: dict[Buffer, int] = {}
    for buffer in sorted(set(launched.buffers)):
        allocation, offset, size = buffer
        if spans and spans[-1][0] == allocation and offset < spans[-1][2]:
            spans[-1][2] = max(spans[-1][2], offset + size)
        else:
            spans.append([allocation, offset, offset + size])
        span_of[buffer] = len(spans) - 1
    bases, end = [], GUARD_BYTES
    for _, low, high in spans:
        bases.append(end)
        end += -(-(high - low) // GUARD_BYTES) * GUARD_BYTES + GUARD_BYTES
    memory = Memory(end, "global memory", MAX_BLOCKS if find_races else None)
    for (allocation, low, high), base in zip(spans, bases, strict=True):
        memory.bytes[base : base + high - low] = allocations[allocation][low:high]
        memory.readable[base : base + high - low] = True

    addresses = {buffer: bases[span] + buffer.offset - spans[span][1] for buffer, span in span_of.items()}
    for buffer in launched.written:
        memory.writable[addresses[buffer] : addresses[buffer] + buffer.size] = True
    params = [addresses[buffer] for buffer in launched.buffers]
    launch(kernel, launched.grid, launched.threads, launched.shared_bytes, memory, params)
    for (allocation, low, high), base in zip(spans, bases, strict=True):
        allocations[allocation][low:high] = memory.bytes[base : base + high - low]
