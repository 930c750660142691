"""The experts of one layer of the 35B-A3B, packed, by the kernels and by what else JAX has: seconds, errors, the
roofline.

`kernels` multiplies packed weights. `unpack` dequantises to bfloat16 first: of few rows the experts of every
assignment, of many rows all of the layer for `jax.lax.ragged_dot`. `ragged_dot` has all weights in bfloat16 from the
start, four times the memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.platform import platform
from scripts.benchmarks.roofline import Ceilings, measure_seconds
from scripts.gpu.cuda_cases import KernelSizes, kernel_cases
from scripts.gpu.data import CHECKED, data_of, reference
from scripts.gpu.kernels import BOUND, SMOKE, least

ROWS = (1, 4, 5, 8, 64, 2048)
GATHERED = 512  # assignments up to which `unpack` takes the experts of each


def swiglu(hidden: jax.Array, dtype: Any) -> jax.Array:
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def ragged(x: jax.Array, gate_up: jax.Array, down: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
    """Rows sorted by expert, through `jax.lax.ragged_dot`; weights `[E, D, 2 I]` and `[E, I, D]`."""
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.zeros(gate_up.shape[0], jnp.int32).at[chosen.reshape(-1)].add(1)
    hidden = swiglu(jax.lax.ragged_dot(x[order // chosen.shape[1]], gate_up, sizes), x.dtype)
    each = jax.lax.ragged_dot(hidden, down, sizes, preferred_element_type=jnp.float32)
    each = jnp.zeros_like(each).at[order].set(each).reshape(*chosen.shape, -1)
    return jnp.sum(each * weights[..., None], axis=1).astype(x.dtype)


def unpacked(args: tuple[Any, ...], layer: int) -> jax.Array:
    x, gate_up, down, _, chosen, weights, _ = args
    if chosen.size > GATHERED:
        whole = (jax.tree.map(lambda part: part[layer], w).dequantize(x.dtype) for w in (gate_up, down))
        all_gate_up, all_down = (jnp.swapaxes(w, 1, 2) for w in whole)
        return ragged(x, all_gate_up, all_down, chosen, weights)
    gates, downs = (jax.tree.map(lambda part: part[layer, chosen], w).dequantize(x.dtype) for w in (gate_up, down))
    hidden = swiglu(jnp.einsum("nd,nkod->nko", x, gates), x.dtype)
    return jnp.einsum("nki,nkdi,nk->nd", hidden, downs, weights, preferred_element_type=jnp.float32).astype(x.dtype)


def sides(fn: Any, args: tuple[Any, ...], layers: int) -> dict[str, Callable[[], list[jax.Array]]]:
    """Each runs all layers in one program and gives their results."""
    x, *stacks = args[:3]
    wide = [
        jnp.stack(
            [jnp.swapaxes(jax.tree.map(lambda part, i=i: part[i], w).dequantize(x.dtype), 1, 2) for i in range(layers)]
        )
        for w in stacks
    ]
    kernels = jax.jit(lambda args: [fn(*args[:3], jnp.int32(i), *args[4:]) for i in range(layers)])
    unpack = jax.jit(lambda args: [unpacked(args, i) for i in range(layers)])
    plain = jax.jit(lambda args, a, b: [ragged(args[0], a[i], b[i], args[4], args[5]) for i in range(layers)])
    return {"kernels": lambda: kernels(args), "unpack": lambda: unpack(args), "ragged_dot": lambda: plain(args, *wide)}


def measure_all(smoke: bool, ceilings: Ceilings, go_on: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """IQ4_NL, every number of rows, the sides in turn; `go_on(case)` is asked before each."""
    many = SMOKE if smoke else KernelSizes(layers=4)
    for rows in (1, 5, 40) if smoke else ROWS:
        if not go_on(f"experts at {rows} rows"):
            continue
        size = replace(many, rows=(("decode", rows),))
        fn, specs = kernel_cases(size, ("iq4_nl",), interpret=platform() != "cuda")["experts iq4_nl decode"]()
        args = data_of("experts", specs, size)
        want, runs = reference("experts", args, size.experts_per_token), sides(fn, args, size.layers)
        moved, flops = least("experts", args, size)
        for name in [name for name in runs if name != "kernels"]:
            try:
                jax.block_until_ready(runs[name]())
            except jax.errors.JaxRuntimeError as refused:  # `ragged_dot` may want a copy of the rows for every expert
                del runs[name]
                yield {"rows": rows, "side": name, "impossible": str(refused).splitlines()[0][:200]}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(2 if smoke else 5):
            for name, run in runs.items():
                times[name] += [each / size.layers for each in measure_seconds(run, 1 if smoke else 4)]
        for name, run in runs.items():
            got = run()[-1].astype(jnp.float32)[-CHECKED:]
            error = float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))
            ratios = [mine / its for mine, its in zip(times["kernels"], times[name], strict=True)]
            yield {
                "rows": rows,
                "side": name,
                "error": error,
                "right": error <= BOUND,
                "seconds": times[name],
                "of_kernels_time": 1 / statistics.median(ratios),
                "limit": ceilings.limit(moved, flops),
                "of_roofline": ceilings.floor(moved, flops) / statistics.median(times[name]),
            }
