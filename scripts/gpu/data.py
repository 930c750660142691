"""Random data for each GPU kernel, and what it must give: the formula in float32 on dequantised weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import CosSin, QkvProjections, apply_rope
from kernels_pallas.gated_delta_rule import DeltaProjections, DeltaState, DeltaWeights, PendingDeltaUpdates
from kernels_pallas.norm import rms_norm
from kernels_pallas.norm.reference import gated_rms_norm
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.top_k_top_p import top_k_top_p_threshold
from kernels_pallas.weights.quantized import QuantizedTensor
from scripts.gpu.cuda_cases import KernelSizes

CHECKED = 4  # rows compared with the reference: the last ones


def random_like(spec: Any, key: jax.Array) -> jax.Array:
    """Codes: any bits; scales 2^-8 to 2^-6, all different; other numbers normal. A stack is made piece by piece."""

    def make(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if spec.dtype in (jnp.float16, jnp.float32):
            return jnp.exp2(jax.random.uniform(key, shape, minval=-8, maxval=-6)).astype(spec.dtype)
        if jnp.issubdtype(spec.dtype, jnp.integer):
            kind = jnp.dtype(f"uint{8 * spec.dtype.itemsize}")
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, kind), spec.dtype)
        return jax.random.normal(key, shape, jnp.bfloat16).astype(spec.dtype)

    if spec.ndim < 3:
        return jax.jit(make, static_argnums=1)(key, spec.shape)
    return jax.jit(lambda keys: jax.lax.map(lambda k: make(k, spec.shape[1:]), keys))(
        jax.random.split(key, spec.shape[0])
    )


def data_of(name: str, args: tuple[Any, ...], size: KernelSizes, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments of a case, for its last layer."""
    if name.startswith("deltanet"):
        return delta_data(args)
    if name.startswith("routing"):
        numbered = enumerate(args[:3], 3 * seed)
        sums = [PartialSums(jax.random.normal(jax.random.key(number), x.parts.shape)) for number, x in numbered]
        return *sums, jnp.ones(args[3].shape, bool)
    if name.startswith(("norm", "gating")):
        leaves, tree = jax.tree.flatten(args)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        made = [
            jnp.ones(x.shape, bool) if x.dtype == jnp.bool_ else jax.random.normal(key, x.shape, x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]
        return tuple(jax.tree.unflatten(tree, made))
    if name.startswith("sampling"):
        logits, each = 3 * jax.random.normal(jax.random.key(seed), args[0].shape), jnp.ones(args[1].shape)
        return logits, jnp.max(logits, axis=-1), 0.7 * each, (20 * each).astype(jnp.int32), 0.95 * each
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(args)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = []
    for spec, key in zip(leaves, keys, strict=True):
        if spec.dtype == jnp.bool_:
            made.append(jnp.ones(spec.shape, bool))
        elif spec.dtype != jnp.int32:
            made.append(
                jax.random.normal(key, spec.shape, spec.dtype)
                if name.startswith("entering")
                else random_like(spec, key)
            )
        elif not spec.shape:
            made.append(jnp.int32(size.layers - 1))
        elif name.startswith(("experts", "joined")):
            chosen = [rng.choice(size.experts, size.experts_per_token, replace=False) for _ in range(spec.shape[0])]
            made.append(jnp.array(chosen, jnp.int32))
        else:
            made.append(jnp.arange(size.context - spec.shape[1], size.context, dtype=jnp.int32)[None])
    if name.startswith("attention"):
        made[0] = made[0] / math.sqrt(size.heads[2])  # the kernel takes scaled queries
    return tuple(jax.tree.unflatten(tree, made))


def delta_data(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Rows that are all live, with gates of moderate size. Before a window three rows of another one were accepted."""
    pending = args[3] if isinstance(args[3], PendingDeltaUpdates) else None
    leaves, tree = jax.tree.flatten((args[:3], () if pending is None else pending[:4]))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [jax.random.normal(key, x.shape, x.dtype) / 2 for key, x in zip(keys, leaves, strict=True)]
    arrays, updates = jax.tree.unflatten(tree, made)
    if pending is not None:
        conv, k, delta, decay = updates
        k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
        accepted = jnp.full(1, min(3, k.shape[2]), jnp.int32)
        arrays = *arrays, PendingDeltaUpdates(conv, k, delta, -jnp.abs(decay), accepted, jnp.int32(1))
    rows = jnp.full(1, args[0].qkv.parts.shape[1], jnp.int32)
    return *arrays, jnp.int32(args[2].recurrent.shape[0] - 1), 0 * rows, rows


def whole(w: Any, layer: Any) -> jax.Array:
    """One layer of a stack in float32."""
    one = jax.tree.map(lambda part: part[layer], w)
    return one.dequantize() if isinstance(one, QuantizedTensor) else one.astype(jnp.float32)


def relative_difference(name: str, actual: Any, expected: Any) -> float:
    """Return the largest difference of the results of a case, divided by the largest expected magnitude.

    The routed experts and the shared one of a "joined" case count each by themselves. NaN if either array holds NaN.
    """
    actual, expected = (np.asarray(array, np.float64) for array in (actual, expected))
    axes = (0, 2) if name.startswith("joined") else None
    largest = np.maximum(np.max(np.abs(expected), axis=axes), 1e-30)
    return float(np.max(np.max(np.abs(actual - expected), axis=axes) / largest))


def reference(name: str, args: tuple[Any, ...], chosen: int) -> jax.Array:
    """The last `CHECKED` rows in float32, by the formula; of the recurrence, which is float32 itself, in float64."""
    op = name.split()[0]
    dot = partial(jnp.einsum, precision="highest")
    if op == "linear":
        x, w, layer = args
        return dot("nd,od->no", x[-CHECKED:].astype(jnp.float32), whole(w, layer))
    if op == "attention":
        q, k, v, layer, positions, _, gates = args
        rows = q[0, -CHECKED:].astype(jnp.float32)
        keys, values = (
            jnp.repeat(x[layer, 0].astype(jnp.float32), rows.shape[1] // x.shape[2], axis=0) for x in (k, v)
        )
        scores = dot("tqh,qsh->tqs", rows, keys)
        seen = jnp.arange(k.shape[3]) <= positions[0, -CHECKED:, None, None]
        gates = gates.parts[0, -CHECKED:].astype(jnp.float32).reshape(*rows.shape[:2], 2, -1)[:, :, 1]
        return jax.nn.sigmoid(gates) * dot(
            "tqs,qsh->tqh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), values
        )
    if op == "entering":
        rows, k_norm, q_norm, rope, (keys, _) = args[:5]
        return entered(rows, k_norm, q_norm, rope, keys.shape[-1])
    if op == "routing":
        p = jax.nn.softmax(args[0].sum(jnp.float32)[-CHECKED:])
        weights, _ = jax.lax.top_k(p, chosen)
        return weights / jnp.sum(weights, axis=-1, keepdims=True)
    if op == "norm":
        x, mixture, w = args
        h = x.astype(jnp.float32) + mixture.sum(jnp.float32)
        return rms_norm(h, w, 1e-6)[-CHECKED:]
    if op == "gating":
        x, z, w = args
        wide = x.astype(jnp.float32)
        return gated_rms_norm(wide, z, w, 1e-6, "silu")[-CHECKED:]
    if op == "sampling":
        return jax.jit(top_k_top_p_threshold)(*(part[-CHECKED:] for part in args))
    if op == "deltanet":
        return jnp.array(recurrence(*args[:-2])[-CHECKED:], jnp.float32)
    x, gate_up, down, layer, numbers, weights, *shared, _ = args
    rows, numbers, weights = x[-CHECKED:].astype(jnp.float32), numbers[-CHECKED:], weights[-CHECKED:]
    gates, downs = whole(gate_up, layer), whole(down, layer)
    total = jnp.zeros_like(rows)
    for slot in range(numbers.shape[1]):
        gate, up = jnp.split(dot("nd,nod->no", rows, gates[numbers[:, slot]]), 2, axis=-1)
        total += weights[:, slot, None] * dot("ni,ndi->nd", jax.nn.silu(gate) * up, downs[numbers[:, slot]])
    if not shared:
        return total
    [(hidden, weight)] = shared
    return jnp.stack(
        [total, dot("ni,di->nd", hidden[-CHECKED:].astype(jnp.float32), whole(weight.stack, weight.layer))], 1
    )


def entered(rows: QkvProjections, k_norm: Any, q_norm: Any, rope: CosSin, each: int) -> jax.Array:
    """The last queries, normalised, turned and scaled."""
    assert rows.q_gate is not None
    q = rows.q_gate.parts[0, -CHECKED:].astype(jnp.float32)
    q = q.reshape(len(q), -1, 2, each)[:, :, 0]
    q = q * jax.lax.rsqrt(jnp.mean(q * q, axis=-1, keepdims=True) + 1e-6) * (1 + q_norm.astype(jnp.float32))
    return apply_rope(q[None], CosSin(*(angle[:, -CHECKED:] for angle in rope)))[0] * each**-0.5


def recurrence(
    projections: DeltaProjections, weights: DeltaWeights, before: DeltaState, *rest: Any
) -> np.ndarray[Any, Any]:
    """Outputs `[T, M, Dv]` of rows after the state of a layer, row by row in float64.

    Args:
        rest: the updates that the state lacks, if any, and the layer.
    """
    *updates, layer = rest
    taps, a_log, dt_bias = (np.asarray(x, np.float64) for x in weights)
    qkv, b, a = (np.asarray(sums.parts, np.float64).sum(0) for sums in projections)
    conv, state = (np.asarray(x[layer, 0], np.float64) for x in before)
    for pending in updates:
        at, accepted = int(pending.page) * before.conv.shape[0] + int(layer), int(pending.accepted[0])
        old_inputs, old_k, delta, decay = (np.asarray(x[at, 0], np.float64) for x in pending[:4])
        conv = old_inputs[accepted : accepted + len(conv)]
        for i in range(accepted):
            k = np.repeat(old_k[i], len(state) // len(old_k[i]), axis=0)
            state = state * np.exp(decay[i])[:, None, None] + k[:, :, None] * delta[i][:, None]
    inputs = np.concatenate([conv, qkv])
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
