"""A model's weights as the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtpjax.loading.loaded_model import LoadedModel, flatten_params
from mtpjax.loading.weight_map import LeafIndex, weight_map

ExportedTensor = tuple[str, tuple[int, ...], np.dtype[Any], Callable[[], NDArray[Any]]]  # name, shape, dtype, read


def export_tensors(model: LoadedModel) -> Iterator[ExportedTensor]:
    """Yield the model's tensors as `(name, shape, dtype, read)` in the published layout, for a streaming writer.

    Names are those of text-only checkpoints, experts are fused, and dtypes are those of the parameters.
    """
    leaves = flatten_params(model.params)
    for canonical, location in weight_map(model.cfg).items():
        leaf = leaves[location.path][...]
        name = canonical if canonical.startswith(("lm_head", "mtp.")) else f"model.{canonical}"
        yield name, location.shape, np.dtype(leaf.dtype), partial(_read, leaf, location.index, location.shape)


def _read(leaf: Any, index: LeafIndex, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.asarray(leaf[index]).reshape(shape)
