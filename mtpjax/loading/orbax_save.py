"""Saving a checkpoint as an Orbax directory, from which it comes back bit for bit.

An Orbax directory holds `params/` (the parameter tree, one leaf a super-block, each in a dtype that holds its tensors
exactly), `config.json`, the tokenizer, and `mtpjax.json` with the published names and dtypes.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from checkpoints import CheckpointError, QuantizedDirectory, TensorSource, quantization_config
from mtpjax.loading.loaded_model import ParamPath, param_shapes
from mtpjax.loading.orbax_io import LazyLeaf, write_tree
from mtpjax.loading.split_projections import FUSED
from mtpjax.loading.weight_map import TensorLocation, check_tensors, checkpoint_config, group_by_leaf, weight_map

ORIGIN = "mtpjax.json"  # canonical name -> [published name, dtype]
STORED_DTYPES = {dtype.name: dtype for dtype in map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32))}


def save_orbax(
    path: Path, source: TensorSource, *, extra_files: Iterable[Path] = (), on_bytes: Callable[[int], None] | None = None
) -> list[str]:
    """Write the checkpoint `source` as an Orbax directory; nothing half-written stays.

    Args:
        path: must not exist, or be an empty folder.
        extra_files: copied under their own names.
        on_bytes: called with the size of each tensor that has been read.

    Returns:
        published names of the tensors in it; the other tensors of `source` are no part of the model.

    Raises:
        CheckpointError: `path` is taken; `source` is quantised or has the fused projections of Qwen3-Next; its tensors
            are not those of the model in config.json (lists all that differs), hold NaN, or have a dtype other than
            BF16, F16 and F32.
        ConfigError: config.json is not that of a supported model.
    """
    target = Path(path).absolute()
    _check_free(target)
    _check_dtypes(source)
    _check_not_fused(source)
    cfg = checkpoint_config(source)
    locations = weight_map(cfg, source.tensors.__contains__)
    check_tensors(source, locations, cfg)
    tensors_of = group_by_leaf(locations)
    leaves = {
        leaf_path: LazyLeaf(partial(_read_leaf, source, shape, tensors_of[leaf_path], on_bytes or (lambda size: None)))
        for leaf_path, shape in param_shapes(cfg).items()
    }
    origin = {name: [source.tensors[name].name, source.tensors[name].dtype.name] for name in locations}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial_folder.mkdir()
    try:
        _write_folder(partial_folder, source, origin, extra_files, leaves)
        _check_free(target)  # again: writing may have taken an hour
        partial_folder.replace(target)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return [name for name, _ in origin.values()]


def _write_folder(
    folder: Path,
    source: TensorSource,
    origin: Mapping[str, list[str]],
    extra_files: Iterable[Path],
    leaves: Mapping[ParamPath, LazyLeaf],
) -> None:
    (folder / ORIGIN).write_text(json.dumps({"tensors": origin}, indent=1), encoding="utf-8")
    own_files = [source.path / name for name in ("config.json", "generation_config.json", "tokenizer.json")]
    for file in [*filter(Path.exists, own_files), *extra_files]:
        shutil.copyfile(file, folder / file.name)
    write_tree(folder / "params", leaves)


def _check_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists and is not an empty folder. Choose another name.")


def _check_not_fused(source: TensorSource) -> None:
    fused = next((info.name for name, info in source.tensors.items() if name.endswith(FUSED)), None)
    if fused is not None:
        raise CheckpointError(
            f"{source.path}: has fused projections as Qwen3-Next ({fused!r}); an Orbax folder would hold them "
            "split and could not give them back. mtpjax.LLM reads the folder as it is, and it can be converted to GGUF"
        )


def _check_dtypes(source: TensorSource) -> None:
    settings = source.settings if isinstance(source, QuantizedDirectory) else quantization_config(source.config)
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        raise CheckpointError(
            f"{source.path}: is quantised (quant_method {method!r}); converting that to Orbax is not supported yet in "
            "this version. mtpjax.LLM reads the folder as it is; to convert, use the BF16 files of the same model"
        )
    unsupported = [
        f"'{info.name}' ({info.dtype.name})" for info in source.tensors.values() if info.dtype.name not in STORED_DTYPES
    ]
    if unsupported:
        raise CheckpointError(
            f"{source.path}: {len(unsupported)} tensors are not {', '.join(STORED_DTYPES)}, which is all that can be "
            f"converted: {', '.join(unsupported[:5])}" + (", ..." if len(unsupported) > 5 else "")
        )


def _read_leaf(
    source: TensorSource,
    shape: tuple[int, ...],
    tensors: list[tuple[str, TensorLocation]],
    on_bytes: Callable[[int], None],
) -> NDArray[Any]:
    """Return one leaf in the dtype of its tensors, in float32 if they have several."""
    dtypes = {source.tensors[name].dtype for name, _ in tensors}
    array: NDArray[Any] = np.empty(shape, dtypes.pop() if len(dtypes) == 1 else np.float32)
    for name, location in tensors:
        source.read_into(name, array[location.index].reshape(location.shape))
        on_bytes(source.tensors[name].nbytes)
    return array
