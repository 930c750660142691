"""Floating-point operations of a traced program, counted from its jaxpr; nothing runs or is allocated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from scripts.benchmarks.dataflow import Mask, inner_programs, live_equations, nonempty, open_jaxpr

WhileTripCounts = Callable[[JaxprEqn], float]

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


class Flops(NamedTuple):
    """Floating-point operations of a program; fractions where an expected trip count is one."""

    total: float
    by_primitive: dict[str, float]


def count_flops(program: Jaxpr | ClosedJaxpr, while_trip_counts: WhileTripCounts | None = None) -> Flops:
    """Count the floating-point operations of one call, with every iteration of its loops.

    A product of matrices counts 2 per element and contraction. Arithmetic, comparisons and functions such as `exp`
    count 1 per element of the result; reductions, running sums and sorts 1 per element of the operand. Integer work and
    moving data count 0. Of the branches of a `cond` the most expensive counts. Equations on which no non-empty output
    depends count 0, because XLA drops them.

    Args:
        while_trip_counts: iterations of a `while` whose number is known only when it runs; see
            `scripts.benchmarks.while_trip_counts`.

    Raises:
        ValueError: a `while` without `while_trip_counts`, or a primitive whose operations are not known here.
    """
    jaxpr = open_jaxpr(program)
    counts = _count(jaxpr, nonempty(jaxpr.outvars), while_trip_counts, {})
    return Flops(sum(counts.values()), dict(counts.most_common()))


def _count(
    jaxpr: Jaxpr,
    wanted: Mask,
    while_trip_counts: WhileTripCounts | None,
    counted: dict[tuple[Jaxpr, Mask], Counter[str]],
) -> Counter[str]:
    """Count by primitive. `counted` remembers inner programs, because the super-blocks of a model share one."""
    if (jaxpr, wanted) in counted:
        return counted[jaxpr, wanted]
    total: Counter[str] = Counter()
    for eqn, eqn_wanted in live_equations(jaxpr, wanted)[0]:
        inner = [_count(p.jaxpr, p.wanted, while_trip_counts, counted) for p in inner_programs(eqn, eqn_wanted)]
        if not inner:
            total[eqn.primitive.name] += _own_flops(eqn)
            continue
        if eqn.primitive.name == "cond":
            inner = [max(inner, key=lambda branch: sum(branch.values()))]
        trips = _trip_count(eqn, while_trip_counts)
        for counts in inner:
            total.update({name: trips * flops for name, flops in counts.items()})  # type: ignore[arg-type]
    counted[jaxpr, wanted] = +total
    return counted[jaxpr, wanted]


def _trip_count(eqn: JaxprEqn, while_trip_counts: WhileTripCounts | None) -> float:
    if eqn.primitive.name != "while":
        return eqn.params["length"] if eqn.primitive.name == "scan" else 1
    if while_trip_counts is None:
        raise ValueError(
            f"a while loop that carries {[v.aval for v in eqn.outvars]}: give while_trip_counts, its iterations"
        )
    return while_trip_counts(eqn)


def _own_flops(eqn: JaxprEqn) -> int:
    """Count the operations of an equation without a program inside."""
    name, results = eqn.primitive.name, [v.aval for v in eqn.outvars]
    if name in _FREE or not any(_is_floating(v.aval) for v in eqn.invars):
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


def _is_floating(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)
