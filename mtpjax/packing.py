"""Packed weights in the parameter tree: which leaves are packed, and how one is put together from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from checkpoints import GgufFile, TensorSource
from checkpoints.packed import PackedArray, alike
from checkpoints.quantize import GROUP, MODES, quantize
from kernels_pallas.quantized import QuantizedTensor

KEEP = "packed"  # as the file has it
WEIGHTS = (KEEP, *MODES)
# Small, and sensitive: never packed. Vectors are not either.
_PLAIN = {"router", "shared_gate", "in_a", "in_b", "conv"}
_TABLES = {"embedding"}  # rows are looked up, so no blocks of rows


def packable(path: Sequence[str | int], shape: Sequence[int], weights: str) -> bool:
    """Whether the leaf at `path` is packed under `weights`: matrices of whole groups; FP8 not for looking up rows.

    Norms, taps, decay rates, the router and the gates stay as they are.
    """
    name = str(path[-1])
    matrix = len(shape) >= 2 and min(shape[-2:]) > 1 and not name.endswith("norm")
    if not matrix or name in _PLAIN:
        return False
    return name not in _TABLES if weights == "fp8" else shape[-1] % GROUP == 0


def read_packed(source: TensorSource, name: str, weights: str) -> PackedArray | None:
    """One tensor packed: as the file holds it, or quantised here. None where the file holds it unquantised."""
    if weights == KEEP:
        return source.read_packed(name) if isinstance(source, GgufFile) else None
    return quantize(source.read(name), weights)


def assembled(shape: tuple[int, ...], parts: Sequence[tuple[tuple[Any, ...], PackedArray]]) -> QuantizedTensor:
    """A leaf of `shape` from weights that lie at `index` of it; widened to one form if they differ. Exact.

    `index` may slice rows, for fp8 by whole blocks only.
    """
    same = alike([part for _, part in parts])
    first = same[0]

    def whole(pieces: list[np.ndarray]) -> jax.Array:
        rows, size = pieces[0].shape[-2:]
        fp8_scale = first.layout == "fp8" and pieces[0] is first.scale
        out = np.empty((*shape[:-2], rows if fp8_scale else shape[-2], size), pieces[0].dtype)
        for (index, _), piece in zip(parts, pieces, strict=True):
            target = out[index]
            target[...] = piece.reshape(target.shape)
        return jax.device_put(out)

    offsets = [part.offset for part in same if part.offset is not None]
    return QuantizedTensor(
        codes=whole([part.codes for part in same]),
        scale=whole([part.scale for part in same]),
        offset=whole(offsets) if offsets else None,
        layout=first.layout,
        group=first.group,
        table=first.table,
    )
