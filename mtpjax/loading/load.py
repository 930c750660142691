"""Any opened checkpoint -> a model in the form that suits the device; Orbax directories: saving, restoring, exporting.

An Orbax directory holds `params/` (the parameter tree, one leaf a super-block, each in the dtype it came in),
`config.json`, the tokenizer, and `mtpjax.json` with the published names and dtypes, so that it can be turned back bit
for bit.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints import CheckpointError, OrbaxDirectory, TensorSource, quantization_config
from kernels_pallas.platform import platform
from mtpjax.config import ModelConfig
from mtpjax.hf_config import config_from_hf
from mtpjax.loading.orbax_io import LazyLeaf, OrbaxReader, ParamPath, write_tree
from mtpjax.loading.quantized_leaves import KEEP, MODES, PACKED, WEIGHTS
from mtpjax.loading.weight_map import LoadedModel, Location, _check, config_of, fill, flat, load_model, weight_map
from mtpjax.model import abstract_model

ORIGIN = "mtpjax.json"
STORED = {dtype.name: dtype for dtype in map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32))}

Tensor = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]  # name, shape, dtype, read


def load_options(dtype: jnp.dtype) -> dict[str, Any]:
    """How to hold weights for a compute dtype: arguments of `load_model` and `restore_orbax`.

    Matrices are converted to the compute dtype once.
    """
    return {"dtype": dtype, "compute_dtype": dtype}


def cache_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of keys, values and convolution inputs for a compute dtype.

    A CPU keeps them in float32, which holds bfloat16 exactly: XLA's CPU backend would convert a whole bfloat16 cache to
    float32 and back for every row written to it.
    """
    return jnp.dtype(jnp.float32) if platform() == "cpu" else jnp.dtype(dtype)


def load_checkpoint(
    source: TensorSource | OrbaxDirectory, *, dtype: jnp.dtype, mtp: bool = True, weights: str | None = None
) -> LoadedModel:
    """Load an opened checkpoint for computing in `dtype`; `mtp=False` leaves an MTP head out.

    Args:
        weights: how matrices lie in memory: "int4", "int8", "iq4nl", "fp8" quantise them as they are read; "packed" keeps
            them as a GGUF file or a quantised folder has them. None: "packed" on a GPU for these, else arrays of `dtype`,
            which a CPU computes with faster.

    Raises:
        CheckpointError: quantised, or not the tensors of the model that its config.json describes.
    """
    form = load_options(dtype)
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; expected None or one of {', '.join(map(repr, WEIGHTS))}")
    if isinstance(source, OrbaxDirectory):
        if weights is not None:
            raise ValueError(
                f"{source.path}: weights={weights!r} is not supported for an Orbax folder; convert it back first"
            )
        return restore_orbax(source, mtp=mtp, **form)
    if isinstance(source, PACKED):
        weights = weights or (KEEP if platform() != "cpu" else None)
    elif weights == KEEP:
        forms = ", ".join(map(repr, MODES))
        raise ValueError(
            f"{source.path}: weights='packed' is for GGUF files and quantised folders; expected one of {forms}"
        )
    return load_model(source, mtp=mtp, weights=weights, **form)


def _config(source: TensorSource | OrbaxDirectory) -> ModelConfig:
    return config_from_hf(source.config, source=str(source.path / "config.json"))


def _refuse_quantised(source: TensorSource) -> None:
    if settings := quantization_config(source.config):
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        raise CheckpointError(
            f"{source.path}: is quantised (quant_method {method!r}); converting that to Orbax is not supported yet in this "
            "version. mtpjax.LLM reads the folder as it is; to convert, use the BF16 files of the same model"
        )


