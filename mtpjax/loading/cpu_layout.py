"""A loaded model -> the same with its weights as the device multiplies them fastest."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.platform import platform
from kernels_pallas.weights import BitcastBfloat16, FusedExperts, FusedPlaceholder, TransposedWeight
from mtpjax.loading.orbax_io import ParamPath
from mtpjax.loading.weight_map import LoadedModel, fill, flat
from mtpjax.model.params import Dense, Expert

# Numbers in a weight up to which it is turned: of larger ones, a single row would pay for what several gain.
SMALL_WEIGHT, SMALL_HEAD = 1 << 18, 1 << 20
# Weights that read the same rows: the first one's name -> the others, from the module that holds it.
SIDE_BY_SIDE = {
    "in_qkv": (("in_z",), ("in_b",), ("in_a",)), "k": (("v",),), "gate": (("up",),),
    "router": (("shared_gate",), ("shared", "gate"), ("shared", "up")),
}  # fmt: skip


def optimize_for_cpu(model: LoadedModel) -> LoadedModel:
    """The model with its weights as the device multiplies them fastest; away from a CPU, as it is.

    * Small matrices turned, those that read the same rows side by side, the experts of a layer abreast, and a small tied
      embedding a second time, as an LM head. See `kernels_pallas.weights.transposed`.
    * Other bfloat16 experts as `BitcastBfloat16`, without a copy. XLA's CPU backend slices bfloat16 by converting the whole
      operand to float32 first: all experts of a layer for one. It slices integers as they are.
    """
    if platform() != "cpu":
        return model
    held = {path: _suited_leaf(path, leaf) for path, leaf in flat(model.params).items()}
    for path in list(held):
        group = [path, *((*path[:-1], *other) for other in SIDE_BY_SIDE.get(str(path[-1]), ()))]
        weights = [w for member in group if isinstance(w := held.get(member), TransposedWeight) and not w.output_sizes]
        if len(weights) == len(group) > 1:
            arrays = [np.asarray(w.array) for w in weights]
            joined = jax.device_put(np.concatenate(arrays, axis=-1))  # not jnp: that would be a program to compile
            held |= {
                path: TransposedWeight(joined, tuple(a.shape[-1] for a in arrays)),
                **dict.fromkeys(group[1:], FusedPlaceholder()),
            }
    whole: Any = nnx.merge(model.graph, fill(model.params, lambda path, leaf: held[path]))
    embedding = whole.embedding[...]
    if model.cfg.tied_embeddings and _small(embedding, 2, SMALL_HEAD):
        whole.lm_head = nnx.data(Dense(TransposedWeight(_transposed(embedding, 1, 0))))
    graph, params = nnx.split(whole)
    return replace(model, graph=graph, params=params)


def _suited_leaf(path: ParamPath, leaf: Any) -> Any:
    held = leaf[...]
    if isinstance(leaf, Expert) and _small(held, 3, SMALL_WEIGHT):
        if path[-1] == "gate_up":
            return FusedExperts(_transposed(held, 0, 3, 1, 2))
        return TransposedWeight(_transposed(held, 0, 1, 3, 2))
    if isinstance(leaf, Expert) and getattr(held, "dtype", None) == jnp.bfloat16:
        return BitcastBfloat16(jax.device_put(np.asarray(held).view(np.uint16)))
    limit = SMALL_HEAD if path == ("lm_head",) else SMALL_WEIGHT
    if isinstance(leaf, Dense) and path != ("embedding",) and _small(held, 2, limit):
        return TransposedWeight(_transposed(held, *range(held.ndim - 2), -1, -2))
    return held


def _small(held: Any, axes: int, limit: int) -> bool:
    """Whether the last `axes` of a weight are of at most `limit` numbers, not packed."""
    return (
        isinstance(held, jax.Array)
        and held.dtype in (jnp.float32, jnp.bfloat16)
        and math.prod(held.shape[-axes:]) <= limit
    )


def _transposed(held: jax.Array, *axes: int) -> jax.Array:
    return jax.device_put(np.ascontiguousarray(np.asarray(held).transpose(axes)))
