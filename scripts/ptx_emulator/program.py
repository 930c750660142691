"""A compiled CUDA program, run without a GPU: its kernels in their order, on its buffers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from scripts.ptx_emulator import arithmetic, blackwell, conversion, movement, tensor_cores  # noqa: F401  (they register instructions)
from scripts.ptx_emulator.dump import (
    Array,
    Branches,
    Buffer,
    Copy,
    Dump,
    Finish,
    Instruction,
    Launch,
    Loop,
    Start,
    Thunk,
)
from scripts.ptx_emulator.machine import launch
from scripts.ptx_emulator.memory import GUARD, UNSET, Memory
from scripts.ptx_emulator.ptx import EmulationError, Kernel


class Program:
    """Args:
        folder: what XLA dumped when it compiled the program, as a `cuda_target.Target` makes it do.
    Raises:
        EmulationError: as `Dump`.

    Attributes:
        launched: kernels run so far.
    """

    def __init__(self, folder: Path):
        self.dump, self.launched = Dump(folder), 0
        self._started: dict[int, list[Thunk]] = {}
        self._watched: set[int] = set()  # launches in which races were looked for, as they are the first time
        self._constants = {
            number: _constant(self.dump.instructions[name]) for name, number in self.dump.constants.items()
        }

    def run(self, args: Sequence[Any]) -> list[Any]:
        """The arrays that the program gives for the arrays it takes (as numpy holds them), in their order."""
        held = {number: np.full(size, UNSET, np.uint8) for number, size in self.dump.sizes.items()}
        if len(args) != len(self.dump.parameters):
            raise EmulationError(f"the program takes {len(self.dump.parameters)} arrays, not {len(args)}")
        for number, arg in enumerate(args):
            held[self.dump.parameters[number]][:] = np.ascontiguousarray(arg).reshape(-1).view(np.uint8)
        for number, constant in self._constants.items():
            held[number][: len(constant)] = constant
        self._run(self.dump.thunks, held)
        return [_array(held, result).copy() for result in self.dump.results]

    def _run(self, thunks: list[Thunk], held: dict[int, Any]) -> None:
        for thunk in thunks:
            if isinstance(thunk, Launch):
                run_kernel(self.dump.kernels[thunk.kernel], thunk, held, races=id(thunk) not in self._watched)
                self._watched.add(id(thunk))
                self.launched += 1
            elif isinstance(thunk, Start):
                self._started[thunk.number] = thunk.thunks
            elif isinstance(thunk, Finish):  # as late as it may
                self._run(self._started.pop(thunk.number), held)
            elif isinstance(thunk, Copy):
                _bytes(held, thunk.target)[:] = _bytes(held, thunk.source)
            elif isinstance(thunk, Loop):
                self._run(thunk.condition, held)
                while _bytes(held, thunk.test)[0]:
                    self._run(thunk.body, held)
                    self._run(thunk.condition, held)
            elif isinstance(thunk, Branches):
                value = _array(held, thunk.which)[()]
                last = len(thunk.branches) - 1
                number = int(not value) if value.dtype == bool else int(value) if 0 <= value <= last else last
                self._run(thunk.branches[number], held)
            else:
                whole, part = _array(held, thunk.whole), _array(held, thunk.part)
                starts = [s if isinstance(s, int) else int(_array(held, s).reshape(())) for s in thunk.starts]
                room = [size - some for size, some in zip(whole.shape, part.shape, strict=True)]
                begins = [min(max(start, 0), most) for start, most in zip(starts, room, strict=True)]
                at = tuple(slice(begin, begin + some) for begin, some in zip(begins, part.shape, strict=True))
                if thunk.update:
                    whole[at] = part
                else:
                    part[...] = whole[at]


def _bytes(held: dict[int, Any], buffer: Buffer) -> Any:
    return held[buffer.allocation][buffer.offset : buffer.offset + buffer.size]


def _array(held: dict[int, Any], array: Array) -> Any:
    return _bytes(held, array.buffer).view(jnp.dtype(array.dtype)).reshape(array.shape)


def _constant(i: Instruction) -> Any:
    """The bytes of a constant, from the text of its instruction."""
    [(dtype, shape)] = i.arrays()
    written = i.text[i.text.index("constant(") + 9 :].split(")")[0]
    if "..." in written:
        raise EmulationError(f"the constant '{i.name}' was not written out")
    words = {"true": 1.0, "false": 0.0}
    numbers = [
        words[n] if n in words else float(n) for n in re.findall(r"-?[\w.+\-]+", re.sub(r"/\*.*?\*/", "", written))
    ]
    if dtype.startswith(("int", "uint")):
        numbers = [int(n) for n in re.findall(r"-?\d+", re.sub(r"/\*.*?\*/", "", written))]
    return np.array(numbers).astype(jnp.dtype(dtype)).reshape(shape).reshape(-1).view(np.uint8)


def run_kernel(kernel: Kernel, launched: Launch, held: dict[int, Any], races: bool = True) -> None:
    """One launch, in a memory that holds its buffers and nothing else; those that overlap lie together. `races`: look for them,
    which takes as much time again."""
    spans: list[list[int]] = []
    for allocation, offset, size in sorted(set(launched.buffers)):
        if spans and spans[-1][0] == allocation and offset < spans[-1][2]:
            spans[-1][2] = max(spans[-1][2], offset + size)
        else:
            spans.append([allocation, offset, offset + size])
    begins, end = [], GUARD
    for _, low, high in spans:
        begins.append(end)
        end += -(-(high - low) // GUARD) * GUARD + GUARD
    memory = Memory(end, "global memory", span=1 << 40 if races else None)
    for (allocation, low, high), begin in zip(spans, begins, strict=True):
        memory.bytes[begin : begin + high - low] = held[allocation][low:high]
        memory.allowed[begin : begin + high - low] = True

    def address(buffer: Buffer) -> int:
        in_span = (a == buffer.allocation and low <= buffer.offset < max(high, low + 1) for a, low, high in spans)
        at = list(in_span).index(True)
        return begins[at] + buffer.offset - spans[at][1]

    for buffer in launched.written:
        memory.writable[address(buffer) : address(buffer) + buffer.size] = True
    launch(kernel, launched.grid, launched.threads, launched.shared, memory, [address(b) for b in launched.buffers])
    for (allocation, low, high), begin in zip(spans, begins, strict=True):
        held[allocation][low:high] = memory.bytes[begin : begin + high - low]
