"""A compiled CUDA program, run from what XLA wrote down about it: its kernels in their order, their buffers and their PTX."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from scripts.emulator import arithmetic, movement, tensor_cores  # noqa: F401  (they register instructions)
from scripts.emulator.machine import launch
from scripts.emulator.memory import GUARD, UNSET, Memory
from scripts.emulator.ptx import EmulationError, Kernel, kernels

DTYPES = {
    "pred": "bool", "s8": "int8", "u8": "uint8", "s16": "int16", "u16": "uint16", "s32": "int32", "u32": "uint32", "s64": "int64",
    "u64": "uint64", "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64", "f8e4m3fn": "float8_e4m3fn",
}  # fmt: skip


class Buffer(NamedTuple):
    """Part of an allocation."""

    allocation: int
    offset: int
    size: int


class Launch(NamedTuple):
    """One run of a kernel: what it reads, then what it writes."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    buffers: list[Buffer]


@dataclass
class Instruction:
    name: str
    type: str
    op: str
    operands: list[str]
    text: str


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ALLOCATION = re.compile(r"^allocation (\d+): size (\d+)(?:, parameter (\d+))?.*")
_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})? @\d+> \(size=(\d+),offset=(\d+)\): (\S+)")
_LAUNCH = re.compile(r"^\s*(\d+): kCustomKernel \[.*?\] (\S+) grid: \[([\d, ]+)\] threads: \[(\d+)[\d, ]+\]\s+shared_memory: (\d+)")
_THUNK = re.compile(r"^\s*(\d+): (k\w+)")


def _entry(hlo: str) -> tuple[dict[str, Instruction], str]:
    """The instructions of the program itself, and the name of that whose result it gives."""
    found, root = {}, ""
    for line in hlo[hlo.index("\nENTRY ") :].splitlines()[2:]:
        if line.startswith("}"):
            break
        if parsed := _INSTRUCTION.match(line):
            name, kind, op, rest = parsed.groups()
            rest = re.sub(r"/\*.*?\*/", "", rest)
            depth, end = 1, 0
            while depth:
                depth += {"(": 1, ")": -1}.get(rest[end], 0)
                end += 1
            found[name] = Instruction(name, kind, op, re.findall(r"%([\w.\-]+)", rest[: end - 1]), line)
            if line.lstrip().startswith("ROOT"):
                root = name
    return found, root


