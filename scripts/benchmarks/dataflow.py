"""What a traced program consists of: the arrays that it holds, the inputs and equations that its outputs depend on.

Nothing here runs or allocates anything: a program is the jaxpr of `jax.jit(f).trace(...)` on `jax.ShapeDtypeStruct`s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# For each output or input of a program, whether it counts.
Mask = tuple[bool, ...]

# Primitives that call one inner program once, with its inputs and outputs in the same order as their own.
_CALLS = frozenset("jit pjit closed_call core_call remat2 checkpoint custom_jvp_call custom_vjp_call".split())


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a program.

    Attributes:
        made_by: a primitive, or "input" or "constant" of the (inner) program.
        scope: what encloses it, from the outside in: primitives, with the names of jitted functions, and
            `jax.named_scope`s.
    """

    shape: tuple[int, ...]
    dtype: Any
    made_by: str
    scope: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


def arrays(program: Jaxpr | ClosedJaxpr) -> Iterator[ArrayInfo]:
    """Yield every array of a program and of all programs in it: loops, branches, calls, custom derivatives, kernels."""
    return _arrays(open_jaxpr(program), ())


def _arrays(jaxpr: Jaxpr, scope: tuple[str, ...]) -> Iterator[ArrayInfo]:
    yield from _describe(jaxpr.constvars, "constant", scope)
    yield from _describe(jaxpr.invars, "input", scope)
    for eqn in jaxpr.eqns:
        primitive, named_scope = eqn.primitive.name, str(eqn.source_info.name_stack)
        eqn_scope = (*scope, named_scope) if named_scope else scope
        yield from _describe(eqn.outvars, primitive, eqn_scope)
        label = f"{primitive}:{eqn.params['name']}" if "name" in eqn.params else primitive
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from _arrays(open_jaxpr(inner), (*eqn_scope, label))


def _describe(variables: Sequence[Any], made_by: str, scope: tuple[str, ...]) -> Iterator[ArrayInfo]:
    for aval in (v.aval for v in variables):
        if hasattr(aval, "shape"):
            yield ArrayInfo(tuple(aval.shape), aval.dtype, made_by, scope)


def inputs_read(program: Jaxpr | ClosedJaxpr) -> Mask:
    """Return for each input whether any non-empty output depends on it. XLA drops the others when it compiles."""
    jaxpr = open_jaxpr(program)
    return live_equations(jaxpr, nonempty(jaxpr.outvars))[1]


def open_jaxpr(program: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return getattr(program, "jaxpr", program)


def nonempty(variables: Sequence[Any]) -> Mask:
    """Return for each variable whether it has elements."""
    return tuple(math.prod(getattr(v.aval, "shape", ())) > 0 for v in variables)


@lru_cache(maxsize=4096)  # super-blocks share one jaxpr, and one program is counted for many context lengths
def live_equations(jaxpr: Jaxpr, wanted: Mask) -> tuple[tuple[tuple[JaxprEqn, Mask], ...], Mask]:
    """Find the equations that wanted outputs depend on, with the wanted outputs of each, and which inputs are read."""
    needed = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(v, Literal)}
    live: list[tuple[JaxprEqn, Mask]] = []
    for eqn in reversed(jaxpr.eqns):
        eqn_wanted = tuple(v in needed and full for v, full in zip(eqn.outvars, nonempty(eqn.outvars), strict=True))
        if any(eqn_wanted) or eqn.effects:
            live.append((eqn, eqn_wanted))
            read = _operands_read(eqn, eqn_wanted)
            needed |= {v for v, r in zip(eqn.invars, read, strict=True) if r and not isinstance(v, Literal)}
    return tuple(live[::-1]), tuple(v in needed for v in jaxpr.invars)


class InnerProgram(NamedTuple):
    """A program inside an equation."""

    jaxpr: Jaxpr
    wanted: Mask  # of its outputs
    operands: range | list[int]  # for each of its inputs, the operand of the equation


def _operands_read(eqn: JaxprEqn, wanted: Mask) -> list[bool]:
    programs = inner_programs(eqn, wanted)
    read = [not programs or (eqn.primitive.name == "cond" and i == 0) for i in range(len(eqn.invars))]
    for jaxpr, inner_wanted, operands in programs:
        for operand, is_read in zip(operands, live_equations(jaxpr, inner_wanted)[1], strict=True):
            read[operand] |= is_read
    return read


def inner_programs(eqn: JaxprEqn, wanted: Mask) -> list[InnerProgram]:
    """Return the programs that an equation runs; none for an equation that computes by itself."""
    name, p, operands = eqn.primitive.name, eqn.params, range(len(eqn.invars))
    if name == "scan":
        # Versions of jax name the numbers of constants and carried values differently. Both kinds, unlike the scanned
        # values, have the same rank inside as outside.
        body = open_jaxpr(p["jaxpr"])
        carries, not_scanned = _same_rank(eqn.outvars, body.outvars), _same_rank(eqn.invars, body.invars)
        return [InnerProgram(body, _wanted_of_body(body, wanted, not_scanned - carries, carries), operands)]
    if name == "while":
        test, body = open_jaxpr(p["cond_jaxpr"]), open_jaxpr(p["body_jaxpr"])
        test_consts, body_consts = p["cond_nconsts"], p["body_nconsts"]
        carry = list(operands[test_consts + body_consts :])
        tested = live_equations(test, (True,))[1][test_consts:]
        carry_wanted = tuple(w or t for w, t in zip(wanted, tested, strict=True))
        body_wanted = _wanted_of_body(body, carry_wanted, body_consts, len(wanted))
        return [
            InnerProgram(test, (True,), [*range(test_consts), *carry]),
            InnerProgram(body, body_wanted, operands[test_consts:]),
        ]
    if name == "cond":
        return [InnerProgram(open_jaxpr(branch), wanted, operands[1:]) for branch in p["branches"]]
    if name in _CALLS:
        return [InnerProgram(open_jaxpr(p["call_jaxpr" if "call_jaxpr" in p else "jaxpr"]), wanted, operands)]
    return []


def _same_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def _wanted_of_body(body: Jaxpr, wanted: Mask, consts: int, carries: int) -> Mask:
    """Return the outputs of a loop's body that count: a carried value also counts if a later iteration reads it."""
    while True:
        read = live_equations(body, wanted)[1][consts : consts + carries]
        grown = tuple(w or r for w, r in zip(wanted[:carries], read, strict=True)) + wanted[carries:]
        if grown == wanted:
            return wanted
        wanted = grown
