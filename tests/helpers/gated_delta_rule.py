"""The gated delta rule in float64, one row after the other, and random arguments of its ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels_pallas.gated_delta_rule import DeltaProjections, DeltaState, DeltaWeights
from kernels_pallas.gated_delta_rule.inputs import DeltaInputs
from kernels_pallas.gated_delta_rule.shapes import DeltaShape
from kernels_pallas.partial_sums import PartialSums

LAYERS, LAYER = 2, 1  # layers of the state, and the one that `random_args` selects


class Expected(NamedTuple):
    """float64 results for T rows of each of B sequences."""

    o: np.ndarray  # [B, T, M, Dv]
    delta: np.ndarray  # [B, T, M, Dv]
    states: np.ndarray  # [B, 1 + T, M, Dk, Dv]: before, between and after the rows


def step_through(inputs: DeltaInputs, state: np.ndarray) -> Expected:
    """S <- exp(g) S; delta = beta (v - S^T k); S <- S + k delta^T; o = S^T q, one row after the other."""
    q, k, v, beta, g = (np.asarray(x, np.float64) for x in inputs)
    ratio = v.shape[2] // q.shape[2]
    q, k = (np.repeat(x, ratio, axis=2) for x in (q, k))
    states, o, delta = [np.asarray(state, np.float64)], np.zeros_like(v), np.zeros_like(v)
    for t in range(v.shape[1]):
        s = states[-1] * np.exp(g[:, t])[..., None, None]
        delta[:, t] = beta[:, t, :, None] * (v[:, t] - np.einsum("bmkv,bmk->bmv", s, k[:, t]))
        states.append(s + k[:, t, ..., None] * delta[:, t, :, None])
        o[:, t] = np.einsum("bmkv,bmk->bmv", states[-1], q[:, t])
    return Expected(o, delta, np.stack(states, axis=1))


def exact_conv_inputs(args: tuple[Any, ...]) -> np.ndarray:
    """Convolution inputs `[B, past + T, C]`: zeros, the inputs of the step before, the valid rows, zeros."""
    projections, _, state, layer, *placement = args
    pad, valid = (np.asarray(x) for x in placement)
    qkv, before = np.asarray(projections.qkv.parts, np.float64).sum(0), np.asarray(state.conv[layer], np.float64)
    past, rows = before.shape[1], valid.shape[1]
    inputs = np.zeros((len(before), past + rows, before.shape[2]))
    for b, start in enumerate(pad):
        end = start + valid[b].sum()
        inputs[b, start : start + past] = before[b]
        inputs[b, past + start : past + end] = qkv[b * rows + start : b * rows + end]
    return inputs


def exact_inputs(args: tuple[Any, ...]) -> DeltaInputs:
    """Inputs of the recurrence from arguments of an op: convolution, gates and normalisation in float64."""
    projections, weights, state, *_ = args
    valid = np.asarray(args[-1])
    taps, a_log, dt_bias = (np.asarray(x, np.float64) for x in weights)
    b, a = (
        np.asarray(sums.parts, np.float64).sum(0).reshape(*valid.shape, -1)
        for sums in (projections.beta, projections.decay)
    )
    rows, (heads, key_size, value_size) = valid.shape[1], state.recurrent.shape[2:]
    inputs = exact_conv_inputs(args)
    u = np.sum([inputs[:, i : i + rows] * taps[:, i] for i in range(taps.shape[1])], axis=0)
    u = (u / (1 + np.exp(-u))).astype(projections.qkv.parts.dtype).astype(np.float64)  # the convolution is rounded
    key_channels = (u.shape[2] - heads * value_size) // 2
    q, k = (u[..., i * key_channels : (i + 1) * key_channels] for i in range(2))
    q, k = (x.reshape(*valid.shape, -1, key_size) for x in (q, k))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    beta = valid[..., None] / (1 + np.exp(-b))
    g = -np.exp(a_log) * np.log1p(np.exp(a + dt_bias)) * valid[..., None]
    v = u[..., 2 * key_channels :].reshape(*valid.shape, heads, value_size)
    return DeltaInputs(q / np.sqrt(key_size), k, v, beta, g)  # type: ignore[arg-type]


def random_args(
    shape: DeltaShape, pad: list[int], end: list[int], rows: int, dtype: str = "float32", *, equal_keys: bool = False
) -> tuple[Any, ...]:
    """Make arguments of both ops, for layer `LAYER`. Rows `pad[b]...end[b] - 1` of sequence b are valid.

    Args:
        shape: sizes of the layer.
        dtype: "float32": projections are several partial sums; "bfloat16": qkv is one sum.
        equal_keys: all keys are nearly the same, steps are whole (beta = 1) and the decay is slow.
    """
    rng = np.random.default_rng(rows)
    heads, batch = shape.value_heads, len(pad)
    qkv = rng.normal(size=(1 if dtype != "float32" else 2, batch * rows, shape.channels))
    b, a = (2 * rng.normal(size=(sums, batch * rows, heads)) for sums in (4, 2))
    taps = rng.normal(size=(shape.channels, shape.conv_width))
    # Not larger: the sum of a strong decay over a chunk would lose float32's digits.
    a_log, dt_bias = rng.normal(size=(2, heads)) - 1
    conv = rng.normal(size=(LAYERS, batch, shape.conv_width - 1, shape.channels))
    recurrent = rng.normal(size=(LAYERS, batch, heads, shape.key_size, shape.value_size))
    if equal_keys:
        keys = slice(shape.key_heads * shape.key_size, 2 * shape.key_heads * shape.key_size)
        for inputs in (qkv, conv):
            inputs[..., keys] = (1 + 0.01 * inputs[..., keys]) / (len(qkv) if inputs is qkv else 1)
        b, a = b + 10, a - 2.5
    start, stop = np.array(pad, np.int32), np.array(end, np.int32)
    valid = (np.arange(rows) >= start[:, None]) & (np.arange(rows) < stop[:, None])
    f32 = jnp.float32
    sums = (PartialSums(jnp.asarray(x, of)) for x, of in ((qkv, dtype), (b, f32), (a, f32)))
    weights = DeltaWeights(*(jnp.asarray(x, f32) for x in (taps, a_log, dt_bias)))
    state = DeltaState(jnp.asarray(conv, dtype), jnp.asarray(recurrent, f32))
    return DeltaProjections(*sums), weights, state, LAYER, jnp.asarray(start), jnp.asarray(valid)


def select(args: tuple[Any, ...], sequences: slice, rows: slice) -> tuple[Any, ...]:
    """Return the arguments for some of the sequences and some of the rows."""
    projections, weights, state, layer, pad, valid = args

    def cut(sums: PartialSums) -> PartialSums:
        parts = sums.parts.reshape(len(sums.parts), *valid.shape, -1)[:, sequences, rows]
        return PartialSums(parts.reshape(len(parts), -1, parts.shape[-1]))

    some_state = DeltaState(*(x[:, sequences] for x in state))
    some_projections = DeltaProjections(*map(cut, projections))
    return some_projections, weights, some_state, layer, pad[sequences], valid[sequences, rows]
