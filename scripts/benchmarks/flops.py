"""Looking into a traced program: the arrays it holds, the inputs it reads, the operations it takes.

Nothing here runs or allocates anything: a program is the jaxpr of `jax.jit(f).trace(...)` on `jax.ShapeDtypeStruct`s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from kernels_pallas.grouped_matmul.plan import choose_windows, window_places
from mtpjax.config import ModelConfig
from mtpjax.model.cache import KV_BLOCK

WhileTrips = Callable[[JaxprEqn], float]

# Primitives that call one inner program once, its inputs and outputs in the order of their own.
_CALLS = frozenset("jit pjit closed_call core_call remat2 checkpoint custom_jvp_call custom_vjp_call".split())
# One operation for each element of the result.
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp cos cosh div eq erf erf_inv erfc exp exp2 "
    "expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter pow rem "
    "round rsqrt sign sin sinh sqrt square sub tan tanh".split()
)
# One operation for each element of the (first) operand, whatever an implementation takes: a sort is not n log n.
_REDUCING = frozenset(
    "argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_max reduce_min reduce_prod reduce_sum sort "
    "top_k".split()
)
# One operation for each element of the updates.
_UPDATING = frozenset("scatter-add scatter-max scatter-min scatter-mul scatter-sub scatter_add scatter_mul".split())
# Moving, choosing, renaming and converting are not arithmetic.
_FREE = frozenset(
    "bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy copy_p device_put dynamic_slice "
    "dynamic_update_slice empty expand_dims gather iota optimization_barrier pad real reduce_precision reshape rev "
    "scatter select_n sharding_constraint slice split squeeze stack stop_gradient tile transpose".split()
)


@dataclass(frozen=True)
class Held:
    """One array of a program. `made_by` is a primitive, or "input" / "constant" of the (inner) program; `where` names
    what is around it from the outside in: primitives, with the names of jitted functions, and `jax.named_scope`s."""

    shape: tuple[int, ...]
    dtype: Any
    made_by: str
    where: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


class Flops(NamedTuple):
    """Floating-point operations of a program; not whole where an expected trip count is not."""

    total: float
    by_primitive: dict[str, float]


def arrays(program: Jaxpr | ClosedJaxpr) -> Iterator[Held]:
    """Every array of the program and of all programs in it (loops, branches, calls, custom derivatives, kernels)."""
    return _arrays(_open(program), ())


def _arrays(jaxpr: Jaxpr, where: tuple[str, ...]) -> Iterator[Held]:
    def held(variables: Sequence[Any], made_by: str, where: tuple[str, ...]) -> Iterator[Held]:
        for aval in (v.aval for v in variables):
            if hasattr(aval, "shape"):
                yield Held(tuple(aval.shape), aval.dtype, made_by, where)

    yield from held(jaxpr.constvars, "constant", where)
    yield from held(jaxpr.invars, "input", where)
    for eqn in jaxpr.eqns:
        name, scope = eqn.primitive.name, str(eqn.source_info.name_stack)
        here = (*where, scope) if scope else where
        yield from held(eqn.outvars, name, here)
        called = f"{name}:{eqn.params['name']}" if "name" in eqn.params else name
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, Jaxpr | ClosedJaxpr):
                    yield from _arrays(_open(inner), (*here, called))


def inputs_read(program: Jaxpr | ClosedJaxpr) -> list[bool]:
    """For each input, whether any (non-empty) output depends on it. What XLA drops is found out without compiling."""
    jaxpr = _open(program)
    return list(_live(jaxpr, _nonempty(jaxpr.outvars))[1])


def count_flops(program: Jaxpr | ClosedJaxpr, while_trips: WhileTrips | None = None) -> Flops:
    """Floating-point operations of one call, loops multiplied out.

    A product of matrices counts 2 an element and contraction; arithmetic, comparisons and functions such as `exp` 1 an
    element of the result; reductions, running sums and sorts 1 an element of the operand; integer work and moving data
    0. Of the branches of a `cond` the dearest counts. Equations on which no non-empty output depends count 0: XLA drops
    them.

    Args:
        while_trips: turns of a `while` whose number is known only when it runs; see `expected_trips`.

    Raises:
        ValueError: a `while` without `while_trips`, or a primitive whose operations are not known here.
    """
    jaxpr = _open(program)
    counts = _count(jaxpr, _nonempty(jaxpr.outvars), while_trips, {})
    return Flops(sum(counts.values()), dict(counts.most_common()))


def expected_trips(cfg: ModelConfig, *, rows: int, context: int, kept: int = 0) -> WhileTrips:
    """Turns of the model's two loops with a dynamic count, known by what they carry, for a step of live rows.

    Attention over the cache: exactly the blocks that hold `context` tokens. Experts: the expected number of windows of the
    loop's size if every row chose its experts uniformly and on its own, so that an expert's run is binomially distributed.

    Args:
        rows: batch x rows of the step, no padding.
        context: committed tokens of the longest sequence after the step.
        kept: batch x rows that the last layer returns, where these are fewer.

    Raises (the function returned):
        ValueError: another loop, or expert windows that are not those of `rows` rows.
    """

    def trips(eqn: JaxprEqn) -> float:
        kinds = (jnp.floating, jnp.uint16)  # the latter: rows of bfloat16, carried as bits
        carried = [v.aval.shape for v in eqn.outvars if any(jnp.issubdtype(v.aval.dtype, kind) for kind in kinds)]
        if [len(s) for s in carried] == [5, 5, 5] and carried[0][-1] == carried[1][-1] == 1:
            return -(-context // KV_BLOCK)
        if cfg.num_experts and [s[1:] for s in carried] == [(cfg.hidden_size,)]:
            for live in filter(None, (rows, kept)):
                sizes = choose_windows(live, cfg.experts_per_token, cfg.num_experts)
                size = _rows_written(eqn)
                if size in sizes and carried[0][0] == window_places(
                    live * cfg.experts_per_token, cfg.num_experts, sizes
                ):
                    return cfg.num_experts * _expected_windows(
                        live, cfg.experts_per_token / cfg.num_experts, sizes, size
                    )
        raise ValueError(
            f"a loop that carries {carried} is neither attention nor the experts of {rows} rows of this model"
        )

    return trips


def _rows_written(loop: JaxprEqn) -> int | None:
    """Rows of the slice that a turn of the loop updates."""
    body = _open(loop.params["body_jaxpr"])
    updates = [eqn.invars[1].aval.shape[0] for eqn in body.eqns if eqn.primitive.name == "dynamic_update_slice"]
    return updates[0] if len(updates) == 1 else None


def _expected_windows(rows: int, chance: float, sizes: Sequence[int], size: int) -> float:
    """Expected windows of one size (see `plan_windows`) for a run of X ~ Binomial(rows, chance) rows."""
    step, longest = sizes[0], sizes[-1]
    n = np.arange(rows + 1)
    windows = (-(-(n % longest) // step) * step == size) + (n // longest if size == longest else 0)
    if chance >= 1:
        return float(windows[rows])
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(n[1:]))])
    log_p = (
        log_factorial[rows] - log_factorial - log_factorial[::-1] + n * np.log(chance) + (rows - n) * np.log1p(-chance)
    )
    return float(np.sum(np.exp(log_p) * windows))


class _Body(NamedTuple):
    """A program inside an equation: which outputs count, and the equation's operand behind each of its inputs."""

    jaxpr: Jaxpr
    wanted: tuple[bool, ...]
    operands: range | list[int]