def _shapes(cfg: ModelConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Shapes of the leaves as they are stored."""
    return {path: tuple(leaf.shape) for path, leaf in flat(nnx.split(abstract_model(cfg))[1]).items()}


# Saving


def save_orbax(
    path: Path, source: TensorSource, *, extra_files: Iterable[Path] = (), on_bytes: Callable[[int], None] | None = None
) -> list[str]:
    """Write the checkpoint `source` as an Orbax directory; nothing half-written stays.

    Args:
        path: must not exist, or be an empty folder.
        extra_files: copied under their own names.
        on_bytes: called with the size of each tensor that has been read.

    Returns:
        published names of the tensors in it; others of `source` are no part of the model.

    Raises:
        CheckpointError: `path` is taken; the tensors are not those of the model in config.json (lists all that
            differs), hold NaN, or have a dtype other than BF16, F16 and F32.
    """
    target = Path(path).absolute()
    _check_free(target)
    table, leaves = _leaves(source, on_bytes or (lambda size: None))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    part.mkdir()
    try:
        origin = {name: [source.tensors[name].name, source.tensors[name].dtype.name] for name in table}
        (part / ORIGIN).write_text(json.dumps({"tensors": origin}, indent=1), encoding="utf-8")
        own = [source.path / name for name in ("config.json", "generation_config.json", "tokenizer.json")]
        for file in [*filter(Path.exists, own), *extra_files]:
            shutil.copyfile(file, part / file.name)
        write_tree(part / "params", leaves)
        _check_free(target)  # again: writing may have taken an hour
        part.replace(target)
        return [name for name, _ in origin.values()]
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: already exists and is not an empty folder. Choose another name.")


def _leaves(
    source: TensorSource, on_bytes: Callable[[int], None]
) -> tuple[dict[str, Location], dict[ParamPath, LazyLeaf]]:
    """Where each tensor of `source` goes, and the leaves, each in a dtype that holds its tensors exactly."""
    _refuse_quantised(source)
    odd = [f"'{info.name}' ({info.dtype.name})" for info in source.tensors.values() if info.dtype.name not in STORED]
    if odd:
        raise CheckpointError(
            f"{source.path}: {len(odd)} tensors are not {', '.join(STORED)}, which is all that can be converted: "
            + ", ".join(odd[:5])
            + (", ..." if len(odd) > 5 else "")
        )
    cfg = config_of(source)
    table = weight_map(cfg, source.tensors.__contains__)
    _check(source, table, cfg)
    parts: dict[ParamPath, list[tuple[str, Location]]] = {}
    for name, where in table.items():
        parts.setdefault(where.path, []).append((name, where))

    def leaf(path: ParamPath, shape: tuple[int, ...]) -> LazyLeaf:
        def make() -> np.ndarray:
            dtypes = {source.tensors[name].dtype for name, _ in parts[path]}
            whole = np.empty(shape, dtypes.pop() if len(dtypes) == 1 else np.float32)
            for name, where in parts[path]:
                source.read_into(name, whole[where.index].reshape(where.shape))
                on_bytes(source.tensors[name].nbytes)
            return whole

        return LazyLeaf(make)

    return table, {path: leaf(path, shape) for path, shape in _shapes(cfg).items()}


# Restoring


def _open(source: OrbaxDirectory) -> tuple[OrbaxReader, ModelConfig]:
    """The stored tree and the config of all that is in it.

    Raises:
        CheckpointError: the tree is not that of the model in config.json; one error lists all leaves that differ.
    """
    tree = OrbaxReader(source.params_path)
    cfg = replace(_config(source), mtp_layers=int(any(path[0] == "mtp" for path in tree.shapes)))
    expected = {tuple(map(str, path)): shape for path, shape in _shapes(cfg).items()}
    lines = []
    for path in sorted(expected.keys() | tree.shapes.keys()):
        found, want = tree.shapes.get(path), expected.get(path)
        if found != want:
            says = "is missing" if found is None else f"has shape {list(found)}"
            wants = "is no weight of this model" if want is None else f"expected shape {list(want)}"
            lines.append(f"  '{'.'.join(path)}' {says}, {wants}")
    if lines:
        shown = lines[:40] + ([f"  ... and {len(lines) - 40} more"] if len(lines) > 40 else [])
        raise CheckpointError(
            f"{tree.path}: {len(lines)} weights do not fit the model that config.json describes. Convert it again.\n"
            + "\n".join(shown)
        )
    return tree, cfg


def restore_orbax(
    source: OrbaxDirectory,
    *,
    dtype: jnp.dtype,
    compute_dtype: jnp.dtype | None = None,
    mtp: bool = True,
) -> LoadedModel:
    """The model in an Orbax directory; arguments as those of `load_model`.

    Raises:
        CheckpointError: the stored tree is not that of the model in config.json (lists all that differs) or is damaged.
    """
    tree, cfg = _open(source)
    cfg = cfg if mtp else cfg.without_mtp()
    graph, params = nnx.split(abstract_model(cfg, dtype, compute_dtype=compute_dtype))
    read = tree.reader({path: leaf.dtype for path, leaf in flat(params).items()})
    return LoadedModel(cfg, graph, fill(params, lambda path, leaf: jax.device_put(read(path))))


def orbax_tensors(source: OrbaxDirectory) -> Iterator[Tensor]:
    """The published tensors that an Orbax directory was made from, for a streaming writer.

    Raises:
        CheckpointError: no `mtpjax.json`, or it does not fit the stored tree.
    """
    origin = _origin(source)
    tree, cfg = _open(source)
    table = weight_map(cfg, origin.__contains__)
    odd = sorted(table.keys() ^ origin.keys())
    if odd:
        raise CheckpointError(
            f"{source.path / ORIGIN}: {len(odd)} names do not fit the weights in params/, the first is '{odd[0]}'. "
            "Convert the model again."
        )
    read = tree.reader({where.path: None for where in table.values()})
    for canonical, where in table.items():
        name, dtype = origin[canonical]

        def tensor(where: Location = where, dtype: np.dtype = dtype) -> np.ndarray:
            return read(where.path)[where.index].astype(dtype, copy=False).reshape(where.shape)

        yield name, where.shape, dtype, tensor


def _origin(source: OrbaxDirectory) -> dict[str, tuple[str, np.dtype]]:
    """Canonical name -> (published name, dtype)."""
    file = source.path / ORIGIN
    try:
        tensors = json.loads(file.read_text(encoding="utf-8"))["tensors"]
        return {name: (raw, STORED[dtype]) for name, (raw, dtype) in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}: {error}). Was this folder written by scripts/convert.py?"
        ) from None
