"""A loaded model -> the same model with its weights in the order in which a CPU multiplies them fastest."""

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
from kernels_pallas.weights.transposed import padded_outputs
from mtpjax.loading.loaded_model import LoadedModel, ParamPath, flatten_params, map_params
from mtpjax.model.params import Dense, Expert

# The most elements of a weight that is transposed: of a larger one, a single row would pay for what several rows gain.
MAX_WEIGHT_ELEMENTS, MAX_HEAD_ELEMENTS = 1 << 18, 1 << 20
LOOKUP_TABLES = ("embedding", "mtp_embedding")  # names of matrices of which single rows are read
# Weights of a module that read the same rows: the first one's name -> paths of the others, from the module on.
SHARE_INPUT: dict[str, tuple[ParamPath, ...]] = {
    "in_qkv": (("in_z",), ("in_b",), ("in_a",)),
    "k": (("v",),),
    "gate": (("up",),),
    "router": (("shared_gate",), ("shared", "gate"), ("shared", "up")),
}


def optimize_for_cpu(model: LoadedModel) -> LoadedModel:
    """Return the model with its weights in the layout that a CPU multiplies fastest; on other platforms, as it is.

    * Small matrices are transposed, those that read the same rows fused, the experts of a layer fused, and a small tied
      embedding is held a second time, as an LM head. See `kernels_pallas.weights.transposed`.
    * Other bfloat16 experts become `BitcastBfloat16`, without a copy. XLA's CPU backend slices bfloat16 by converting
      the whole operand to float32 first: all experts of a layer for one. It does not convert integers.
    """
    if platform() != "cpu":
        return model
    weights = {path: _cpu_weight(path, variable) for path, variable in flatten_params(model.params).items()}
    _fuse_weights_that_share_input(weights)
    for path, variable in flatten_params(model.params).items():
        if isinstance(variable, Dense) and isinstance(weight := weights[path], TransposedWeight):
            weights[path] = _pad_outputs(weight)
    merged: Any = nnx.merge(model.graph, map_params(model.params, lambda path, variable: weights[path]))
    embedding = merged.embedding[...]
    if model.cfg.tied_embeddings and _is_small(embedding, 2, MAX_HEAD_ELEMENTS):
        merged.lm_head = nnx.data(Dense(_pad_outputs(TransposedWeight(_transpose(embedding, 1, 0)))))
    graph, params = nnx.split(merged)
    return replace(model, graph=graph, params=params)


def _cpu_weight(path: ParamPath, variable: Any) -> Any:
    """Return one weight in its layout for a CPU."""
    weight = variable[...]
    if isinstance(variable, Expert) and _is_small(weight, 3, MAX_WEIGHT_ELEMENTS):
        if path[-1] == "gate_up":
            return FusedExperts(_transpose(weight, 0, 3, 1, 2))
        return TransposedWeight(_transpose(weight, 0, 1, 3, 2))
    if isinstance(variable, Expert) and getattr(weight, "dtype", None) == jnp.bfloat16:
        return BitcastBfloat16(jax.device_put(np.asarray(weight).view(np.uint16)))
    limit = MAX_HEAD_ELEMENTS if path[0] in ("lm_head", "draft_head") else MAX_WEIGHT_ELEMENTS
    if isinstance(variable, Dense) and path[-1] not in LOOKUP_TABLES and _is_small(weight, 2, limit):
        return TransposedWeight(_transpose(weight, *range(weight.ndim - 2), -1, -2))
    return weight


def _fuse_weights_that_share_input(weights: dict[ParamPath, Any]) -> None:
    """Replace transposed weights that read the same rows by one weight and placeholders."""
    for path in list(weights):
        members = [path, *((*path[:-1], *other) for other in SHARE_INPUT.get(str(path[-1]), ()))]
        transposed = [w for p in members if isinstance(w := weights.get(p), TransposedWeight) and not w.output_sizes]
        if len(transposed) == len(members) > 1:
            weights[path] = _fuse(transposed)
            weights |= dict.fromkeys(members[1:], FusedPlaceholder())


def _fuse(weights: list[TransposedWeight]) -> TransposedWeight:
    """Return one weight with the outputs of all, and zeros behind them up to `padded_outputs`."""
    arrays = [np.asarray(weight.array) for weight in weights]
    sizes = tuple(array.shape[-1] for array in arrays)
    zeros = np.zeros((*arrays[0].shape[:-1], padded_outputs(sum(sizes)) - sum(sizes)), arrays[0].dtype)
    fused = np.concatenate([*arrays, zeros], axis=-1)  # jnp.concatenate would be a program to compile
    return TransposedWeight(jax.device_put(fused), sizes)


def _pad_outputs(weight: TransposedWeight) -> TransposedWeight:
    """Return the weight with zeros behind its outputs, if `padded_outputs` asks for them."""
    outputs = weight.array.shape[-1]
    return weight if outputs == padded_outputs(outputs) else _fuse([weight])


def _is_small(weight: Any, axes: int, limit: int) -> bool:
    """Return whether a weight is a plain array of floats whose last `axes` have at most `limit` elements."""
    return (
        isinstance(weight, jax.Array)
        and weight.dtype in (jnp.float32, jnp.bfloat16)
        and math.prod(weight.shape[-axes:]) <= limit
    )


def _transpose(weight: jax.Array, *axes: int) -> jax.Array:
    return jax.device_put(np.ascontiguousarray(np.asarray(weight).transpose(axes)))
