"""Each GPU kernel on random data: right or wrong against float32 on dequantised weights, seconds, and the roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cuda_cases import FORMS, Case, KernelSizes, kernel_cases
from roofline import Ceilings, seconds

from kernels_pallas.attention import Entering
from kernels_pallas.deltanet import Fixed, Projected
from kernels_pallas.quantized import QuantizedTensor
from kernels_pallas.sampling import least_kept
from kernels_pallas.sampling.triton import LISTED
from kernels_pallas.target import target
from mtpjax.model.rope import Rotary, rotate

SMOKE = KernelSizes(
    hidden=256, layers=2, experts=4, chosen=2, expert_size=256, heads=(4, 2, 64), context=512, linear=(2, 4, 32),
    vocab=9_000, rows=(("decode", 3), ("prefill", 32)),
)  # fmt: skip
CHECKED = 4  # rows compared with the reference: the last ones
BOUND = 2e-2  # of the largest magnitude: bfloat16 operands and results


def random_like(spec: Any, key: jax.Array) -> jax.Array:
    """Codes: any bits; scales 2^-7; floats normal. The first axis of a stack is made piece by piece."""
    if spec.dtype in (jnp.float16, jnp.float32) and spec.ndim:
        return jnp.full(spec.shape, 2.0**-7, spec.dtype)

    def make(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if jnp.issubdtype(spec.dtype, jnp.integer):
            kind = jnp.dtype(f"uint{8 * spec.dtype.itemsize}")
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, kind), spec.dtype)
        return jax.random.normal(key, shape, jnp.bfloat16).astype(spec.dtype)

    if spec.ndim < 3:
        return jax.jit(make, static_argnums=1)(key, spec.shape)
    return jax.jit(lambda keys: jax.lax.map(lambda k: make(k, spec.shape[1:]), keys))(jax.random.split(key, spec.shape[0]))


def data_of(name: str, args: tuple[Any, ...], size: KernelSizes) -> tuple[Any, ...]:
    """Random arguments of a case."""
    if name.startswith("deltanet"):
        return delta_data(args)
    if name.startswith("routing"):
        parts = (jax.random.normal(jax.random.key(i), part.shape) for i, part in enumerate(args[:3]))
        return *parts, jnp.ones(args[3].shape, bool)
    if name.startswith("sampling"):
        logits, each = 3 * jax.random.normal(jax.random.key(0), args[0].shape), jnp.ones(args[1].shape)
        return logits, jnp.max(logits, axis=-1), 0.7 * each, (20 * each).astype(jnp.int32), 0.95 * each
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(args)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = []
    for spec, key in zip(leaves, keys, strict=True):
        if spec.dtype == jnp.bool_:
            made.append(jnp.ones(spec.shape, bool))
        elif spec.dtype != jnp.int32:
            made.append(jax.random.normal(key, spec.shape, spec.dtype) if name.startswith("entering") else random_like(spec, key))
        elif not spec.shape:
            made.append(jnp.int32(size.layers - 1))
        elif name.startswith("experts"):
            chosen = [rng.choice(size.experts, size.chosen, replace=False) for _ in range(spec.shape[0])]
            made.append(jnp.array(chosen, jnp.int32))
        else:
            made.append(jnp.arange(size.context - spec.shape[1], size.context, dtype=jnp.int32)[None])
    if name.startswith("attention"):
        made[0] = made[0] / math.sqrt(size.heads[2])  # the kernel takes scaled queries
    return tuple(jax.tree.unflatten(tree, made))


def delta_data(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A window whose rows are all live; gates of moderate size."""
    leaves, tree = jax.tree.flatten(args[:4])
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [jax.random.normal(key, x.shape, x.dtype) / 2 for key, x in zip(keys, leaves, strict=True)]
    rows = jnp.full(1, args[0].qkv.shape[1], jnp.int32)
    return *jax.tree.unflatten(tree, made), jnp.int32(args[3].shape[0] - 1), 0 * rows, rows


