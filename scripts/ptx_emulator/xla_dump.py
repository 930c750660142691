"""Reader of XLA's dump of a program compiled for CUDA: instructions, buffers, and the sequence of thunks.

The files are XLA's debug output, which may change with any version; jax 0.10 and 0.11 are supported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .hlo import HloInstruction, HloModule
from .ptx import EmulationError, Kernel, parse_kernels


class Buffer(NamedTuple):  # a part of an allocation, in bytes
    allocation: int
    offset: int
    size: int


class BufferArray(NamedTuple):
    buffer: Buffer
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Launch(NamedTuple):
    """One run of a kernel. `buffers`: its inputs, then its outputs, which are `written`, too. `threads`: of a block."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    buffers: list[Buffer]
    written: list[Buffer]


class Copy(NamedTuple):
    source: Buffer
    target: Buffer


class Slice(NamedTuple):
    """A copy from the slice of `array` that begins at `starts` to `part`; with `update`, from `part` to the slice."""

    array: BufferArray
    part: BufferArray
    starts: list[int | BufferArray]
    update: bool


class Loop(NamedTuple):
    condition: list[Thunk]  # it writes `predicate`
    predicate: Buffer
    body: list[Thunk]


class Branches(NamedTuple):
    selector: BufferArray
    branches: list[list[Thunk]]


class AsyncStart(NamedTuple):
    number: int
    thunks: list[Thunk]  # they may run at any time until the `AsyncDone` of the same number


class AsyncDone(NamedTuple):
    number: int


Thunk = Launch | Copy | Slice | Loop | Branches | AsyncStart | AsyncDone


@dataclass
class _Line:
    """A line of the thunk sequence, and the sections of lines that are indented under it."""

    number: int
    kind: str
    text: str
    indent: int
    sections: list[list[_Line]] = field(default_factory=list)


_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(?:, page \d+)?(?:, parameter (\d+))?.*")  # pages: jax 0.11
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)")
_VALUE_HEADER = re.compile(r"\d+ ([\w.\-]+)(?:\{([\d,]*)\})?(?: \(phi\))? @")
_POSITIONS = re.compile(r"positions:\n(.*?)\n uses:", re.DOTALL)
_ANNOTATION = re.compile(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)')
_THUNK = re.compile(r"^(\s*)(\d+): (k\w+)\s+\[.*?\]\s?(.*)")
_SECTION = re.compile(r"^\s*(condition|body|branch_\d+):")
_LAUNCH = re.compile(r"(\S+) grid: \[([\d, ]+)\] threads: \[(\d+)[\d, ]+\]\s+shared_memory: (\d+)")
_ALIASES = ("bitcast", "copy", "reshape")  # opcodes that, inside a slice fusion, rename a value


