"""What XLA writes down about a program that it compiled for CUDA: its instructions, where their values lie, what is run in which
order."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from scripts.ptx_emulator.ptx import EmulationError, Kernel, kernels

DTYPES = {
    "pred": "bool", "s8": "int8", "u8": "uint8", "s16": "int16", "u16": "uint16", "s32": "int32", "u32": "uint32", "s64": "int64",
    "u64": "uint64", "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64", "f8e4m3fn": "float8_e4m3fn",
}  # fmt: skip


class Buffer(NamedTuple):
    """Part of an allocation, in bytes."""

    allocation: int
    offset: int
    size: int


class Array(NamedTuple):
    buffer: Buffer
    dtype: str
    shape: tuple[int, ...]


class Launch(NamedTuple):
    """One run of a kernel: the buffers are what it reads, then what it writes (`written`)."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    buffers: list[Buffer]
    written: list[Buffer]


class Copy(NamedTuple):
    source: Buffer
    target: Buffer


class Slice(NamedTuple):
    """A part of `whole` that begins at `starts` is copied to `part`, or from it (`update`)."""

    whole: Array
    part: Array
    starts: list[int | Array]
    update: bool


class Loop(NamedTuple):
    condition: list[Thunk]
    test: Buffer
    body: list[Thunk]


class Branches(NamedTuple):
    which: Array
    branches: list[list[Thunk]]


class Start(NamedTuple):
    """What goes on by itself until the `Finish` of the same number."""

    number: int
    thunks: list[Thunk]


class Finish(NamedTuple):
    number: int


Thunk = Launch | Copy | Slice | Loop | Branches | Start | Finish


