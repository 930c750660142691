"""Inputs of the attention ops, parts of them, and attention in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.partial_sums import PartialSums
from tests.helpers.numerics import as_float64


def random_inputs(specs: tuple[Any, ...], positions: np.ndarray, valid: np.ndarray, seed: int = 0) -> tuple[Any, ...]:
    """Normal numbers of the given shapes, for the last layer of the cache."""
    rng = np.random.default_rng(seed)

    def make(spec: Any) -> Any:
        if spec.dtype == jnp.bool_:
            return jnp.asarray(valid)
        if spec.dtype == jnp.int32:
            return jnp.asarray(positions, jnp.int32) if spec.shape else layers - 1
        return jnp.asarray(rng.normal(size=spec.shape), spec.dtype)

    layers = next(len(leaf) for leaf in jax.tree.leaves(specs) if len(leaf.shape) == 5)
    return jax.tree.map(make, specs)


def first_rows(sums: PartialSums, batch: int, sequence: slice, rows: slice) -> PartialSums:
    """Partial sums of some sequences and rows only."""
    parts = sums.parts.reshape(len(sums.parts), batch, -1, sums.parts.shape[-1])[:, sequence, rows]
    return PartialSums(parts.reshape(len(parts), -1, parts.shape[-1]))


def exact_attention(args: tuple[Any, ...]) -> np.ndarray:
    """Softmax attention in float64, row by row; rows that are not valid give zero."""
    q, keys, values, layer, positions, valid, gates = args
    q, k, v = (as_float64(x) for x in (q, keys[layer], values[layer]))
    gate = as_float64(gates.sum(args[0].dtype)).reshape(*q.shape[:3], 2, -1)[..., 1, :]
    group, out = q.shape[2] // k.shape[1], np.zeros(q.shape)
    for b, t in zip(*np.asarray(valid).nonzero(), strict=True):
        seen = int(positions[b, t]) + 1
        for head in range(q.shape[2]):
            score = k[b, head // group, :seen] @ q[b, t, head]
            p = np.exp(score - score.max())
            out[b, t, head] = p / p.sum() @ v[b, head // group, :seen]
    return out / (1 + np.exp(-gate))