class XlaDump:
    """The only program with kernels in a folder.

    Attributes:
        kernels: by name.
        module: its HLO.
        thunks: the steps of a run, in order.
        allocation_sizes: bytes of each allocation.
        parameters, constants: the allocation of each parameter (by number) and constant (by name).
        results: the arrays that it returns.
    Raises:
        EmulationError: the folder holds no program with kernels, or several; or the program needs a step that is not
            supported, such as a call of a library.
    """

    def __init__(self, folder: Path):
        sequences = [file for file in folder.glob("*.thunk_sequence.txt") if _THUNK.search(file.read_text())]
        if len(sequences) != 1:
            raise EmulationError(f"{folder} holds {len(sequences)} programs with kernels, not one")
        stem = sequences[0].name.removesuffix(".thunk_sequence.txt")
        [hlo] = folder.glob(f"{stem}.*_gpu_after_optimizations.txt")
        self.kernels: dict[str, Kernel] = {}
        for file in folder.glob(f"{stem}*.ptx"):
            self.kernels |= parse_kernels(file.read_text())
        self.module = HloModule(hlo.read_text())
        self.allocation_sizes: dict[int, int] = {}
        self.parameters: dict[int, int] = {}
        self.constants: dict[str, int] = {}
        self._buffers: dict[tuple[str, str], Buffer] = {}  # by instruction and tuple index
        self._read_allocations(hlo.with_name(f"{hlo.stem}-buffer-assignment.txt").read_text())
        self._read_aliases(hlo.with_name(f"{hlo.stem}-buffer-assignment-values.txt").read_text())
        self.results = self._arrays(self.module.roots[self.module.entry])
        metadata = (folder / f"{stem}.thunk_metadata.txt").read_text()
        self._instruction_names = {int(number): name for name, number in _ANNOTATION.findall(metadata)}
        self.thunks = [self._thunk(line) for line in _parse_lines(sequences[0].read_text())]

    def _read_allocations(self, text: str) -> None:
        """Read the allocations and the buffers of the values in them."""
        allocation = -1
        for line in text.splitlines():
            if match := _ALLOCATION.match(line):
                allocation = int(match[1])
                self.allocation_sizes[allocation] = int(match[2])
                if match[3]:
                    self.parameters[int(match[3])] = allocation
            elif match := _VALUE.match(line):
                name, index, size, offset = match.groups()
                self._buffers[name, index or ""] = Buffer(allocation, int(offset), int(size))
                if self.module.instructions[name].opcode == "constant":
                    self.constants[name] = allocation

    def _read_aliases(self, text: str) -> None:
        """Read which other instructions each value stands for."""
        for section in re.split(r"^<", text, flags=re.MULTILINE)[1:]:
            header, positions = _VALUE_HEADER.match(section), _POSITIONS.search(section)
            assert header and positions, section
            for line in positions[1].splitlines():
                name, _, index = line.strip().partition(" ")
                self._buffers[name, index.strip("{}")] = self._buffers[header[1], header[2] or ""]

    def _buffer(self, operand: str) -> Buffer:
        """Return the buffer of an operand that is no tuple."""
        name, _, index = operand.partition("#")
        return self._buffers[name, index]

    def _arrays(self, inst: HloInstruction) -> list[BufferArray]:
        """Return the arrays of an instruction's result."""
        return [BufferArray(self._buffers[inst.name, x.tuple_index], x.dtype, x.shape) for x in inst.arrays()]

    def _thunk(self, line: _Line) -> Thunk:
        if line.kind in ("kAsyncStart", "kAsyncDone") and (match := re.search(r"async_id=(\d+)", line.text)):
            number = int(match[1])
            return AsyncStart(number, sum(self._inner(line), [])) if line.kind == "kAsyncStart" else AsyncDone(number)
        inst = self.module.instructions[self._instruction_names[line.number]]
        if line.kind == "kCustomKernel" and (match := _LAUNCH.search(line.text)):
            written = [array.buffer for array in self._arrays(inst)]
            buffers = [self._buffer(operand) for operand in inst.operands] + written
            if len(self.kernels[match[1]].params) < len(buffers):  # XLA's own kernels take each buffer once
                buffers = list(dict.fromkeys(buffers))
            grid = tuple(int(n) for n in match[2].split(","))
            return Launch(match[1], grid, int(match[3]), int(match[4]), buffers, written)
        if line.kind == "kCopy" and inst.opcode == "copy":
            return Copy(self._buffer(inst.operands[0]), self._buffers[inst.name, ""])
        if line.kind == "kCopy" and inst.opcode == "fusion" and self._fusion_root(inst).opcode == "sort":
            return self._sort_input_copy(inst)
        if line.kind == "kDynamicSliceFusion" or (line.kind == "kCopy" and inst.opcode == "fusion"):
            return self._slice(inst)
        if line.kind == "kWhile":
            predicate = self.module.roots[inst.called("condition")]
            condition, body = self._inner(line)
            return Loop(condition, self._buffers[predicate.name, ""], body)
        if line.kind == "kConditional":
            name, _, element = inst.operands[0].partition("#")
            selector = _in_buffer(self._buffer(inst.operands[0]), self.module.instructions[name], int(element or 0))
            return Branches(selector, self._inner(line))
        step = f"'{line.kind}' for '{inst.opcode}'"
        raise EmulationError(f"a program with a {step} is not supported: {line.text.strip()[:100]}")

    def _inner(self, line: _Line) -> list[list[Thunk]]:
        return [[self._thunk(inner) for inner in section] for section in line.sections]

    def _fusion_root(self, fusion: HloInstruction) -> HloInstruction:
        return self.module.roots[fusion.called("calls")]

    def _sort_input_copy(self, fusion: HloInstruction) -> Copy:
        """Return the copy of a sort's input to the buffer of its result, where it is sorted in place."""
        operands = [self.module.instructions[name] for name in self._fusion_root(fusion).operands]
        copied = [n for n, inst in enumerate(operands) if inst.opcode == "parameter"]
        if len(copied) != 1 or len(fusion.operands) != 1:
            raise EmulationError(f"a sort of {len(copied)} arrays is not supported: {fusion.name}")
        return Copy(self._buffer(fusion.operands[0]), self._arrays(fusion)[copied[0]].buffer)

    def _slice(self, fusion: HloInstruction) -> Slice:
        """Return the slice that a fusion copies."""

        def resolve(name: str) -> HloInstruction:
            """Return the instruction that a name in the fusion stands for."""
            inst = self.module.instructions[name]
            while inst.opcode in _ALIASES:
                inst = self.module.instructions[inst.operands[0]]
            return inst

        def parameter(name: str) -> BufferArray:
            inst = resolve(name)
            number = re.search(r"parameter\((\d+)\)", inst.text)
            if inst.opcode != "parameter" or number is None:
                raise EmulationError(f"a slice of a '{inst.opcode}' is not supported: {inst.text.strip()[:100]}")
            return _in_buffer(self._buffer(fusion.operands[int(number[1])]), inst)

        def start(name: str) -> int | BufferArray:
            inst = resolve(name)
            constant = re.search(r"constant\((-?\d+)\)", inst.text)
            return int(constant[1]) if inst.opcode == "constant" and constant else parameter(name)

        root = resolve(self._fusion_root(fusion).name)
        [result] = self._arrays(fusion)
        if root.opcode == "dynamic-update-slice":
            array, update = parameter(root.operands[0]), root.operands[1]
            if array.buffer != result.buffer:
                raise EmulationError(f"{fusion.name} does not change its array in place")
            part = _in_buffer(parameter(update).buffer, self.module.instructions[update])
            return Slice(array, part, [start(name) for name in root.operands[2:]], update=True)
        starts: list[int | BufferArray] | None = None
        if root.opcode == "dynamic-slice":
            starts = [start(name) for name in root.operands[1:]]
        elif root.opcode == "slice" and (match := re.search(r"slice=\{(.*?)\}", root.text)):
            bounds = [[int(n) for n in bound.strip("[] ").split(":")] for bound in match[1].split(",")]
            if all(len(bound) == 2 for bound in bounds):  # a third number would be a step
                starts = [bound[0] for bound in bounds]
        if starts is None:
            raise EmulationError(f"a fusion that ends in '{root.opcode}' is not supported: {fusion.name}")
        return Slice(parameter(root.operands[0]), _in_buffer(result.buffer, root), starts, update=False)


def _in_buffer(buffer: Buffer, inst: HloInstruction, number: int = 0) -> BufferArray:
    """Return an array of the type of an instruction's result, or of the given array of a tuple."""
    _, dtype, shape = inst.arrays()[number]
    return BufferArray(buffer, dtype, shape)


def _parse_lines(text: str) -> list[_Line]:
    """Return the top lines of a thunk sequence, with the lines that are indented under them."""
    root = _Line(0, "", "", -1, [[]])
    stack, new_section = [root], False
    for text_line in text.splitlines():
        if _SECTION.match(text_line):
            new_section = True
        elif match := _THUNK.match(text_line):
            line = _Line(int(match[2]), match[3], match[4], len(match[1]))
            while stack[-1].indent >= line.indent:
                stack.pop()
            parent = stack[-1]
            if new_section or not parent.sections:
                parent.sections.append([])
            parent.sections[-1].append(line)
            stack.append(line)
            new_section = False
    return root.sections[0]
