"""Any opened checkpoint -> a model in the form that suits the device; saving and restoring Orbax directories.

An Orbax directory holds `params/` (the parameter tree, one leaf a super-block), `config.json`, the tokenizer, and
`mtpjax.json` with the names and dtypes of the tensors it was made from, so that it can be turned back bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints import CheckpointError, OrbaxDirectory, TensorSource
from mtpjax.config import ModelConfig
from mtpjax.model import abstract_model
from mtpjax.weights import LoadedModel, fill, flat, load_model

ORIGIN = "mtpjax.json"


def storage(dtype: jnp.dtype, cfg: ModelConfig) -> dict[str, Any]:
    """How to hold weights on the default device for a compute dtype: keyword arguments of `load_model`.

    A CPU reads matrices fastest in the compute dtype and unsliced, so they are converted once and layers are unrolled.
    Elsewhere one scan compiles all repeats of the layer pattern.
    """
    cpu = jax.default_backend() == "cpu"
    return {"dtype": dtype, "compute_dtype": dtype, "stack": 1 if cpu else cfg.repeats}


def load_checkpoint(source: TensorSource | OrbaxDirectory, *, dtype: jnp.dtype, mtp: bool = True) -> LoadedModel:
    """Load an opened checkpoint for computing in `dtype`; `mtp=False` leaves an MTP head out."""
    if isinstance(source, OrbaxDirectory):
        return _restack(restore_orbax(source, dtype=dtype, mtp=mtp), dtype)
    cfg = ModelConfig.from_hf(source.config, where=str(source.path / "config.json"))
    return load_model(source, mtp=mtp, **storage(dtype, cfg))


def _nested(leaves: dict[tuple, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = map(str, path)
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def _lookup(tree: dict[str, Any], path: tuple) -> Any:
    for name in map(str, path):
        tree = tree[name]
    return tree


def save_orbax(path: Path, model: LoadedModel, source: TensorSource) -> None:
    """Write `model`, loaded from `source` with stack = 1 and dtype = None, as an Orbax directory; nothing half-written stays.

    Raises:
        CheckpointError: `path` exists already.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another output folder or remove it")
    part = path.with_name(path.name + f".part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(part / "params", _nested({p: leaf[...] for p, leaf in flat(model.params).items()}))
        origin = {name: [info.name, info.dtype.name] for name, info in source.tensors.items()}
        (part / ORIGIN).write_text(json.dumps({"tensors": origin}, indent=1))
        (part / "config.json").write_text(json.dumps(source.config, indent=2))
        if source.generation_config:
            (part / "generation_config.json").write_text(json.dumps(source.generation_config, indent=2))
        if source.tokenizer_file:
            shutil.copy(source.tokenizer_file, part / "tokenizer.json")
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def origin_of(source: OrbaxDirectory) -> dict[str, tuple[str, np.dtype]]:
    """Canonical name -> (published name, dtype) of the tensors that an Orbax directory was made from."""
    file = source.path / ORIGIN
    try:
        tensors = json.loads(file.read_text())["tensors"]
        return {name: (raw, np.dtype(jnp.dtype(dtype))) for name, (raw, dtype) in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not readable ({error}); this folder was not written by mtpjax's convert.py") from None


def restore_orbax(source: OrbaxDirectory, *, dtype: jnp.dtype | None, mtp: bool = True) -> LoadedModel:
    """The model in an Orbax directory, stack = 1; matrices in `dtype`, or everything as stored (None).

    Raises:
        CheckpointError: the stored tree is not that of the model in config.json, or cannot be read.
    """
    import orbax.checkpoint as ocp

    cfg = ModelConfig.from_hf(source.config, where=str(source.path / "config.json"))
    with_head = any(name.startswith("mtp.") for name in origin_of(source))
    cfg = cfg.without_mtp() if not with_head else ModelConfig(**{**cfg.__dict__, "mtp_layers": 1})
    graph, params = nnx.split(abstract_model(cfg, dtype or jnp.float32, compute_dtype=dtype))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(source.params_path)
        for path, leaf in flat(params).items():
            if tuple(_lookup(tree, path).shape) != tuple(leaf.shape):
                raise ValueError(f"{'.'.join(map(str, path))} has shape {_lookup(tree, path).shape}, expected {leaf.shape}")
    except Exception as error:  # orbax and tensorstore raise many types
        raise CheckpointError(f"{source.params_path}: cannot be restored: {type(error).__name__}: {error}") from None

    def take(path: tuple, leaf: Any) -> jax.Array:
        stored = jnp.asarray(_lookup(tree, path))
        return stored if dtype is None else stored.astype(leaf.dtype)

    model = LoadedModel(cfg, graph, fill(params, take))
    if mtp or not cfg.mtp_layers:
        return model
    plain = cfg.without_mtp()
    graph, params = nnx.split(abstract_model(plain, dtype or jnp.float32, compute_dtype=dtype))
    have = flat(model.params)
    return LoadedModel(plain, graph, fill(params, lambda path, _: have[path][...]))


def _restack(model: LoadedModel, dtype: jnp.dtype) -> LoadedModel:
    """A model with stack = 1 in the stack that suits the device, one leaf at a time."""
    form = storage(dtype, model.cfg)
    if form["stack"] == 1:
        return model
    graph, params = nnx.split(abstract_model(model.cfg, form["dtype"], compute_dtype=dtype, stack=form["stack"]))
    have = flat(model.params)

    def join(path: tuple, leaf: Any) -> jax.Array:
        if path[:2] != ("decoder", "blocks"):
            return have.pop(path)[...]
        first = path[2] * form["stack"]
        return jnp.concatenate([have.pop((*path[:2], first + i, *path[3:]))[...] for i in range(form["stack"])])

    return LoadedModel(model.cfg, graph, fill(params, join))
