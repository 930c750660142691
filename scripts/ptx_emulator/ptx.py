"""The text of a PTX module as kernels of basic blocks of instructions."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class EmulationError(Exception):
    """A kernel does what no GPU would do right, or holds an instruction that is not known here."""


class Reg(NamedTuple):
    name: str
    bits: int  # 1: a predicate


class Imm(NamedTuple):
    value: int | float  # the bits, except of a decimal floating-point number


class Name(NamedTuple):
    """A special register, a symbol in memory, or a parameter."""

    text: str


class Address(NamedTuple):
    base: Operand
    offset: int


class Vector(NamedTuple):
    parts: list[Operand]


class Both(NamedTuple):
    """Two results: `%p1|%p2`."""

    first: Operand
    second: Operand


Operand = Reg | Imm | Name | Address | Vector | Both


@dataclass(frozen=True)
class Instruction:
    words: tuple[str, ...]  # the opcode and its modifiers, parted at dots
    operands: tuple[Operand, ...]
    guard: Reg | None  # runs where this predicate is `wanted`
    wanted: bool
    text: str
    used: int | None = None  # of a load: the bytes that count, where the compiler says that only some do

    @property
    def op(self) -> str:
        return self.words[0]


@dataclass
class Block:
    """Instructions that run one after the other; a branch, a barrier or a return only at the end."""

    instructions: list[Instruction] = field(default_factory=list)


@dataclass(eq=False)
class Kernel:
    name: str
    params: list[str]
    blocks: list[Block]
    labels: dict[str, int]  # number of the block that begins there
    tables: dict[str, list[str]]  # labels among which a branch picks by number
    shared: dict[str, int]  # symbols of shared memory, and where they begin
    shared_bytes: int  # of those with a size; a symbol without one begins behind them
    local: dict[str, int]  # symbols of the memory that a thread has for itself, and where they begin
    local_bytes: int


_PARAM = re.compile(r"\.param\s+[.\w]+(?:\s+\.ptr(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)")
_SYMBOLS = {
    space: re.compile(rf"\.{space}\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]") for space in ("shared", "local")
}
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_GUARDED = re.compile(r"@(!?)(%?[\w$]+)\s+(.*)", re.DOTALL)
_USED = re.compile(r'\.pragma "used_bytes_mask (0x[0-9a-f]+)"')
_WIDTH = {
    "pred": 1,
    "b8": 8,
    "b16": 16,
    "b32": 32,
    "b64": 64,
    "f32": 32,
    "f64": 64,
    "u32": 32,
    "s32": 32,
    "u64": 64,
    "u16": 16,
}
_TABLE = re.compile(r"([$\w]+):\s*\.branchtargets\s+([^;]*);")
_ENDS = ("bra", "brx", "bar", "ret", "exit", "barrier")


def kernels(text: str) -> dict[str, Kernel]:
    """The entry points of a module, by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    head, *entries = re.split(r"\.visible\s+\.entry\s+", text)
    return {kernel.name: kernel for kernel in (_kernel(entry, _SYMBOLS["shared"].findall(head)) for entry in entries)}


def _kernel(text: str, outside: list[tuple[str, str, str]]) -> Kernel:
    name = re.match(r"[\w$]+", text)[0]  # type: ignore[index]
    begin = text.index("{")
    params, body = _PARAM.findall(text[:begin]), text[begin:]
    shared, local = _placed(outside + _SYMBOLS["shared"].findall(body)), _placed(_SYMBOLS["local"].findall(body))
    blocks, labels = [Block()], {}
    tables = {label: [each.strip() for each in targets.split(",")] for label, targets in _TABLE.findall(body)}
    for label, instruction in _statements(body):
        if label is not None:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label] = len(blocks) - 1
        else:
            assert instruction is not None
            blocks[-1].instructions.append(instruction)
            if instruction.op in _ENDS and instruction.words[:2] != ("bar", "warp"):
                blocks.append(Block())
    return Kernel(name, params, blocks, labels, tables, *shared, *local)


def _placed(symbols: list[tuple[str, str, str]]) -> tuple[dict[str, int], int]:
    """Where symbols of (alignment, name, bytes) begin, those of no size last, and where the others end."""
    end = 0
    places: dict[str, int] = {}
    for align, symbol, size in sorted(symbols, key=lambda found: found[2] == ""):
        places[symbol] = -(-end // int(align)) * int(align)
        end = places[symbol] + int(size or 0)
    return places, end


def _statements(body: str) -> Iterator[tuple[str | None, Instruction | None]]:
    """Labels and instructions in their order. A brace where a statement begins opens a scope of register names."""
    scopes: list[dict[str, Operand]] = []
    at, opened, used = 0, 0, None
    blank, label = re.compile(r"\s*"), re.compile(r"(\$?[\w$]+):(?!:)")
    while True:
        at = blank.match(body, at).end()  # type: ignore[union-attr]
        if at == len(body):
            return
        if body[at] == "{":
            scopes.append({})
            opened += 1
            at += 1
        elif body[at] == "}":
            scopes.pop()
            at += 1
            if not scopes:
                return
        elif body[at] == ";":
            at += 1
        elif found := label.match(body, at):
            name = found[1]
            if len(scopes) > 1:  # known in its scope alone, behind it
                name = f"{name}@{opened}"
                scopes[-1][found[1]] = Name(name)
            yield name, None
            at = found.end()
        else:
            end = body.index(";", at)
            statement = " ".join(body[at:end].split())
            at = end + 1
            if declared := _REGISTERS.match(statement):
                _declare(declared[1], declared[2], scopes[-1], opened if len(scopes) > 1 else 0)
            elif found := _USED.match(statement):
                used = int(found[1], 16).bit_length()
            elif not statement.startswith("."):
                yield None, _instruction(statement, scopes, used)
                used = None


def _declare(kind: str, names: str, scope: dict[str, Operand], number: int) -> None:
    for name in (name.strip() for name in names.split(",")):
        stem, many = re.fullmatch(r"(%?[\w$]+)(?:<(\d+)>)?", name).groups()  # type: ignore[union-attr]
        for each in [stem] if many is None else [f"{stem}{i}" for i in range(int(many))]:
            scope[each] = Reg(f"{each}@{number}" if number else each, _WIDTH[kind])


def _parts(text: str) -> list[str]:
    """Parted at the commas that no bracket holds."""
    parts, depth, begin = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    return [*parts, text[begin:].strip()] if text.strip() else []


def _instruction(text: str, scopes: list[dict[str, Operand]], used: int | None) -> Instruction:
    guard, wanted, rest = None, True, text
    if found := _GUARDED.match(text):
        wanted, rest = not found[1], found[3]
        guard = _operand(found[2], scopes)
        assert isinstance(guard, Reg)
    op, _, operands = rest.partition(" ")
    read = tuple(_operand(part, scopes) for part in _parts(operands))
    return Instruction(tuple(op.split(".")), read, guard, wanted, text, used)


def _operand(text: str, scopes: list[dict[str, Operand]]) -> Operand:
    if text.startswith("{"):
        return Vector([_operand(part, scopes) for part in _parts(text[1:-1])])
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_operand(base, scopes), int(offset or "0", 0))
    if "|" in text:
        first, second = text.split("|")
        return Both(_operand(first, scopes), _operand(second, scopes))
    for scope in reversed(scopes):
        if text in scope:
            return scope[text]
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Imm(int(text[2:], 16))
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Imm(int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        return Imm(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d+\.\d*", text):
        return Imm(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    return Name(text)
