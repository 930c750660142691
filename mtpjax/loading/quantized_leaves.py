"""Packed weights in the parameter tree: which leaves are packed, and how one is put together from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from checkpoints import GgufFile, OrbaxDirectory, QuantizedDirectory, TensorSource, TrunkAndHead
from checkpoints.packed_array import FP8_BLOCK, PackedArray, to_common_layout
from checkpoints.quantize import GROUP, MODES, quantize
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax.loading.loaded_model import ParamPath
from mtpjax.loading.weight_map import LeafIndex

KEEP_PACKED = "packed"  # as the checkpoint has them
QUANTIZATIONS = (KEEP_PACKED, *MODES)
# Small and sensitive matrices (the router, gates, DeltaNet's beta and decay) and the taps of the convolution.
_NEVER_QUANTIZED = {"router", "shared_gate", "in_a", "in_b", "conv"}
_LOOKUP_TABLES = {"embedding", "mtp_embedding"}  # single rows are read, so rows cannot share scales in blocks


def is_packed_source(source: TensorSource | OrbaxDirectory) -> bool:
    """Return whether the weights of a checkpoint can stay packed as they are."""
    return isinstance(source, GgufFile | QuantizedDirectory) or (isinstance(source, TrunkAndHead) and source.is_packed)


def can_quantize(path: ParamPath, shape: Sequence[int], quantization: str) -> bool:
    """Return whether the leaf at `path` is packed under `quantization`: matrices of whole groups are.

    Vectors (norms, decay rates), the router, the gates and the convolution stay as they are. FP8 does not pack the
    embedding, of which single rows are read.
    """
    name = str(path[-1])
    is_matrix = len(shape) >= 2 and min(shape[-2:]) > 1
    if not is_matrix or name in _NEVER_QUANTIZED:
        return False
    return name not in _LOOKUP_TABLES if quantization == "fp8" else shape[-1] % GROUP == 0


def is_block_aligned(index: LeafIndex, weight: PackedArray) -> bool:
    """Return whether `weight` can lie packed at `index` of a leaf: `FP8_BLOCK` rows of FP8 share scales."""
    return weight.layout != "fp8" or all(
        rows.start % FP8_BLOCK == 0 == rows.stop % FP8_BLOCK for rows in index if isinstance(rows, slice)
    )


def can_share_layout(path: ParamPath, weights: Sequence[PackedArray]) -> bool:
    """Return whether these weights can share the leaf at `path`.

    All layouts but FP8 can be widened to a common one. FP8 cannot hold a table of which single rows are read.
    """
    is_fp8 = {weight.layout == "fp8" for weight in weights}
    return len(is_fp8) == 1 and not (True in is_fp8 and path[-1] in _LOOKUP_TABLES)


def read_quantized(source: TensorSource, name: str, quantization: str) -> PackedArray | None:
    """Read one tensor packed: as the checkpoint has it, or quantised here. None if a checkpoint has it unpacked."""
    if quantization == KEEP_PACKED:
        read_packed = getattr(source, "read_packed", None)
        return None if read_packed is None else read_packed(name)
    return quantize(source.read(name), quantization)


def stack_quantized(shape: tuple[int, ...], weights: Sequence[tuple[LeafIndex, PackedArray]]) -> QuantizedTensor:
    """Put a leaf of `shape` together from packed weights and their indices into it. Exact.

    Weights of different layouts are widened to a common one. An index may slice rows, for FP8 by whole blocks only.
    """
    indices = [index for index, _ in weights]
    same_layout = to_common_layout([weight for _, weight in weights])
    first = same_layout[0]

    def stack(field: str) -> jax.Array:
        rows_per_entry = FP8_BLOCK if first.layout == "fp8" and field == "scale" else 1
        pieces = [weight.arrays[field] for weight in same_layout]
        rows = -(-shape[-2] // rows_per_entry)
        out: NDArray[Any] = np.empty((*shape[:-2], rows, pieces[0].shape[-1]), pieces[0].dtype)
        for index, piece in zip(indices, pieces, strict=True):
            target = out[tuple(_in_entries(i, rows_per_entry) for i in index)]
            target[...] = piece.reshape(target.shape)
        return jax.device_put(out)

    arrays: dict[str, Any] = {"offset": None} | {field: stack(field) for field in first.arrays}
    return QuantizedTensor(layout=first.layout, group=first.group, table=first.table, **arrays)


def _in_entries(index: int | slice, rows_per_entry: int) -> int | slice:
    """Convert a slice of rows to one of entries that belong to `rows_per_entry` rows each."""
    if isinstance(index, int):
        return index
    return slice(index.start // rows_per_entry, -(-index.stop // rows_per_entry))