def _open(program: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return getattr(program, "jaxpr", program)


def _nonempty(variables: Sequence[Any]) -> tuple[bool, ...]:
    return tuple(math.prod(getattr(v.aval, "shape", ())) > 0 for v in variables)


@lru_cache(maxsize=4096)  # super-blocks share one jaxpr, and one program is counted for many contexts
def _live(
    jaxpr: Jaxpr, wanted: tuple[bool, ...]
) -> tuple[tuple[tuple[JaxprEqn, tuple[bool, ...]], ...], tuple[bool, ...]]:
    """The equations that wanted outputs depend on, each with its own wanted outputs, and which inputs are read."""
    needed = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        want = tuple(v in needed and full for v, full in zip(eqn.outvars, _nonempty(eqn.outvars), strict=True))
        if any(want) or eqn.effects:
            kept.append((eqn, want))
            read = _operands_read(eqn, want)
            needed |= {v for v, r in zip(eqn.invars, read, strict=True) if r and not isinstance(v, Literal)}
    return tuple(kept[::-1]), tuple(v in needed for v in jaxpr.invars)


def _operands_read(eqn: JaxprEqn, wanted: tuple[bool, ...]) -> list[bool]:
    bodies = _bodies(eqn, wanted)
    read = [not bodies or (eqn.primitive.name == "cond" and i == 0) for i in range(len(eqn.invars))]
    for jaxpr, inner, operands in bodies:
        for operand, used in zip(operands, _live(jaxpr, inner)[1], strict=True):
            read[operand] |= used
    return read


def _bodies(eqn: JaxprEqn, wanted: tuple[bool, ...]) -> list[_Body]:
    """The programs that an equation runs; none for one that computes by itself."""
    name, p, operands = eqn.primitive.name, eqn.params, range(len(eqn.invars))
    if name == "scan":
        # Versions of jax name the numbers of constants and carried values differently; both keep their rank inside.
        body = _open(p["jaxpr"])
        carries, whole = _same_rank(eqn.outvars, body.outvars), _same_rank(eqn.invars, body.invars)
        return [_Body(body, _carried(body, wanted, whole - carries, carries), operands)]
    if name == "while":
        test, body = _open(p["cond_jaxpr"]), _open(p["body_jaxpr"])
        before, consts = p["cond_nconsts"], p["body_nconsts"]
        carry = list(operands[before + consts :])
        tested = _live(test, (True,))[1][before:]
        loop = _carried(body, tuple(w or t for w, t in zip(wanted, tested, strict=True)), consts, len(wanted))
        return [_Body(test, (True,), [*range(before), *carry]), _Body(body, loop, operands[before:])]
    if name == "cond":
        return [_Body(_open(branch), wanted, operands[1:]) for branch in p["branches"]]
    if name in _CALLS:
        return [_Body(_open(p["call_jaxpr" if "call_jaxpr" in p else "jaxpr"]), wanted, operands)]
    return []


def _same_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def _carried(body: Jaxpr, wanted: tuple[bool, ...], consts: int, carries: int) -> tuple[bool, ...]:
    """Outputs of a loop's body that count: a carried value also counts when a later turn reads it."""
    while True:
        read = _live(body, wanted)[1][consts : consts + carries]
        grown = tuple(w or r for w, r in zip(wanted[:carries], read, strict=True)) + wanted[carries:]
        if grown == wanted:
            return wanted
        wanted = grown


def _count(
    jaxpr: Jaxpr,
    wanted: tuple[bool, ...],
    while_trips: WhileTrips | None,
    counted: dict[tuple[Jaxpr, tuple[bool, ...]], Counter[str]],
) -> Counter[str]:
    """Operations by primitive. `counted` remembers the programs inside: the super-blocks of a model share one."""
    if (jaxpr, wanted) in counted:
        return counted[jaxpr, wanted]
    total: Counter[str] = Counter()
    for eqn, want in _live(jaxpr, wanted)[0]:
        inner = [_count(body.jaxpr, body.wanted, while_trips, counted) for body in _bodies(eqn, want)]
        if not inner:
            total[eqn.primitive.name] += _own(eqn)
            continue
        if eqn.primitive.name == "cond":
            inner = [max(inner, key=lambda branch: sum(branch.values()))]
        times = _trips(eqn, while_trips)
        for counts in inner:
            total.update({name: times * flops for name, flops in counts.items()})  # type: ignore[arg-type]
    counted[jaxpr, wanted] = +total
    return counted[jaxpr, wanted]


def _trips(eqn: JaxprEqn, while_trips: WhileTrips | None) -> float:
    if eqn.primitive.name != "while":
        return eqn.params["length"] if eqn.primitive.name == "scan" else 1
    if while_trips is None:
        raise ValueError(
            f"a while loop that carries {[v.aval for v in eqn.outvars]}: give while_trips, its number of turns"
        )
    return while_trips(eqn)


def _own(eqn: JaxprEqn) -> int:
    """Operations of an equation without a program inside."""
    name, results = eqn.primitive.name, [v.aval for v in eqn.outvars]
    if name in _FREE or not any(_floating(v.aval) for v in eqn.invars):
        return 0
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * results[0].size * math.prod(shape[axis] for axis in contract)
    if name in _ELEMENTWISE:
        return results[0].size
    if name in _REDUCING:
        return eqn.invars[0].aval.size
    if name in _UPDATING:
        return eqn.invars[2].aval.size
    raise ValueError(
        f"'{name}' on {[v.aval for v in eqn.invars]}: its operations are not known to scripts.benchmarks.flops; add it"
    )


def _floating(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
