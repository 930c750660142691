"""A short name for the weights of a model, the same in every process."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from mtpjax.loading.loaded_model import LoadedModel

SAMPLES = 256  # elements of each array that are hashed


@partial(jax.jit, static_argnames="samples")
def _sample(params: Any, *, samples: int) -> list[Array]:
    """Return some elements of each array, evenly from the first to the last."""
    leaves = jax.tree.leaves(params)
    return [leaf.reshape(-1)[:: max(1, leaf.size // samples)] for leaf in leaves]


def weights_fingerprint(model: LoadedModel) -> dict[str, str]:
    """Return a hash of the config, and one of the shapes and of `SAMPLES` elements of each array of the weights."""
    digest = hashlib.sha256()
    leaves = jax.tree.leaves(model.params)
    for leaf, some in zip(leaves, _sample(model.params, samples=SAMPLES), strict=True):
        digest.update(f"{leaf.shape} {leaf.dtype} ".encode() + np.asarray(some).tobytes())
    return {"config": hashlib.sha256(repr(model.cfg).encode()).hexdigest()[:16], "weights": digest.hexdigest()[:32]}
