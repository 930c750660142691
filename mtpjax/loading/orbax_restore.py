"""Reading an Orbax directory (see `orbax_save`): as a model, or as the published tensors that it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from checkpoints import CheckpointError, OrbaxDirectory
from mtpjax.config import ModelConfig
from mtpjax.loading.export import ExportedTensor
from mtpjax.loading.loaded_model import LoadedModel, ParamPath, flatten_params, map_params, param_shapes
from mtpjax.loading.orbax_io import OrbaxReader
from mtpjax.loading.orbax_save import ORIGIN, STORED_DTYPES
from mtpjax.loading.weight_map import TensorLocation, format_list, read_config, weight_map
from mtpjax.model import abstract_model


def restore_orbax(source: OrbaxDirectory, *, dtype: DTypeLike, mtp: bool = True) -> LoadedModel:
    """Read the model in an Orbax directory.

    Args:
        dtype: of the matrices and of activations.
        mtp: False leaves an MTP head unread.

    Raises:
        CheckpointError: the stored tree is not that of the model in config.json (lists all that differs) or is damaged.
        ConfigError: config.json is not that of a supported model.
    """
    tree, cfg = _open_checked(source)
    cfg = cfg if mtp else cfg.without_mtp()
    graph, params = nnx.split(abstract_model(cfg, jnp.dtype(dtype)))
    read = tree.reader({path: leaf.dtype for path, leaf in flatten_params(params).items()})
    return LoadedModel(cfg, graph, map_params(params, lambda path, leaf: jax.device_put(read(path))))


def orbax_tensors(source: OrbaxDirectory) -> Iterator[ExportedTensor]:
    """Yield the published tensors that an Orbax directory was made from, for a streaming writer.

    Raises:
        CheckpointError: no `mtpjax.json`, or it does not fit the stored tree.
        ConfigError: config.json is not that of a supported model.
    """
    origin = _read_origin(source)
    tree, cfg = _open_checked(source)
    locations = weight_map(cfg, origin.__contains__)
    differing = sorted(locations.keys() ^ origin.keys())
    if differing:
        raise CheckpointError(
            f"{source.path / ORIGIN}: {len(differing)} names do not fit the weights in params/, the first is "
            f"'{differing[0]}'. Convert the model again."
        )
    read = tree.reader({location.path: None for location in locations.values()})
    for canonical, location in locations.items():
        name, dtype = origin[canonical]
        yield name, location.shape, dtype, partial(_read_tensor, read, location, dtype)


def _read_tensor(
    read: Callable[[ParamPath], NDArray[Any]], location: TensorLocation, dtype: np.dtype[Any]
) -> NDArray[Any]:
    return read(location.path)[location.index].astype(dtype, copy=False).reshape(location.shape)


def _open_checked(source: OrbaxDirectory) -> tuple[OrbaxReader, ModelConfig]:
    """Open the stored tree; return it with its config, which has the MTP and LM heads of the tree.

    Raises:
        CheckpointError: the tree is not that of the model in config.json; one error lists all leaves that differ.
    """
    tree = OrbaxReader(source.params_path)
    parts, cfg = {path[0] for path in tree.shapes}, read_config(source)
    tied = cfg.tied_embeddings and "lm_head" not in parts  # as `checkpoint_config` decided when it was saved
    cfg = replace(cfg, mtp_layers=int("mtp" in parts), tied_embeddings=tied)
    expected_shapes = {tuple(map(str, path)): shape for path, shape in param_shapes(cfg).items()}
    lines = []
    for path in sorted(expected_shapes.keys() | tree.shapes.keys()):
        stored, expected = tree.shapes.get(path), expected_shapes.get(path)
        if stored != expected:
            found = "is missing" if stored is None else f"has shape {list(stored)}"
            wanted = "is no weight of this model" if expected is None else f"expected shape {list(expected)}"
            lines.append(f"'{'.'.join(path)}' {found}, {wanted}")
    if lines:
        raise CheckpointError(
            f"{tree.path}: {len(lines)} weights do not fit the model that config.json describes. Convert it again.\n"
            + format_list(lines)
        )
    return tree, cfg


def _read_origin(source: OrbaxDirectory) -> dict[str, tuple[str, np.dtype[Any]]]:
    """Return (published name, dtype) by canonical name."""
    file = source.path / ORIGIN
    try:
        tensors = json.loads(file.read_text(encoding="utf-8"))["tensors"]
        return {name: (published, STORED_DTYPES[dtype]) for name, (published, dtype) in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}: {error}). Was this folder written by scripts/convert.py?"
        ) from None