def whole(w: Any, layer: Any = ...) -> jax.Array:
    """A weight, or one layer of a stack, in float32."""
    one = w if layer is ... else jax.tree.map(lambda part: part[layer], w)
    return one.dequantize() if isinstance(one, QuantizedTensor) else one.astype(jnp.float32)


def reference(name: str, args: tuple[Any, ...]) -> jax.Array:
    """The last `CHECKED` rows in float32, by the formula; of the recurrence, which is float32 itself, in float64."""
    op = name.split()[0]
    dot = partial(jnp.einsum, precision="highest")
    if op == "linear":
        x, w = args
        return dot("nd,od->no", x[-CHECKED:].astype(jnp.float32), whole(w))
    if op == "attention":
        q, k, v, layer, positions, _, gates = args
        rows = q[0, -CHECKED:].astype(jnp.float32)
        keys, values = (jnp.repeat(x[layer, 0].astype(jnp.float32), rows.shape[1] // x.shape[2], axis=0) for x in (k, v))
        scores = dot("tqh,qsh->tqs", rows, keys)
        seen = jnp.arange(k.shape[3]) <= positions[0, -CHECKED:, None, None]
        gates = gates[0, -CHECKED:].astype(jnp.float32).reshape(*rows.shape[:2], 2, -1)[:, :, 1]
        return jax.nn.sigmoid(gates) * dot("tqs,qsh->tqh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), values)
    if op == "entering":
        return entered(*args[:5], args[5][0].shape[-1])
    if op == "routing":
        p = jax.nn.softmax(jnp.sum(args[0], axis=0)[-CHECKED:])
        weights, _ = jax.lax.top_k(p, SMOKE.chosen if p.shape[1] == SMOKE.experts else KernelSizes().chosen)
        return weights / jnp.sum(weights, axis=-1, keepdims=True)
    if op == "sampling":
        return jax.jit(least_kept)(*(part[-CHECKED:] for part in args))
    if op == "deltanet":
        return jnp.array(recurrence(*args[:5])[-CHECKED:], jnp.float32)
    x, gate_up, down, layer, chosen, weights, _ = args
    rows, chosen, weights = x[-CHECKED:].astype(jnp.float32), chosen[-CHECKED:], weights[-CHECKED:]
    gates, downs = whole(gate_up, layer), whole(down, layer)
    total = jnp.zeros_like(rows)
    for slot in range(chosen.shape[1]):
        gate, up = jnp.split(dot("nd,nod->no", rows, gates[chosen[:, slot]]), 2, axis=-1)
        total += weights[:, slot, None] * dot("ni,ndi->nd", jax.nn.silu(gate) * up, downs[chosen[:, slot]])
    return total


def entered(rows: Entering, k_norm: Any, q_norm: Any, cos: Any, sin: Any, each: int) -> jax.Array:
    """The last queries, normalised, turned and scaled."""
    q = rows.q[0, -CHECKED:].astype(jnp.float32)
    q = q.reshape(len(q), -1, 2, each)[:, :, 0]
    q = q * jax.lax.rsqrt(jnp.mean(q * q, axis=-1, keepdims=True) + 1e-6) * (1 + q_norm.astype(jnp.float32))
    return rotate(q[None], Rotary(cos[:, -CHECKED:], sin[:, -CHECKED:]))[0] * each**-0.5


def recurrence(projected: Projected, fixed: Fixed, before: Any, states: Any, layer: Any) -> np.ndarray:
    """Outputs `[W, M, V]` of a window behind the state of a layer, row by row in float64."""
    taps, a_log, dt_bias = (np.float64(x) for x in fixed)
    qkv, b, a = (np.float64(parts).sum(0) for parts in projected)
    state, inputs = np.float64(states[layer, 0]), np.concatenate([np.float64(before[layer, 0]), qkv])
    heads, each, width = state.shape
    keys, out = (qkv.shape[1] - heads * width) // (2 * each), []
    g, beta = -np.exp(a_log) * np.log1p(np.exp(a + dt_bias)), 1 / (1 + np.exp(-b))
    for t in range(len(qkv)):
        u = (inputs[t : t + taps.shape[1]] * taps.T).sum(0)
        u = u / (1 + np.exp(-u))
        q, k = u[: 2 * keys * each].reshape(2, keys, each)
        q, k = (np.repeat(x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6), heads // keys, axis=0) for x in (q, k))
        state = state * np.exp(g[t])[:, None, None]
        v = u[2 * keys * each :].reshape(heads, width)
        state = state + k[:, :, None] * (beta[t][:, None] * (v - np.einsum("mkv,mk->mv", state, k)))[:, None]
        out.append(np.einsum("mkv,mk->mv", state, q) / math.sqrt(each))
    return np.array(out)


def least(name: str, args: tuple[Any, ...], size: KernelSizes) -> tuple[float, float]:
    """Bytes and operations of a case at the least."""
    op = name.split()[0]
    if op == "linear":
        x, w = args
        return w.nbytes + 2 * x.nbytes, 2.0 * x.shape[0] * math.prod(w.shape)
    if op == "attention":
        q, k = args[:2]
        _, rows, heads, each = q.shape
        return 2 * k.nbytes / size.layers + 2 * q.nbytes, 4.0 * rows * heads * each * size.context
    if op == "entering":
        moved = sum(part.nbytes for part in jax.tree.leaves(args[0]))
        return 2 * moved, 10.0 * moved
    if op == "routing":
        return args[0].nbytes, 4.0 * args[0].size
    if op == "sampling":
        return args[0].nbytes, 3.0 * LISTED * args[0].size
    if op == "deltanet":
        (qkv, *_), _, _, state, *_ = args
        one = state.nbytes / state.shape[0]
        return one + 2 * qkv.nbytes, 8.0 * qkv.shape[1] * one / 4
    x, gate_up, down, _, chosen = args[:5]
    touched, matrices = len(np.unique(np.asarray(chosen))), size.layers * size.experts
    flops = 2.0 * chosen.size * (math.prod(gate_up.shape) + math.prod(down.shape)) / matrices
    return (gate_up.nbytes + down.nbytes) / matrices * touched + 2 * x.nbytes, flops


def in_place(fn: Any, args: tuple[Any, ...]) -> Callable[[], Any]:
    """Calls `fn`, which takes the cache and gives it back, with the one that it gave back."""
    held = args[5]

    def run() -> Any:
        nonlocal held
        q, held = fn(*args[:5], held, *args[6:])
        return q

    return run


def measure(name: str, make: Case, size: KernelSizes, ceilings: Ceilings, runs: int) -> dict[str, Any]:
    """One case: the largest error over the largest magnitude, seconds, and the share of the roofline."""
    fn, specs = make()
    args = data_of(name, specs, size)
    run = in_place(fn, args) if name.startswith("entering") else partial(fn, *args)
    got = jax.tree.leaves(run())[0]
    want = reference(name, args)
    rows = jnp.asarray(got, jnp.float32).reshape(-1, *want.shape[1:])[-CHECKED:]
    error = float(jnp.max(jnp.abs(rows - want)) / jnp.max(jnp.abs(want)))
    times = seconds(run, runs)
    moved, flops = least(name, args, size)
    return {
        "case": name, "error": error, "right": error <= BOUND, "seconds": times,
        "of_roofline": ceilings.floor(moved, flops) / statistics.median(times), "limit": ceilings.limit(moved, flops),
    }  # fmt: skip


def measure_all(smoke: bool, ceilings: Ceilings, go_on: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Every kernel; `go_on(case)` is asked before each."""
    size, forms = (SMOKE, ("iq4_nl", "q6_k")) if smoke else (KernelSizes(), tuple(FORMS))
    for name, make in kernel_cases(size, forms, interpret=target() != "cuda").items():
        if go_on(name):
            yield measure(name, make, size, ceilings, 2 if smoke else 20)
