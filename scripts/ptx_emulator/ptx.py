"""Parser of PTX modules: text becomes kernels made of basic blocks of instructions (PTX ISA, "Syntax")."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {  # PTX ISA, "Fundamental Types" and "Alternate Floating-Point Data Formats"
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip


class EmulationError(Exception):
    """A kernel does something that is wrong on every GPU, or needs something that the emulator does not support."""


class Reg(NamedTuple):
    name: str
    bits: int  # 1: a predicate


class Imm(NamedTuple):
    value: int  # the bits of a floating-point number


class Name(NamedTuple):
    text: str  # of a special register, a symbol in memory, a label or a parameter


class Address(NamedTuple):
    base: Operand
    offset: int


class Vector(NamedTuple):
    elements: list[Operand]


class DestPair(NamedTuple):  # two destinations: `%p1|%p2`
    first: Operand
    second: Operand


Operand = Reg | Imm | Name | Address | Vector | DestPair


@dataclass(frozen=True)
class PtxInstruction:
    """One instruction.

    Attributes:
        tokens: the opcode and its modifiers, split at dots.
        guard: predicate; the instruction runs in the threads where it equals `guard_value`. None: in all threads.
        used_bytes: of a load, the number of leading bytes that matter, if a `used_bytes_mask` pragma says so.
    """

    tokens: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Reg | None
    guard_value: bool
    text: str
    used_bytes: int | None = None

    @property
    def opcode(self) -> str:
        return self.tokens[0]

    @property
    def type(self) -> str:
        """The last modifier, which most instructions use for the type of their operands."""
        return self.tokens[-1]


def registers_of(operand: Operand) -> list[Operand]:
    """Return the elements of a vector operand, or the operand itself in a list."""
    return operand.elements if isinstance(operand, Vector) else [operand]


def unsupported(inst: PtxInstruction) -> EmulationError:
    return EmulationError(f"the instruction '{inst.text}' is not supported")


def immediate(operand: Operand) -> int:
    """Return the value of an operand that must be an immediate."""
    assert isinstance(operand, Imm), operand
    return operand.value


BasicBlock = list[PtxInstruction]  # only the last one may be a branch, a barrier or a return


@dataclass(eq=False)
class Kernel:
    """One entry point."""

    name: str
    params: list[str]
    basic_blocks: list[BasicBlock]
    labels: dict[str, int]  # number of the basic block at each label
    branch_tables: dict[str, list[str]]  # the labels that each `.branchtargets` declaration lists
    shared: dict[str, int]  # byte offsets of the symbols in shared memory
    shared_bytes: int  # total size of these symbols; a symbol without a size begins here
    local: dict[str, int]  # byte offsets of the symbols in a thread's local memory
    local_bytes: int


_Symbols = list[tuple[str, str, str]]  # alignment, name, bytes ("": unsized)
_Scope = dict[str, Operand]
_PARAM = re.compile(r"\.param\s+[.\w]+(?:\s+\.ptr(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)")
_SHARED, _LOCAL = (re.compile(rf"\.{x}\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]") for x in ("shared", "local"))
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_REGISTER_NAME = re.compile(r"(%?[\w$]+)(?:<(\d+)>)?")
_GUARDED = re.compile(r"@(!?)(%?[\w$]+)\s+(.*)", re.DOTALL)
_USED_BYTES = re.compile(r'\.pragma "used_bytes_mask (0x[0-9a-f]+)"')
_BRANCH_TABLE = re.compile(r"([$\w]+):\s*\.branchtargets\s+([^;]*);")
_STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>\$?[\w$]+):(?!:)|(?P<statement>[^;]*);)")
_BLOCK_ENDS = ("bra", "brx", "bar", "ret", "exit", "barrier")


def parse_kernels(text: str) -> dict[str, Kernel]:
    """Return the entry points of a module by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    head, *entries = re.split(r"\.visible\s+\.entry\s+", text)
    module_symbols = _SHARED.findall(head)
    return {kernel.name: kernel for kernel in (_parse_kernel(entry, module_symbols) for entry in entries)}