@dataclass
class Instruction:
    name: str
    type: str
    op: str
    operands: list[str]  # names; "name#1" for a part of a tuple, as jax 0.11 has it
    text: str

    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """dtype and shape of each array of the result."""
        found = re.findall(r"(\w+)\[([\d,]*)\]", self.type)
        return [(DTYPES[kind], tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found]

    def places(self) -> list[str]:
        """Where each of `arrays` stands in the result: "" alone, "2" in a tuple, "2,0" in a tuple inside of one."""
        found, at = [], []
        for token in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?|[(),]", re.sub(r"/\*.*?\*/", "", self.type)):
            if token == "(":
                at.append(0)
            elif token == ")":
                at.pop()
            elif token == ",":
                at[-1] += 1
            else:
                found.append(",".join(map(str, at)))
        return found


@dataclass
class _Line:
    """A line of the sequence, and those under it: sections of lines."""

    number: int
    kind: str
    text: str
    indent: int
    sections: list[list[_Line]] = field(default_factory=list)


_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(?:, page \d+)?(?:, parameter (\d+))?.*")  # pages: jax 0.11
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (\S+)")
_THUNK = re.compile(r"^(\s*)(\d+): (k\w+)\s+\[.*?\]\s?(.*)")
_SECTION = re.compile(r"^\s*(condition|body|branch_\d+):")
_LAUNCH = re.compile(r"(\S+) grid: \[([\d, ]+)\] threads: \[(\d+)[\d, ]+\]\s+shared_memory: (\d+)")
_RENAMES = ("bitcast", "copy", "reshape")


class Dump:
    """The only program with kernels that a folder tells of.

    Attributes:
        kernels: by name.
        thunks: what is run, in order.
        sizes: bytes of each allocation; `parameters`: the allocation of each parameter; `constants`: that of each constant.
        results: the arrays that it gives.
    Raises:
        EmulationError: something in it is not known here, such as a call of a library, or there is no such program.
    """

    def __init__(self, folder: Path):
        found = [file for file in folder.glob("*.thunk_sequence.txt") if _THUNK.search(file.read_text())]
        if len(found) != 1:
            raise EmulationError(f"{folder} tells of {len(found)} programs with kernels, not of one")
        stem = found[0].name.removesuffix(".thunk_sequence.txt")
        [hlo] = folder.glob(f"{stem}.*_gpu_after_optimizations.txt")
        beside = str(hlo).removesuffix(".txt")
        self.kernels: dict[str, Kernel] = {}
        for file in folder.glob(f"{stem}*.ptx"):
            self.kernels |= kernels(file.read_text())
        self.instructions: dict[str, Instruction] = {}
        self.roots: dict[str, str] = {}  # of each computation, the instruction whose result it gives
        self._read_instructions(hlo.read_text())
        self.sizes: dict[int, int] = {}
        self.parameters: dict[int, int] = {}
        self.constants: dict[str, int] = {}
        self.where: dict[tuple[str, str], Buffer] = {}  # by name and place in a tuple
        self._read_buffers(
            Path(f"{beside}-buffer-assignment.txt").read_text(),
            Path(f"{beside}-buffer-assignment-values.txt").read_text(),
        )
        self.results = self.arrays(self.roots[self.entry])
        named = (folder / f"{stem}.thunk_metadata.txt").read_text()
        self._names = {
            int(n): name for name, n in re.findall(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)', named)
        }
        self.thunks = [self._thunk(line) for line in _lines(found[0].read_text())]

    def _read_instructions(self, hlo: str) -> None:
        computation = ""
        for line in hlo.splitlines():
            if header := _HEADER.match(line):
                computation = header[2]
                if header[1]:
                    self.entry = computation
            elif parsed := _INSTRUCTION.match(line):
                root, name, kind, op, rest = parsed.groups()
                rest = re.sub(r"/\*.*?\*/", "", rest)
                depth, end = 1, 0
                while depth:
                    depth += {"(": 1, ")": -1}.get(rest[end], 0)
                    end += 1
                self.instructions[name] = Instruction(
                    name, kind, op, re.findall(r"%([\w.\-]+(?:#\d+)?)", rest[: end - 1]), line
                )
                if root:
                    self.roots[computation] = name

    def _read_buffers(self, assigned: str, positions: str) -> None:
        """The values with buffers, then all instructions that stand for one of them."""
        allocation = -1
        for line in assigned.splitlines():
            if found := _ALLOCATION.match(line):
                allocation = int(found[1])
                self.sizes[allocation] = int(found[2])
                if found[3]:
                    self.parameters[int(found[3])] = allocation
            elif found := _VALUE.match(line):
                name, index, size, offset, _ = found.groups()
                self.where[name, index or ""] = Buffer(allocation, int(offset), int(size))
                if self.instructions[name].op == "constant":
                    self.constants[name] = allocation
        for block in re.split(r"^<", positions, flags=re.MULTILINE)[1:]:
            named = re.match(r"\d+ ([\w.\-]+)(?:\{([\d,]*)\})?(?: \(phi\))? @", block)
            held = re.search(r"positions:\n(.*?)\n uses:", block, re.DOTALL)
            assert named and held, block
            for line in held[1].splitlines():
                place, _, inside = line.strip().partition(" ")
                self.where[place, inside.strip("{}")] = self.where[named[1], named[2] or ""]

    def buffer(self, operand: str) -> Buffer:
        """Where an operand lies that is no tuple."""
        name, _, place = operand.partition("#")
        return self.where[name, place]

    def arrays(self, name: str) -> list[Array]:
        """The arrays that an instruction gives, in their buffers."""
        i = self.instructions[name]
        return [Array(self.where[name, place], *kind) for place, kind in zip(i.places(), i.arrays(), strict=True)]

    def _thunk(self, line: _Line) -> Thunk:
        if line.kind in ("kAsyncStart", "kAsyncDone") and (found := re.search(r"async_id=(\d+)", line.text)):
            number = int(found[1])
            inner = [self._thunk(each) for section in line.sections for each in section]
            return Start(number, inner) if line.kind == "kAsyncStart" else Finish(number)
        i = self.instructions[self._names[line.number]]
        if line.kind == "kCustomKernel" and (launched := _LAUNCH.search(line.text)):
            written = [array.buffer for array in self.arrays(i.name)]
            buffers = [self.buffer(operand) for operand in i.operands] + written
            if len(self.kernels[launched[1]].params) < len(buffers):  # kernels of XLA's own take a buffer once
                buffers = list(dict.fromkeys(buffers))
            grid = tuple(int(n) for n in launched[2].split(","))
            return Launch(launched[1], grid, int(launched[3]), int(launched[4]), buffers, written)
        if line.kind == "kCopy" and i.op == "copy":
            return Copy(self.buffer(i.operands[0]), self.where[i.name, ""])
        if line.kind == "kCopy" and i.op == "fusion":
            return self._sorted_copy(i) if self._root(i).op == "sort" else self._slice(i)
        if line.kind == "kWhile":
            condition, body = ([self._thunk(inner) for inner in section] for section in line.sections)
            return Loop(condition, self.where[self.roots[self._called(i, "condition")], ""], body)
        if line.kind == "kConditional":
            branches = [[self._thunk(inner) for inner in section] for section in line.sections]
            name, _, part = i.operands[0].partition("#")
            kind = self.instructions[name].arrays()[int(part or 0)]
            return Branches(Array(self.buffer(i.operands[0]), *kind), branches)
        if line.kind == "kDynamicSliceFusion":
            return self._slice(i)
        raise EmulationError(
            f"a program with a '{line.kind}' for '{i.op}' is not known here: {line.text.strip()[:100]}"
        )

    def _called(self, i: Instruction, role: str) -> str:
        found = re.search(rf"{role}=%([\w.\-]+)", i.text)
        assert found, i.text
        return found[1]

    def _root(self, fusion: Instruction) -> Instruction:
        return self.instructions[self.roots[self._called(fusion, "calls")]]

    def _sorted_copy(self, fusion: Instruction) -> Copy:
        """What is sorted is first brought to where the result belongs."""
        inner = [self.instructions[name] for name in self._root(fusion).operands]
        moved = [n for n, i in enumerate(inner) if i.op == "parameter"]
        if len(moved) != 1 or len(fusion.operands) != 1:
            raise EmulationError(f"a sort of {len(moved)} arrays is not known here: {fusion.name}")
        return Copy(self.buffer(fusion.operands[0]), self.arrays(fusion.name)[moved[0]].buffer)

    def _slice(self, fusion: Instruction) -> Slice:
        """A fusion that only moves a slice."""

        def source(name: str) -> Instruction:
            """The parameter or constant that an instruction of the fusion stands for."""
            i = self.instructions[name]
            while i.op in _RENAMES:
                i = self.instructions[i.operands[0]]
            return i

        def outside(name: str) -> Array:
            i = source(name)
            number = re.search(r"parameter\((\d+)\)", i.text)
            if i.op != "parameter" or number is None:
                raise EmulationError(f"a slice of what '{i.op}' gives is not known here: {i.text.strip()[:100]}")
            [kind] = i.arrays()
            return Array(self.buffer(fusion.operands[int(number[1])]), *kind)

        def start(name: str) -> int | Array:
            i = source(name)
            written = re.search(r"constant\((-?\d+)\)", i.text)
            return int(written[1]) if i.op == "constant" and written else outside(name)

        root = source(self._root(fusion).name)
        [result] = self.arrays(fusion.name)
        if root.op == "dynamic-update-slice":
            whole, part, starts = outside(root.operands[0]), root.operands[1], root.operands[2:]
            if whole.buffer != result.buffer:
                raise EmulationError(f"{fusion.name} does not change its array in place")
            [(dtype, shape)] = self.instructions[part].arrays()
            return Slice(whole, Array(outside(part).buffer, dtype, shape), [start(s) for s in starts], update=True)
        if root.op == "dynamic-slice":
            [(dtype, shape)] = root.arrays()
            part_of, starts = outside(root.operands[0]), [start(s) for s in root.operands[1:]]
            return Slice(part_of, Array(result.buffer, dtype, shape), starts, update=False)
        if root.op == "slice" and (written := re.search(r"slice=\{(.*?)\}", root.text)):
            parts = [[int(n) for n in part.strip("[] ").split(":")] for part in written[1].split(",")]
            if all(len(part) == 2 for part in parts):  # no steps
                [(dtype, shape)] = root.arrays()
                starts = [part[0] for part in parts]
                return Slice(outside(root.operands[0]), Array(result.buffer, dtype, shape), starts, update=False)
        raise EmulationError(f"a fusion that ends in '{root.op}' is not known here: {fusion.name}")


def _lines(text: str) -> list[_Line]:
    """The lines of the sequence, each with those that are indented under it."""
    root = _Line(0, "", "", -1, [[]])
    stack, new_section = [root], False
    for text_line in text.splitlines():
        if _SECTION.match(text_line):
            new_section = True
        elif found := _THUNK.match(text_line):
            line = _Line(int(found[2]), found[3], found[4], len(found[1]))
            while stack[-1].indent >= line.indent:
                stack.pop()
            parent = stack[-1]
            if new_section or not parent.sections:
                parent.sections.append([])
            parent.sections[-1].append(line)
            stack.append(line)
            new_section = False
    return root.sections[0]