class Program:
    """What a program is made of.

    Args:
        dump: a folder that `--xla_dump_to` filled while one program, and no other with kernels, was compiled.
    Raises:
        EmulationError: something in it is not known here: a loop, a call of a library, a constant that was not written out.
    """

    def __init__(self, dump: Path):
        [sequence] = [f for f in dump.glob("*.thunk_sequence.txt") if _THUNK.search(f.read_text())]
        stem = sequence.name.removesuffix(".thunk_sequence.txt")
        [hlo] = dump.glob(f"{stem}.*_gpu_after_optimizations.txt")
        assigned = Path(str(hlo).removesuffix(".txt") + "-buffer-assignment.txt").read_text()
        positions = Path(str(hlo).removesuffix(".txt") + "-buffer-assignment-values.txt").read_text()
        self.kernels: dict[str, Kernel] = {}
        for file in dump.glob(f"{stem}*.ptx"):
            self.kernels |= kernels(file.read_text())
        self.instructions, self.root = _entry(hlo.read_text())
        self._read_buffers(assigned, positions)
        self.launches = list(self._launches(sequence.read_text(), (dump / f"{stem}.thunk_metadata.txt").read_text()))

    def _read_buffers(self, assigned: str, positions: str) -> None:
        """Where each value lies, by the name of each instruction that stands for it and the place in a tuple."""
        self.sizes: dict[int, int] = {}
        self.parameters: dict[int, int] = {}
        self.constants: dict[int, str] = {}
        values: dict[tuple[str, str], Buffer] = {}
        self.types: dict[Buffer, str] = {}
        allocation = -1
        for line in assigned.splitlines():
            if found := _ALLOCATION.match(line):
                allocation = int(found[1])
                self.sizes[allocation] = int(found[2])
                if found[3]:
                    self.parameters[int(found[3])] = allocation
            elif found := _VALUE.match(line):
                name, index, size, offset, _ = found.groups()
                values[name, index or ""] = Buffer(allocation, int(offset), int(size))
                if name in self.instructions and self.instructions[name].op == "constant":
                    self.constants[allocation] = name
        self.where = dict(values)
        for block in re.split(r"^<", positions, flags=re.MULTILINE)[1:]:
            name, index = re.match(r"\d+ ([\w.\-]+)(?:\{([\d,]*)\})? @", block).groups()  # type: ignore[union-attr]
            held = re.search(r"positions:\n(.*?)\n uses:", block, re.DOTALL)
            for line in held[1].splitlines() if held else ():
                place, _, inside = line.strip().partition(" ")
                self.where[place, inside.strip("{}")] = values[name, index or ""]

    def _launches(self, sequence: str, metadata: str) -> Iterator[Launch]:
        names = dict(re.findall(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)', metadata))
        by_number = {int(number): name for name, number in names.items()}
        for line in sequence.splitlines():
            found = _LAUNCH.match(line)
            if found is None:
                if other := _THUNK.match(line):
                    raise EmulationError(f"a program with a '{other[2]}' is not known here: {line.strip()[:120]}")
                continue
            i = self.instructions[by_number[int(found[1])]]
            buffers = [self.where[operand, ""] for operand in i.operands] + self.results(i.name)
            if len(self.kernels[found[2]].params) < len(buffers):  # kernels of XLA's own take a buffer once
                buffers = list(dict.fromkeys(buffers))
            grid = tuple(int(n) for n in found[3].split(","))
            yield Launch(found[2], grid, int(found[4]), int(found[5]), buffers)

    def results(self, name: str) -> list[Buffer]:
        """Buffers of the arrays that an instruction gives."""
        kinds = self.shapes(name)
        if not self.instructions[name].type.startswith("("):
            return [self.where[name, ""]]
        return [self.where[name, str(n)] for n in range(len(kinds))]

    def shapes(self, name: str) -> list[tuple[str, tuple[int, ...]]]:
        """dtype and shape of each array that an instruction gives."""
        found = re.findall(r"(\w+)\[([\d,]*)\]", self.instructions[name].type)
        return [(DTYPES[kind], tuple(int(n) for n in dims.split(",") if n)) for kind, dims in found]

    def run(self, args: Sequence[Any]) -> list[Any]:
        """The arrays that the program gives for the arrays it takes (as numpy holds them), in their order."""
        held = {number: np.full(size, UNSET, np.uint8) for number, size in self.sizes.items()}
        if len(args) != len(self.parameters):
            raise EmulationError(f"the program takes {len(self.parameters)} arrays, not {len(args)}")
        for number, arg in enumerate(args):
            held[self.parameters[number]][:] = np.ascontiguousarray(arg).reshape(-1).view(np.uint8)
        for number, name in self.constants.items():
            held[number][:] = self._constant(name)
        for each in self.launches:
            run_kernel(self.kernels[each.kernel], each, held)
        out = []
        for buffer, (dtype, shape) in zip(self.results(self.root), self.shapes(self.root), strict=True):
            raw = held[buffer.allocation][buffer.offset : buffer.offset + buffer.size]
            out.append(raw.copy().view(jnp.dtype(dtype)).reshape(shape))
        return out

    def _constant(self, name: str) -> Any:
        i = self.instructions[name]
        [(dtype, shape)] = self.shapes(name)
        written = i.text[i.text.index("constant(") + 9 :].split("), ")[0].rstrip(")")
        if "..." in written:
            raise EmulationError(f"the constant '{name}' was not written out")
        numbers = re.findall(r"-?[\w.+\-]+", re.sub(r"/\*.*?\*/", "", written))
        given = [{"true": 1.0, "false": 0.0}.get(n) if n in ("true", "false") else float(n) for n in numbers]
        return np.broadcast_to(np.array(given).astype(jnp.dtype(dtype)), shape).reshape(-1).view(np.uint8)


def run_kernel(kernel: Kernel, launched: Launch, held: dict[int, Any]) -> None:
    """One launch, in a memory that holds its buffers and nothing else; those that overlap lie together."""
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
    memory = Memory(end, "global memory")
    for (allocation, low, high), begin in zip(spans, begins, strict=True):
        memory.bytes[begin : begin + high - low] = held[allocation][low:high]
        memory.allowed[begin : begin + high - low] = True

    def address(buffer: Buffer) -> int:
        at = next(n for n, (a, low, high) in enumerate(spans) if a == buffer.allocation and low <= buffer.offset < max(high, low + 1))
        return begins[at] + buffer.offset - spans[at][1]

    launch(kernel, launched.grid, launched.threads, launched.shared, memory, [address(b) for b in launched.buffers])
    for (allocation, low, high), begin in zip(spans, begins, strict=True):
        held[allocation][low:high] = memory.bytes[begin : begin + high - low]
