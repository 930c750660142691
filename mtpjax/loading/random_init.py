"""Models with random weights, made on the device."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from checkpoints.packed_array import FP8_BLOCK
from checkpoints.quantize import GROUP, MODES, TABLES
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax.config import ModelConfig
from mtpjax.loading.loaded_model import LoadedModel, ParamPath, flatten_params, map_params
from mtpjax.loading.quantized_leaves import KEEP_PACKED, can_quantize
from mtpjax.model import abstract_model

VECTORS = ("a_log", "dt_bias", "conv")
COMPILE_THREADS = 8  # programs that compile at the same time


def random_model(
    cfg: ModelConfig,
    *,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    scale: float = 0.02,
    quantization: str | None = None,
) -> LoadedModel:
    """Make a model with random weights: matrices normal with standard deviation `scale`, norms neutral.

    Decay rates start as in Mamba-2 (arXiv:2405.21060): `A` uniform in 1...16, time steps log-uniform in 0.001...0.1.

    Args:
        dtype: of the matrices and of activations.
        quantization: "int4", "int8", "iq4nl" or "fp8" makes the matrices that are packed in that form of random codes;
            they never exist unpacked.

    Raises:
        ValueError: `quantization` is "packed", which names no form.
    """
    graph, params = nnx.split(abstract_model(cfg, jnp.dtype(dtype)))
    key = jax.random.key(seed)

    def form(path: ParamPath, leaf: Any) -> tuple[Any, ...]:
        name = str(path[-1]) if path[-1] in VECTORS else "matrix"
        packed = quantization if quantization is not None and can_quantize(path, leaf.shape, quantization) else None
        return name, tuple(leaf.shape), jnp.dtype(leaf.dtype), packed, scale

    def lower(name: str, shape: tuple[int, ...], dtype: jnp.dtype, packed: str | None, scale: float) -> Any:
        if packed is not None:
            make: Any = partial(random_quantized, shape=shape, quantization=packed, scale=scale)
        else:
            make = partial(_random_leaf, name, shape=shape, dtype=dtype, scale=scale)
        return jax.jit(lambda key, number: make(jax.random.fold_in(key, number))).lower(key, np.uint32(0))

    # One program for all leaves of a form, which differ in their keys only. XLA compiles several at once.
    forms = {form(path, leaf) for path, leaf in flatten_params(params).items() if not _is_norm(path)}
    with ThreadPoolExecutor(COMPILE_THREADS) as threads:
        programs = {f: threads.submit(lower(*f).compile) for f in forms}

        def make(path: ParamPath, leaf: Any) -> jax.Array | QuantizedTensor:
            if _is_norm(path):
                # All norms are zero-centred but DeltaNet's own: with zeros its layer would put out nothing.
                return jax.device_put(np.full(leaf.shape, path[-2:] == ("mixer", "norm"), leaf.dtype))
            return programs[form(path, leaf)].result()(key, np.uint32(zlib.crc32(repr(path).encode())))

        return LoadedModel(cfg, graph, map_params(params, make))


def _is_norm(path: ParamPath) -> bool:
    return str(path[-1]).endswith("norm")


def _random_leaf(name: str, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, scale: float) -> jax.Array:
    if name == "a_log":
        return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))
    if name == "dt_bias":
        step = jnp.exp(jax.random.uniform(key, shape, minval=np.log(1e-3), maxval=np.log(1e-1)))
        return jnp.log(jnp.expm1(step))
    if name == "conv":
        return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
    return (jax.random.normal(key, shape) * scale).astype(dtype)


def random_quantized(key: jax.Array, shape: tuple[int, ...], quantization: str, scale: float) -> QuantizedTensor:
    """Make a weight of random codes with standard deviation `scale`; a stack is made matrix by matrix.

    Args:
        shape: `[..., O, F]` (outputs, inputs).

    Raises:
        ValueError: `quantization` is "packed", which names no form.
    """
    if quantization == KEEP_PACKED:
        modes = ", ".join(map(repr, MODES))
        raise ValueError(
            f"quantization is {KEEP_PACKED!r}, which is for GGUF files; random weights take one of {modes}"
        )
    table, (*lead, rows, columns) = TABLES.get(quantization), shape
    if quantization == "fp8":
        scale_shape = (*lead, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        codes = _by_matrix(lambda k, s: jax.random.normal(k, s).astype(jnp.float8_e4m3fn), key, shape)
        return QuantizedTensor(codes, jnp.full(scale_shape, scale, jnp.float32), None, "fp8", FP8_BLOCK)
    deviation_of_codes = float(np.std(table if table else np.arange(-128, 128)))
    scales = jnp.full((*lead, rows, columns // GROUP), scale / deviation_of_codes, jnp.float16)
    code_columns = columns // 2 if table else columns
    codes = _by_matrix(lambda k, s: jax.random.bits(k, s, jnp.uint8), key, (*lead, rows, code_columns))
    if table:
        return QuantizedTensor(codes, scales, None, "codes4", GROUP, table)
    return QuantizedTensor(jax.lax.bitcast_convert_type(codes, jnp.int8), scales, None, "codes8", GROUP)


def _by_matrix(
    make: Callable[[jax.Array, tuple[int, ...]], jax.Array], key: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Return `make(key, shape)`, made matrix by matrix: random bits take a multiple of their size while being made."""
    if len(shape) < 3:
        return make(key, shape)
    keys = jax.random.split(key, int(np.prod(shape[:-2])))
    return jax.lax.map(lambda k: make(k, shape[-2:]), keys).reshape(shape)
