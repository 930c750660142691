"""Packed weights in the parameter tree: which leaves are packed, and how one is put together from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import GgufFile, QuantizedDirectory, TensorSource
from checkpoints.packed_array import FP8_BLOCK, PackedArray, to_common_layout
from checkpoints.quantize import GROUP, MODES, TABLES, quantize
from kernels_pallas.weights.quantized import QuantizedTensor

PACKED = (GgufFile, QuantizedDirectory)  # files whose weights can be kept as they are
KEEP = "packed"  # as the file has it
WEIGHTS = (KEEP, *MODES)
# Small, and sensitive: never packed. Vectors are not either, though a stack of them looks like a matrix.
_PLAIN = {"router", "shared_gate", "in_a", "in_b", "conv", "a_log", "dt_bias"}
_TABLES = {"embedding"}  # rows are looked up, so no blocks of rows


def can_quantize(path: Sequence[str | int], shape: Sequence[int], weights: str) -> bool:
    """Whether the leaf at `path` is packed under `weights`: matrices of whole groups; FP8 not for looking up rows.

    Norms, taps, decay rates, the router and the gates stay as they are.
    """
    name = str(path[-1])
    matrix = len(shape) >= 2 and min(shape[-2:]) > 1 and not name.endswith("norm")
    if not matrix or name in _PLAIN:
        return False
    return name not in _TABLES if weights == "fp8" else shape[-1] % GROUP == 0


def is_block_aligned(index: tuple[int | slice, ...], packed: PackedArray) -> bool:
    """Whether rows that lie at `index` of a leaf can be packed there: those of fp8 share scales in blocks."""
    return packed.layout != "fp8" or all(
        i.start % FP8_BLOCK == 0 == i.stop % FP8_BLOCK for i in index if isinstance(i, slice)
    )


def can_share_layout(path: Sequence[str | int], weights: Sequence[PackedArray]) -> bool:
    """Whether weights can share the leaf at `path`: all layouts but fp8 can be widened to one; fp8 has no single rows."""
    fp8 = {weight.layout == "fp8" for weight in weights}
    return len(fp8) == 1 and not (True in fp8 and path[-1] in _TABLES)


def read_quantized(source: TensorSource, name: str, weights: str) -> PackedArray | None:
    """One tensor packed: as the file holds it, or quantised here. None where the file holds it unquantised."""
    if weights == KEEP:
        return source.read_packed(name) if isinstance(source, PACKED) else None
    return quantize(source.read(name), weights)


def random_quantized(key: jax.Array, shape: tuple[int, ...], weights: str, scale: float) -> QuantizedTensor:
    """A weight of random codes with deviation `scale`, made on the device; a stack is made matrix by matrix.

    Raises:
        ValueError: "packed" says nothing about a form.
    """
    if weights == KEEP:
        forms = ", ".join(map(repr, MODES))
        raise ValueError(f"weights is {KEEP!r}, which is for GGUF files; random weights take one of {forms}")
    table, (*lead, rows, size) = TABLES.get(weights), shape
    if weights == "fp8":
        blocks = (*lead, -(-rows // FP8_BLOCK), -(-size // FP8_BLOCK))
        codes = _by_matrix(lambda k, s: jax.random.normal(k, s).astype(jnp.float8_e4m3fn), key, shape)
        return QuantizedTensor(codes, jnp.full(blocks, scale, jnp.float32), None, "fp8", FP8_BLOCK)
    spread = float(np.std(table if table else np.arange(-128, 128)))
    scales = jnp.full((*lead, rows, size // GROUP), scale / spread, jnp.float16)
    codes = _by_matrix(lambda k, s: jax.random.bits(k, s, jnp.uint8), key, (*lead, rows, size // 2 if table else size))
    if table:
        return QuantizedTensor(codes, scales, None, "codes4", GROUP, table)
    return QuantizedTensor(jax.lax.bitcast_convert_type(codes, jnp.int8), scales, None, "codes8", GROUP)


def _by_matrix(
    make: Callable[[jax.Array, tuple[int, ...]], jax.Array], key: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """`make(key, shape)` matrix by matrix of a stack: random bits take a multiple of their size while being made."""
    if len(shape) < 3:
        return jax.jit(make, static_argnums=1)(key, shape)
    keys = jax.random.split(key, int(np.prod(shape[:-2])))
    return jax.jit(lambda keys: jax.lax.map(lambda k: make(k, shape[-2:]), keys).reshape(shape))(keys)


def stack_quantized(shape: tuple[int, ...], parts: Sequence[tuple[tuple[Any, ...], PackedArray]]) -> QuantizedTensor:
    """A leaf of `shape` from weights that lie at `index` of it; widened to one form if they differ. Exact.

    `index` may slice rows, for fp8 by whole blocks only.
    """
    same = to_common_layout([part for _, part in parts])
    first = same[0]

    def whole(pieces: list[np.ndarray], block: int = 1) -> jax.Array:
        out = np.empty((*shape[:-2], -(-shape[-2] // block), pieces[0].shape[-1]), pieces[0].dtype)
        for (index, _), piece in zip(parts, pieces, strict=True):
            at = [slice(i.start // block, -(-i.stop // block)) if isinstance(i, slice) else i for i in index]
            target = out[tuple(at)]
            target[...] = piece.reshape(target.shape)
        return jax.device_put(out)

    def block(name: str) -> int:
        return FP8_BLOCK if first.layout == "fp8" and name == "scale" else 1

    arrays: dict[str, Any] = {"offset": None}
    arrays |= {name: whole([part.arrays[name] for part in same], block(name)) for name in first.arrays}
    return QuantizedTensor(layout=first.layout, group=first.group, table=first.table, **arrays)
