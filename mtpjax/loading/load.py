"""Any opened checkpoint -> a model in the form that suits the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from checkpoints import OrbaxDirectory, TensorSource
from kernels_pallas.platform import platform
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax.loading.loaded_model import LoadedModel, ParamPath, map_params
from mtpjax.loading.orbax_restore import restore_orbax
from mtpjax.loading.own_mtp_tensors import OWN_MTP_TENSORS, with_own_mtp_tensors
from mtpjax.loading.quantized_leaves import (
    KEEP_PACKED,
    QUANTIZATIONS,
    can_quantize,
    can_share_layout,
    is_block_aligned,
    is_packed_source,
    read_quantized,
    stack_quantized,
)
from mtpjax.loading.split_projections import split_projections
from mtpjax.loading.weight_map import TensorLocation, check_tensors, checkpoint_config, group_by_leaf, weight_map
from mtpjax.model import abstract_model


def cache_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype of keys, values and convolution inputs for a compute dtype.

    A CPU keeps them in float32, which holds bfloat16 exactly: XLA's CPU backend would convert a whole bfloat16 cache to
    float32 and back for every row written to it.
    """
    return jnp.dtype(jnp.float32) if platform() == "cpu" else jnp.dtype(dtype)


def load_checkpoint(
    source: TensorSource | OrbaxDirectory,
    *,
    dtype: DTypeLike | None,
    mtp: bool = True,
    quantization: str | None = None,
) -> LoadedModel:
    """Load an opened checkpoint for computing in `dtype`.

    Args:
        dtype: of the matrices and of activations; matrices are converted once. None keeps every tensor as the file
            holds it, for conversion.
        mtp: False leaves an MTP head out.
        quantization: how matrices lie in memory. "int4", "int8", "iq4nl" and "fp8" quantise them as they are read;
            "packed" keeps them as a GGUF file or a quantised folder has them. None is "packed" for these two on a GPU;
            else it is arrays of `dtype`, with which a CPU computes faster.

    Raises:
        ValueError: `quantization` is unknown or does not suit this kind of checkpoint.
        CheckpointError: the tensors are not those of the model that config.json describes, or cannot be read.
        ConfigError: config.json is not that of a supported model.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        known = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"quantization is {quantization!r}; expected None or one of {known}")
    if isinstance(source, OrbaxDirectory):
        if quantization is not None:
            raise ValueError(
                f"{source.path}: quantization={quantization!r} is not supported for an Orbax folder; "
                "convert it back first"
            )
        return restore_orbax(source, mtp=mtp, dtype=dtype or jnp.float32)
    if is_packed_source(source):
        quantization = quantization or (KEEP_PACKED if platform() != "cpu" else None)
    elif quantization == KEEP_PACKED:
        modes = ", ".join(repr(mode) for mode in QUANTIZATIONS if mode != KEEP_PACKED)
        raise ValueError(
            f"{source.path}: quantization={KEEP_PACKED!r} is for GGUF files and quantised folders; "
            f"expected one of {modes}"
        )
    return load_model(source, mtp=mtp, quantization=quantization, dtype=dtype)


def load_model(
    source: TensorSource,
    *,
    dtype: DTypeLike | None = jnp.float32,
    mtp: bool = True,
    quantization: str | None = None,
) -> LoadedModel:
    """Read a checkpoint leaf by leaf: host memory beyond the parameters stays at one leaf.

    Args:
        dtype: of the matrices in memory; None keeps what the file holds, for every tensor (conversion).
        mtp: False leaves an MTP head unread.
        quantization: None for plain arrays, or one of `mtpjax.loading.quantized_leaves.QUANTIZATIONS`: matrices become
            `QuantizedTensor`s.

    Raises:
        CheckpointError: missing, unexpected or mis-shaped tensors (all of them in one error), or NaN or infinity (names
            the tensor).
        ConfigError: config.json is not that of a supported model.
    """
    cfg = checkpoint_config(source) if mtp else checkpoint_config(source).without_mtp()
    source = split_projections(source, cfg)
    locations = weight_map(cfg, source.tensors.__contains__)
    check_tensors(source, locations, cfg, beside=OWN_MTP_TENSORS)
    graph, params = nnx.split(abstract_model(cfg, jnp.dtype(dtype or jnp.float32)))
    tensors_of = group_by_leaf(locations)

    def read(path: ParamPath, leaf: Any) -> jax.Array | QuantizedTensor:
        tensors = tensors_of[path]
        if quantization is not None and can_quantize(path, leaf.shape, quantization):
            quantized = _read_quantized_leaf(source, path, leaf.shape, tensors, quantization)
            if quantized is not None:
                return quantized
        stored = {source.tensors[name].dtype for name, _ in tensors}
        # Matrices get `dtype`, small vectors stay float32 as the abstract leaf has them.
        keeps_stored = dtype is None and leaf.dtype == jnp.float32
        array = _aligned_empty(leaf.shape, np.dtype(jnp.result_type(*stored) if keeps_stored else leaf.dtype))
        for name, location in tensors:
            source.read_into(name, array[location.index].reshape(location.shape))
        return jax.device_put(array)

    loaded = LoadedModel(cfg, graph, map_params(params, read))
    return with_own_mtp_tensors(loaded, source, quantization) if cfg.mtp_layers else loaded


def _read_quantized_leaf(
    source: TensorSource,
    path: ParamPath,
    shape: tuple[int, ...],
    tensors: list[tuple[str, TensorLocation]],
    quantization: str,
) -> QuantizedTensor | None:
    """Return a leaf packed, or None if one of its tensors cannot lie packed in it."""
    weights = [(location.index, read_quantized(source, name, quantization)) for name, location in tensors]
    packed = [(index, w) for index, w in weights if w is not None and is_block_aligned(index, w)]
    if len(packed) < len(weights) or not can_share_layout(path, [w for _, w in packed]):
        return None
    return stack_quantized(shape, packed)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised array on a 64-byte boundary, which a CPU device can take over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
