"""Each op, bit for bit: rows of a call against the same rows among more, in the order in which a layer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import CosSin, QkvProjections, attention, norm_rope_update_cache
from kernels_pallas.gated_delta_rule import (
    DeltaProjections,
    DeltaState,
    DeltaWeights,
    no_updates,
    recurrent_gated_delta_rule,
)
from kernels_pallas.grouped_matmul import fused_moe
from kernels_pallas.matmul import linear
from kernels_pallas.norm import MoeOutput, add_rms_norm, gated_rms_norm, rms_norm
from kernels_pallas.packed.formats import abstract_weight
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.top_k_top_p import top_k_top_p_threshold
from kernels_pallas.topk_softmax import topk_softmax
from scripts.gpu.bits_model import Difference, count_differing
from scripts.gpu.cuda_cases import KernelSizes
from scripts.gpu.data import random_like

ROWS = (1, 2, 5, 9, 16, 20, 64, 256, 1280)
WINDOW_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9)
NUM_PARTS = 4  # partial sums of products with few rows
EPS = 1e-6


class OpCase(NamedTuple):
    """One op.

    Attributes:
        rows: numbers of rows of a call, ascending.
        run: returns results for so many rows, each with the rows as its first axis.
        from_end: a call has the last rows of the longest one; otherwise the first ones.
    """

    rows: Sequence[int]
    run: Callable[[int], list[jax.Array]]
    from_end: bool = True


def check_op(name: str, case: OpCase) -> Difference:
    """Compare the results of each number of rows with those of the most rows."""
    most = max(case.rows)
    whole = [np.asarray(a) for a in case.run(most)]
    differing = total = 0
    where = None
    for count in case.rows:
        if count == most:
            continue
        rows = slice(most - count, most) if case.from_end else slice(count)
        different = 0
        for got, want in zip(case.run(count), whole, strict=True):
            different += count_differing(np.asarray(got), want[rows])
            total += got.size
        differing += different
        if different and where is None:
            where = f"{count} rows: {different} numbers"
    return Difference(name, differing, total, where)


def op_cases(
    size: KernelSizes, forms: Sequence[str], dtype: Any = jnp.bfloat16, rows: Sequence[int] = ROWS
) -> Iterator[tuple[str, OpCase]]:
    """Yield each op with its name. Weights are random, in each of `forms` (`kernels_pallas.packed.formats`)."""
    yield from _norm_cases(size, dtype, rows)
    for form in forms:
        yield f"linear {form}", _linear_case(size, form, dtype, rows)
    yield "delta rule, window", _delta_case(size, dtype)
    yield "queries and keys", _qkv_case(size, dtype, rows)
    yield "attention, window", _attention_case(size, dtype, [n for n in rows if n <= max(WINDOW_ROWS)], False)
    yield "attention, prompt", _attention_case(size, dtype, rows, True)
    yield "choice of experts", _choice_case(size, dtype, rows)
    for form in forms:
        yield f"experts {form}", _experts_case(size, form, dtype, rows)
    yield "top-k and top-p", _threshold_case(size, WINDOW_ROWS)


def _normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _weight(shape: tuple[int, ...], form: str) -> Any:
    """Return a random weight in a form; all of its scales differ."""
    leaves, tree = jax.tree.flatten(abstract_weight(shape, form))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [random_like(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])


def _norm_cases(size: KernelSizes, dtype: Any, rows: Sequence[int]) -> Iterator[tuple[str, OpCase]]:
    most, hidden, (_, heads, head_dim) = max(rows), size.hidden, size.linear
    x, w = _normal(0, (most, hidden), dtype), _normal(1, (hidden,))
    parts, experts = _normal(2, (NUM_PARTS, most, hidden)), _normal(3, (most, size.experts_per_token, hidden))
    gate, head_rows = _normal(4, (NUM_PARTS, most, 1)), _normal(5, (most, heads, head_dim), dtype)
    z = _normal(6, (NUM_PARTS, most, heads * head_dim))
    head_weight = _normal(7, (head_dim,))
    norm = jax.jit(lambda x: [rms_norm(x, w, EPS)])
    add = jax.jit(lambda x, parts: list(add_rms_norm(x, PartialSums(parts), w, EPS)))

    @jax.jit
    def add_experts(x: jax.Array, experts: jax.Array, parts: jax.Array, gate: jax.Array) -> list[jax.Array]:
        output = MoeOutput(experts, jnp.ones(len(x), bool), PartialSums(parts), PartialSums(gate))
        return list(add_rms_norm(x, output, w, EPS))

    gated = jax.jit(lambda x, z: [gated_rms_norm(x, PartialSums(z), head_weight, EPS, "silu")])
    yield "norm", OpCase(rows, lambda n: norm(x[-n:]))
    yield "norm of a sum", OpCase(rows, lambda n: add(x[-n:], parts[:, -n:]))
    yield (
        "norm after the experts",
        OpCase(rows, lambda n: add_experts(x[-n:], experts[-n:], parts[:, -n:], gate[:, -n:])),
    )
    yield "gated norm", OpCase(rows, lambda n: gated(head_rows[-n:], z[:, -n:]))


def _linear_case(size: KernelSizes, form: str, dtype: Any, rows: Sequence[int]) -> OpCase:
    x, w = _normal(0, (max(rows), size.hidden), dtype), _weight((size.hidden, size.hidden), form)
    product = jax.jit(lambda x, w: [linear(x, w, out_dtype=jnp.float32)])
    return OpCase(rows, lambda n: product(x[-n:], w))


def _delta_case(size: KernelSizes, dtype: Any) -> OpCase:
    key_heads, heads, head_dim = size.linear
    most, channels, width = max(WINDOW_ROWS), (2 * key_heads + heads) * head_dim, 4
    qkv, b, a = (_normal(i, (NUM_PARTS, most, n)) for i, n in enumerate((channels, heads, heads)))
    weights = DeltaWeights(_normal(3, (channels, width)), _normal(4, (heads,)), _normal(5, (heads,)))
    state = DeltaState(_normal(6, (1, 1, width - 1, channels), dtype), _normal(7, (1, 1, heads, head_dim, head_dim)))

    @partial(jax.jit, static_argnums=0)
    def window(n: int) -> list[jax.Array]:
        projections = DeltaProjections(*(PartialSums(sums[:, :n]) for sums in (qkv, b, a)))
        pad, valid = jnp.zeros(1, jnp.int32), jnp.ones((1, n), bool)
        args = projections, weights, state, no_updates(state, n), 0, pad, valid
        o, _, updates = recurrent_gated_delta_rule(*args, dtype=dtype)
        return [
            o[0],
            *(stack[0, 0] for stack in (updates.k, updates.delta, updates.decay)),
        ]  # of the layer and sequence

    return OpCase(WINDOW_ROWS, window, from_end=False)


def _qkv_case(size: KernelSizes, dtype: Any, rows: Sequence[int]) -> OpCase:
    q_heads, kv_heads, head_dim = size.heads
    most, kv_len = max(rows), -(-max(rows) // 256) * 256
    k, v = (_normal(i, (NUM_PARTS, most, kv_heads * head_dim)) for i in range(2))
    q_gate, norms = _normal(2, (NUM_PARTS, most, 2 * q_heads * head_dim)), (_normal(3, (head_dim,)),) * 2
    angle = _normal(4, (1, most, head_dim // 8))
    empty = jnp.zeros((1, 1, kv_heads, kv_len, head_dim), dtype)

    @partial(jax.jit, static_argnums=0)
    def enter(n: int) -> list[jax.Array]:
        projections = QkvProjections(*(PartialSums(sums[:, -n:]) for sums in (k, v, q_gate)))
        rope, positions = CosSin(jnp.cos(angle[:, -n:]), jnp.sin(angle[:, -n:])), jnp.arange(most - n, most)[None]
        args = projections, *norms, rope, (empty, empty), 0, positions, jnp.ones((1, n), bool)
        q, (keys, values) = norm_rope_update_cache(*args, eps=EPS, dtype=dtype)
        assert q is not None  # there are queries
        written = (jnp.moveaxis(cache[0, 0, :, most - n : most], 0, 1) for cache in (keys, values))
        return [q[0], *written]

    return OpCase(rows, enter)


def _attention_case(size: KernelSizes, dtype: Any, rows: Sequence[int], is_prompt: bool) -> OpCase:
    q_heads, kv_heads, head_dim = size.heads
    most, kv_len = max(rows), -(-max(size.context, *rows) // 256) * 256
    q = _normal(0, (1, most, q_heads, head_dim), dtype) / head_dim**0.5
    keys, values = (_normal(i, (1, 1, kv_heads, kv_len, head_dim), dtype) for i in (1, 2))
    gates = _normal(3, (NUM_PARTS, most, 2 * q_heads * head_dim))

    @partial(jax.jit, static_argnums=0)
    def attend(n: int) -> list[jax.Array]:
        positions = jnp.arange(kv_len - n, kv_len)[None]
        valid, sums = jnp.ones((1, n), bool), PartialSums(gates[:, -n:])
        return [attention(q[:, -n:], keys, values, 0, positions, valid, sums, is_prompt=is_prompt)[0]]

    return OpCase(rows, attend)


def _choice_case(size: KernelSizes, dtype: Any, rows: Sequence[int]) -> OpCase:
    most = max(rows)
    logits = _normal(0, (NUM_PARTS, most, size.experts))
    gate, up = (_normal(i, (NUM_PARTS, most, size.expert_size)) for i in (1, 2))

    @jax.jit
    def choose(logits: jax.Array, gate: jax.Array, up: jax.Array) -> list[jax.Array]:
        sums, valid = (PartialSums(logits), PartialSums(gate), PartialSums(up)), jnp.ones(logits.shape[1], bool)
        return list(topk_softmax(*sums, valid, size.experts_per_token, dtype)[:3])

    return OpCase(rows, lambda n: choose(logits[:, -n:], gate[:, -n:], up[:, -n:]))


def _experts_case(size: KernelSizes, form: str, dtype: Any, rows: Sequence[int]) -> OpCase:
    most, rng = max(rows), np.random.default_rng(0)
    x = _normal(0, (most, size.hidden), dtype)
    gate_up = _weight((1, size.experts, 2 * size.expert_size, size.hidden), form)
    down = _weight((1, size.experts, size.hidden, size.expert_size), form)
    ids = np.argsort(rng.random((most, size.experts)), axis=1)[:, : size.experts_per_token].astype(np.int32)
    weights = rng.random(ids.shape).astype(np.float32)
    run = jax.jit(lambda x, gate_up, down, ids, weights: [fused_moe(x, gate_up, down, jnp.int32(0), ids, weights)])
    return OpCase(rows, lambda n: run(x[-n:], gate_up, down, ids[-n:], weights[-n:]))


def _threshold_case(size: KernelSizes, rows: Sequence[int]) -> OpCase:
    logits = 3 * _normal(0, (max(rows), size.vocab))

    @jax.jit
    def threshold(logits: jax.Array) -> list[jax.Array]:
        each = jnp.ones(len(logits))
        top_k = (20 * each).astype(jnp.int32)
        return [top_k_top_p_threshold(logits, jnp.max(logits, axis=-1), 0.7 * each, top_k, 0.95 * each)]

    return OpCase(rows, lambda n: threshold(logits[-n:]))