def _parse_kernel(text: str, module_symbols: _Symbols) -> Kernel:
    name, head, body = re.split(r"[^\w$]", text, maxsplit=1)[0], text[: text.index("{")], text[text.index("{") :]
    shared, local = _lay_out(module_symbols + _SHARED.findall(body)), _lay_out(_LOCAL.findall(body))
    tables = {label: [name.strip() for name in targets.split(",")] for label, targets in _BRANCH_TABLE.findall(body)}
    blocks: list[BasicBlock] = [[]]
    labels: dict[str, int] = {}
    for statement in _statements(body):
        if isinstance(statement, str):
            if blocks[-1]:
                blocks.append([])
            labels[statement] = len(blocks) - 1
        else:
            blocks[-1].append(statement)
            if statement.opcode in _BLOCK_ENDS and statement.tokens[:2] != ("bar", "warp"):
                blocks.append([])
    return Kernel(name, _PARAM.findall(head), blocks, labels, tables, *shared, *local)


def _lay_out(symbols: _Symbols) -> tuple[dict[str, int], int]:
    """Return the offset of every symbol, unsized ones last, and the end of the sized ones."""
    end = 0
    offsets: dict[str, int] = {}
    for alignment, symbol, size in sorted(symbols, key=lambda declared: declared[2] == ""):
        offsets[symbol] = -(-end // int(alignment)) * int(alignment)
        end = offsets[symbol] + int(size or 0)
    return offsets, end


def _statements(body: str) -> Iterator[str | PtxInstruction]:
    """Yield labels (as names) and instructions in order. A brace at the start of a statement opens a register scope."""
    scopes: list[_Scope] = []
    num_opened, used_bytes = 0, None
    for part in _STATEMENT.finditer(body):
        if part["brace"] == "{":
            scopes.append({})
            num_opened += 1
        elif part["brace"] == "}":
            scopes.pop()
            if not scopes:
                return
        elif label := part["label"]:
            if len(scopes) > 1:  # a label of an inner scope is visible there alone
                scopes[-1][label] = Name(f"{label}@{num_opened}")
                label = f"{label}@{num_opened}"
            yield label
        else:
            statement = " ".join(part["statement"].split())
            if match := _REGISTERS.match(statement):
                _declare(match[1], match[2], scopes[-1], f"@{num_opened}" if len(scopes) > 1 else "")
            elif match := _USED_BYTES.match(statement):
                used_bytes = int(match[1], 16).bit_length()
            elif statement and not statement.startswith("."):
                yield _parse_instruction(statement, scopes, used_bytes)
                used_bytes = None


def _declare(kind: str, names: str, scope: _Scope, suffix: str) -> None:
    """Add the registers of a `.reg` declaration to a scope; `suffix` tells equal names of two scopes apart."""
    bits = 1 if kind == "pred" else int(kind[1:])
    for stem, count in _REGISTER_NAME.findall(names):
        for name in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
            scope[name] = Reg(name + suffix, bits)


def _split_operands(text: str) -> list[str]:
    """Split at the commas that are outside of brackets."""
    operands, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            operands.append(text[begin:i].strip())
            begin = i + 1
    return [*operands, text[begin:].strip()] if text.strip() else []


def _parse_instruction(text: str, scopes: list[_Scope], used_bytes: int | None) -> PtxInstruction:
    guard, guard_value, rest = None, True, text
    if match := _GUARDED.match(text):
        guard_value, rest = not match[1], match[3]
        guard = cast(Reg, _parse_operand(match[2], scopes))
    tokens, _, operands = rest.partition(" ")
    parsed = tuple(_parse_operand(operand, scopes) for operand in _split_operands(operands))
    return PtxInstruction(tuple(tokens.split(".")), parsed, guard, guard_value, text, used_bytes)


def _parse_operand(text: str, scopes: list[_Scope]) -> Operand:
    if text.startswith("{"):
        return Vector([_parse_operand(element, scopes) for element in _split_operands(text[1:-1])])
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_parse_operand(base, scopes), int(offset or "0", 0))
    if "|" in text:
        first, second = text.split("|")
        return DestPair(_parse_operand(first, scopes), _parse_operand(second, scopes))
    for scope in reversed(scopes):
        if text in scope:
            return scope[text]
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return Imm(int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        return Imm(int(text.rstrip("U"), 0))
    if re.fullmatch(r"-?\d+\.\d*", text):
        return Imm(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    return Name(text)
