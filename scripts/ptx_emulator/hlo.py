"""Reader of optimized HLO modules, as `jax.stages.Compiled.as_text` returns and `--xla_dump_to` writes them."""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from . import ptx

DTYPES = ptx.DTYPES | {"f8e4m3fn": ml_dtypes.float8_e4m3fn}  # other types have the same names as in PTX
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_TYPE_TOKEN = re.compile(r"((\w+)\[([\d,]*)\](?:\{[^}]*\})?|[(),])")
_COMMENT = re.compile(r"/\*.*?\*/")


class HloArray(NamedTuple):
    """An array of a result. `tuple_index`: "" if the result is no tuple, "2" in a tuple, "2,0" in a nested tuple."""

    tuple_index: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HloInstruction:
    """One instruction.

    Attributes:
        type: of the result: dtype[dims]{layout}, or a tuple of these.
        operands: names; "name#1" for an element of a tuple, as jax 0.11 writes it.
        text: the whole line, attributes included.
    """

    name: str
    type: str
    opcode: str
    operands: list[str]
    text: str

    def arrays(self) -> list[HloArray]:
        """Return the arrays of the result, in order."""
        arrays: list[HloArray] = []
        index: list[int] = []
        for token, kind, dims in _TYPE_TOKEN.findall(_COMMENT.sub("", self.type)):
            if token == "(":
                index.append(0)
            elif token == ")":
                index.pop()
            elif token == ",":
                index[-1] += 1
            else:
                shape = tuple(int(n) for n in dims.split(",") if n)
                arrays.append(HloArray(",".join(map(str, index)), np.dtype(DTYPES[kind]), shape))
        return arrays

    def called(self, role: str) -> str:
        """Return the name of the computation that an attribute, such as `calls` or `body`, names."""
        found = re.search(rf"{role}=%([\w.\-]+)", self.text)
        assert found, self.text
        return found[1]


class HloModule:
    """The computations of a module.

    Attributes:
        computations: the instructions of each computation, in order.
        instructions: by name.
        roots: for each computation, the instruction that is its result.
        entry: name of the computation that a run executes.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[HloInstruction]] = {}
        self.instructions: dict[str, HloInstruction] = {}
        self.roots: dict[str, HloInstruction] = {}
        computation = ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                computation = header[2]
                self.computations[computation] = []
                if header[1]:
                    self.entry = computation
            elif parsed := _INSTRUCTION.match(line):
                root, name, kind, opcode, rest = parsed.groups()
                inst = HloInstruction(name, kind, opcode, _operands(rest), line)
                self.computations[computation].append(inst)
                self.instructions[name] = inst
                if root:
                    self.roots[computation] = inst


def _operands(text: str) -> list[str]:
    """Return the names of the operands from the text behind the opening parenthesis."""
    text, depth = _COMMENT.sub("", text), 1
    for end, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return re.findall(r"%([\w.\-]+(?:#\d+)?)", text[:end])
    raise ValueError(f"the operands of an HLO instruction have no end: {text[:100]}")
