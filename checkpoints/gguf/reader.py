"""Read the weights of a GGUF file: dequantised, or packed as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import non_finite
from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.folder import read_error
from checkpoints.gguf.block_types import dequantize_rows, repack_rows
from checkpoints.gguf.header import GgufTensor
from checkpoints.gguf.names import Convention, DeltaNetHeads, convert_tensor
from checkpoints.packed_array import PackedArray, concatenate
from checkpoints.source import TensorInfo

_CHUNK_ELEMENTS = 1 << 20  # elements that are dequantised at a time
_COLUMN_ALIGNMENT = 32  # columns of a packed layout can be moved in multiples of this number only
# Conventions whose tensors can stay packed: their elements are only moved.
_PACKABLE = (
    Convention.SAME,
    Convention.GATE_UP,
    Convention.VALUE_ROWS,
    Convention.QKV_ROWS,
    Convention.VALUE_COLUMNS,
)


class StoredWeight(NamedTuple):
    """The tensors of the file that one weight is made of, and their convention."""

    tensors: tuple[GgufTensor, ...]
    convention: Convention


class GgufTensors:
    """Weights in one or several GGUF files, by canonical name, in the conventions of the published checkpoints.

    Values are those of ggml's own dequantiser in float32, in the conventions of `checkpoints/gguf/names.py`.

    Args:
        path: the file, or the first one of a split model.
        stored: what each weight is made of, by canonical name.
        heads: the heads of the DeltaNet layers.
        factors: the second factors of weights (`checkpoints/gguf/aliases.py`), by the name of the GGUF tensor.

    Attributes:
        tensors: shape, dtype and place of each weight by canonical name.
    """

    def __init__(
        self,
        path: Path,
        stored: Mapping[str, StoredWeight],
        heads: DeltaNetHeads,
        factors: Mapping[str, GgufTensor],
    ) -> None:
        self.path, self.stored, self.heads, self.factors = path, stored, heads, factors
        infos = {name: _tensor_info(weight, factors) for name, weight in stored.items()}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(infos)

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """Dequantise tensor `name` (canonical) into `out`: the shape of `tensors[name]`, any float dtype.

        Raises CheckpointError if there is no such tensor, the shape differs, the file ends early, or, with
        `check_finite`, a value is NaN or infinite.
        """
        tensors, convention = self._stored_weight(name)
        if out.shape != self.tensors[name].shape:
            raise CheckpointError(
                f"{self.path}: {name!r} has shape {list(self.tensors[name].shape)}, expected {list(out.shape)}."
            )
        if convention is Convention.GATE_UP:
            gate_rows = tensors[0].shape[1]
            targets = [out[:, :gate_rows], out[:, gate_rows:]]
        else:
            targets = [out]
        for tensor, target in zip(tensors, targets, strict=True):
            if convention in (Convention.SAME, Convention.GATE_UP):
                self._dequantize_into(tensor, target)
            else:
                values = np.empty(tensor.shape, np.float32)
                self._dequantize_into(tensor, values)
                target[...] = convert_tensor(values, convention, self.heads, to_gguf=False)
            if check_finite and non_finite(target).any():
                raise CheckpointError(
                    f"{tensor.file}: {tensor.name!r} has NaN or infinite values, expected none. {REDOWNLOAD}"
                )

    def read(self, name: str) -> NDArray[Any]:
        """Return tensor `name` (canonical) as an array with the shape and dtype in `tensors`; raises as `read_into`."""
        self._stored_weight(name)
        out = np.empty(self.tensors[name].shape, self.tensors[name].dtype)
        self.read_into(name, out)
        return out

    def read_packed(self, name: str) -> PackedArray | None:
        """Return tensor `name` (canonical) packed, with exactly the values of the file; None if it cannot stay packed.

        A tensor cannot stay packed if it is not quantised or if its convention changes values. Value heads are put
        in the published order without requantising: rows move one by one, columns in whole blocks of 32.
        """
        tensors, convention = self._stored_weight(name)
        heads = self.heads
        if any(tensor.type.repack is None for tensor in tensors) or convention not in _PACKABLE:
            return None
        if convention is Convention.VALUE_COLUMNS and heads.value_head_dim % _COLUMN_ALIGNMENT:
            return None
        if convention is Convention.GATE_UP:
            return concatenate([self._repack(tensor) for tensor in tensors], axis=1)
        packed = self._repack(tensors[0])
        if convention is Convention.VALUE_COLUMNS:
            num_columns = heads.num_value_heads * heads.value_head_dim

            def reorder(array: NDArray[Any]) -> NDArray[Any]:
                # One entry of codes or scales stands for several columns.
                entries_per_head = heads.value_head_dim * array.shape[1] // num_columns
                return heads.reorder_value_columns(array, entries_per_head, to_gguf=False)

            return packed.split_super_groups(heads.value_head_dim).map_arrays(reorder)
        return packed.map_arrays(lambda array: convert_tensor(array, convention, heads, to_gguf=False))

    def _stored_weight(self, name: str) -> StoredWeight:
        if name not in self.stored:
            raise CheckpointError(f"{self.path}: has no tensor {name!r} among its {len(self.tensors):,}.")
        return self.stored[name]

    def _repack(self, tensor: GgufTensor) -> PackedArray:
        rows = concatenate([repack_rows(tensor.type, raw) for _, raw in self._read_chunks(tensor)], axis=0)
        if (factor := self._factor_of_rows(tensor)) is not None:
            rows = rows.times(factor)
        return rows.map_arrays(lambda array: array.reshape(*tensor.shape[:-1], -1))

    def _factor_of_rows(self, tensor: GgufTensor) -> NDArray[np.float32] | None:
        """Return the second factor of every row `[R, 1]`, or None if the tensor has none."""
        factor = self.factors.get(tensor.name)
        if factor is None:
            return None
        ((_, raw),) = self._read_chunks(factor)
        values = dequantize_rows(factor.type, raw).astype(np.float32).reshape(-1)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{factor.file}: {factor.name!r} is NaN or infinite, expected a factor. {REDOWNLOAD}")
        num_rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        return values.repeat(num_rows // values.size)[:, None]

    def _dequantize_into(self, tensor: GgufTensor, out: NDArray[Any]) -> None:
        """Write the values of a tensor as stored, chunk by chunk, into `out` of the same shape, which may be a view."""
        flat = out.reshape(-1, *out.shape[-1:]) if out.ndim == 1 or out.flags.c_contiguous else None
        factor = self._factor_of_rows(tensor)
        for start, raw in self._read_chunks(tensor):
            with np.errstate(invalid="ignore", over="ignore"):  # `read_into` reports NaN and infinity
                if factor is None:
                    values = dequantize_rows(tensor.type, raw)
                elif tensor.type.repack is None:
                    values = dequantize_rows(tensor.type, raw).astype(np.float32) * factor[start : start + len(raw)]
                else:
                    values = repack_rows(tensor.type, raw).times(factor[start : start + len(raw)]).dequantize()
            if flat is not None:
                flat[start : start + len(values)] = values
                continue
            rows_per_matrix = tensor.shape[-2]
            for row, value in enumerate(values, start):
                out[row // rows_per_matrix, row % rows_per_matrix] = value

    def _read_chunks(self, tensor: GgufTensor) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield the first row and the bytes `[rows, bytes of a row]` of every chunk of a tensor."""
        num_rows, num_columns = int(np.prod(tensor.shape[:-1], dtype=np.int64)), tensor.shape[-1]
        row_bytes = num_columns // tensor.type.elements_per_block * tensor.type.bytes_per_block
        chunk_rows = max(1, _CHUNK_ELEMENTS // num_columns)
        try:
            with open(tensor.file, "rb", buffering=0) as stream:
                stream.seek(tensor.offset)
                for start in range(0, num_rows, chunk_rows):
                    count = min(chunk_rows, num_rows - start)
                    raw = np.fromfile(stream, np.uint8, count * row_bytes)
                    if raw.size != count * row_bytes:
                        raise CheckpointError(
                            f"{tensor.file}: ends inside {tensor.name!r}; it was longer when opened. {REDOWNLOAD}"
                        )
                    yield start, raw.reshape(count, row_bytes)
        except OSError as error:
            raise read_error(tensor.file, error) from error


def _tensor_info(weight: StoredWeight, factors: Mapping[str, GgufTensor]) -> TensorInfo:
    """Describe a weight with the shape and dtype of the published convention."""
    tensors, convention = weight
    first = tensors[0]
    shape = first.shape
    if convention is Convention.GATE_UP:
        if all(len(tensor.shape) == 3 for tensor in tensors):
            shape = (shape[0], sum(tensor.shape[1] for tensor in tensors), shape[2])
    elif convention is Convention.ROW_VECTOR:
        shape = (1, *shape) if len(shape) == 1 else shape
    elif convention is Convention.CONVOLUTION:
        shape = (shape[0], 1, *shape[1:])
    dtype = first.type.dtype
    if dtype is None or convention is Convention.NORM_GAIN or first.name in factors:
        dtype = np.dtype(np.float32)
    name = " + ".join(tensor.name for tensor in tensors)
    return TensorInfo(name, shape, dtype, first.file, first.offset, sum(tensor.nbytes for tensor in tensors))
