"""Each GPU kernel on random data: right or wrong, seconds, and the roofline."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.platform import platform
from kernels_pallas.top_k_top_p.triton import TOP_PER_TILE
from scripts.benchmarks.roofline import Ceilings, measure_seconds
from scripts.benchmarks.trace_events import read_op_times
from scripts.gpu.cuda_cases import FORMS, Case, KernelSizes, kernel_cases
from scripts.gpu.data import CHECKED, data_of, reference, relative_difference

SMOKE = KernelSizes(
    hidden=256,
    layers=2,
    experts=4,
    experts_per_token=2,
    expert_size=256,
    heads=(4, 2, 64),
    context=512,
    linear=(2, 4, 32),
    vocab=9_000,
    rows=(("decode", 3), ("prefill", 32)),
)
LAYERLESS = ("routing", "sampling", "norm", "gating")  # kernels without a layer's number
# Arguments that a kernel changes in place, from one index up to another, and returns after its first result.
CHANGED = {"entering": (4, 5), "deltanet decode": (2, 4), "deltanet prefill": (2, 3)}
BOUND = 2e-2  # of the largest magnitude: bfloat16 operands and results


def least(name: str, args: tuple[Any, ...], size: KernelSizes) -> tuple[float, float]:
    """Bytes and operations of a case at the least."""
    op = name.split()[0]
    if op == "linear":
        x, w, _ = args
        return w.nbytes / size.layers + 2 * x.nbytes, 2.0 * x.shape[0] * math.prod(w.shape[1:])
    if op == "attention":
        q, k = args[:2]
        _, rows, heads, each = q.shape
        return 2 * k.nbytes / size.layers + 2 * q.nbytes, 4.0 * rows * heads * each * size.context
    if op == "entering":
        moved = sum(part.nbytes for part in jax.tree.leaves(args[0]))
        return 2 * moved, 10.0 * moved
    if op in ("norm", "gating"):
        moved = sum(part.nbytes for part in jax.tree.leaves(args)) + 2 * args[0].nbytes
        return moved, 8.0 * args[0].size
    if op == "routing":
        return args[0].parts.nbytes, 4.0 * args[0].parts.size
    if op == "sampling":
        return args[0].nbytes, 3.0 * TOP_PER_TILE * args[0].size
    if op == "deltanet":
        qkv, state = args[0].qkv.parts, args[2].recurrent
        one = state.nbytes / state.shape[0]
        return 2 * one + 2 * qkv.nbytes, 8.0 * qkv.shape[1] * one / 4
    x, gate_up, down, _, chosen = args[:5]
    shared = args[6].down.stack if op == "joined" else None
    touched, matrices = len(np.unique(np.asarray(chosen))), size.layers * size.experts
    flops = 2.0 * chosen.size * (math.prod(gate_up.shape) + math.prod(down.shape)) / matrices
    moved = (gate_up.nbytes + down.nbytes) / matrices * touched + 2 * x.nbytes
    if shared is not None:
        moved += shared.nbytes / size.layers
        flops += 2.0 * len(x) * math.prod(shared.shape[1:])
    return moved, flops


def all_layers(name: str, fn: Any, args: tuple[Any, ...], size: KernelSizes) -> Callable[[], Any]:
    """Runs the kernel once for each layer, in one program: what a launch by itself takes is mostly the host's, and data
    that was read a moment ago comes from a cache that decoding does not have. Kernels without layers get other data
    instead.
    """
    layers = range(size.layers)
    if name.startswith(LAYERLESS):
        sets = [data_of(name, args, size, seed) for seed in layers]
        return partial(jax.jit(lambda sets: [fn(*each) for each in sets]), sets)
    at = next(i for i, arg in enumerate(args) if not isinstance(arg, tuple) and arg.ndim == 0)

    def of_layer(args: tuple[Any, ...], layer: int) -> tuple[Any, ...]:
        return *args[:at], jnp.int32(layer), *args[at + 1 :]

    begin, end = next((span for case, span in CHANGED.items() if name.startswith(case)), (0, 0))
    if begin == end:
        return partial(jax.jit(lambda args: [fn(*of_layer(args, layer)) for layer in layers]), args)

    def through_all(held: Any, *others: Any) -> Any:
        rows = []
        for layer in layers:
            result, *held = fn(*of_layer((*others[:begin], *held, *others[begin:]), layer))
            rows.append(result)
        return rows, held

    held, others = args[begin:end], (*args[:begin], *args[end:])
    program = jax.jit(through_all, donate_argnums=0)

    def run() -> Any:
        nonlocal held
        rows, held = program(held, *others)
        return rows

    return run


def measure_kernels(run: Callable[[], Any], runs: int) -> tuple[list[float], str]:
    """Return seconds of the kernels of a call, and whose clock that is: "profiler" on a GPU, else "host".

    A kernel of few microseconds takes the host longer to launch than the GPU to run.
    """
    if platform() != "cuda":
        return measure_seconds(run, runs), "host"
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                jax.block_until_ready(run())
        spent = sum(seconds for _, seconds in read_op_times(Path(folder), "jit").values())
    return ([spent / runs], "profiler") if spent else (measure_seconds(run, runs), "host")


def measure(name: str, make: Case, size: KernelSizes, ceilings: Ceilings, runs: int) -> dict[str, Any]:
    """One case: the largest error over the largest magnitude, seconds a layer, and the share of the roofline."""
    fn, specs = make()
    args = data_of(name, specs, size)
    want = reference(name, args, size.experts_per_token)
    moved, flops = least(name, args, size)
    run = all_layers(name, fn, args, size)
    got = jax.tree.leaves(fn(*args) if name.startswith(LAYERLESS) else run()[-1])[-1 if name.startswith("norm") else 0]
    rows = jnp.asarray(got, jnp.float32).reshape(-1, *want.shape[1:])[-CHECKED:]
    error = relative_difference(name, rows, want)
    times, clock = measure_kernels(run, runs)
    times = [each / size.layers for each in times]
    return {
        "case": name,
        "clock": clock,
        "error": error,
        "right": error <= BOUND,
        "seconds": times,
        "of_roofline": ceilings.floor(moved, flops) / statistics.median(times),
        "limit": ceilings.limit(moved, flops),
    }


def measure_all(smoke: bool, ceilings: Ceilings, go_on: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Every kernel; `go_on(case)` is asked before each."""
    size, forms = (SMOKE, ("iq4_nl", "q6_k")) if smoke else (KernelSizes(), FORMS)
    for name, make in kernel_cases(size, forms, interpret=platform() != "cuda").items():
        if go_on(name):
            yield measure(name, make, size, ceilings, 2 if smoke else 20)
