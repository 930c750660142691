"""Random packed weights in every storage format, and the float64 values that a kernel reads from them."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from checkpoints.packed_array import pack4, pack_high
from kernels_pallas.packed.formats import FORMATS
from kernels_pallas.weights import QuantizedTensor
from kernels_pallas.weights.quantized import FP8_BLOCK, INDEX_BITS


@cache
def random_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> Any:
    """Make a weight in the format `name` of random codes and scales, of about unit size; "plain": float32."""
    rng = np.random.default_rng(seed)
    if name == "plain":
        return jnp.asarray(rng.normal(size=shape), jnp.float32)
    layout, group, table, has_offset, super_group = FORMATS[name]
    *lead, size = shape
    if layout == "fp8":
        codes: Any = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
        blocks = (*lead[:-1], -(-lead[-1] // FP8_BLOCK), -(-size // FP8_BLOCK))
        scale: Any = rng.uniform(0.5, 1.5, blocks).astype(np.float32)
        return QuantizedTensor(jnp.asarray(codes), jnp.asarray(scale), None, layout, FP8_BLOCK)
    values = np.asarray(table) if table else np.arange(-128, 128)
    scale = rng.uniform(0.5, 1.5, (*lead, size // group)).astype(np.float16) / np.float16(np.std(values))
    offset: Any = rng.normal(size=scale.shape).astype(np.float16) if has_offset else None
    others: dict[str, Any] = {}
    if super_group:
        unit = rng.uniform(0.5, 1.5, (*lead, size // super_group)) / np.std(values)
        scale = rng.integers(-32, 64, scale.shape).astype(np.int8)
        others["super_scale"] = (unit / 32).astype(np.float16)
        if has_offset:
            offset = rng.integers(0, 64, scale.shape).astype(np.int8)
            others["super_offset"] = (-unit).astype(np.float16)
    if layout in INDEX_BITS:
        indices = rng.integers(0, len(values), shape)
        codes = pack4(indices)
        if layout != "codes4":
            others["high"] = pack_high(indices, INDEX_BITS[layout] - 4)
    else:
        codes = rng.integers(-128, 128, shape).astype(np.int8)
    return jax.tree.map(jnp.asarray, QuantizedTensor(codes, scale, offset, layout, group, table, **others))


def rounded(x: Any, dtype: str) -> np.ndarray:
    """Return the float64 values of x as `dtype` holds them."""
    return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)).astype(np.float64)


def dense(w: Any, dtype: str) -> np.ndarray:
    """Return the float64 values of a weight, dequantised and rounded to `dtype`."""
    return rounded(w.dequantize(jnp.float32) if isinstance(w, QuantizedTensor) else w, dtype)
