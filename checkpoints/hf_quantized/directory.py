"""A folder of safetensors files with quantised matrices. The reader presents each matrix as one tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import DTYPES, non_finite
from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.hf_quantized.decode import Decoded
from checkpoints.hf_quantized.errors import UnsupportedQuantizationError
from checkpoints.hf_quantized.matching import (
    QuantizedWeight,
    candidate_formats,
    dequantize,
    group_by_weight,
    match_format,
    stack,
)
from checkpoints.hf_quantized.settings import quantization_settings, read_formats
from checkpoints.packed_array import PackedArray
from checkpoints.read_tensor import read_tensor_into
from checkpoints.safetensors.reader import SafetensorsDirectory
from checkpoints.safetensors.unclaimed import refuse_unclaimed_bytes
from checkpoints.source import TensorInfo


class QuantizedDirectory(SafetensorsDirectory):
    """A `TensorSource` over a quantised checkpoint as Hugging Face publishes it.

    `checkpoints/hf_quantized/formats.py` lists the formats. `tensors` holds the weights under the names of the
    model, in float32. `read` dequantises them, `read_packed` does not. Tensors that the checkpoint leaves unquantised
    are read as they are. Raises CheckpointError for unsupported settings, for a quantised matrix whose scales are
    missing or do not fit it, and for a tensor of bytes or packed words that no format claims.

    Args:
        path: the folder.
        needs_config: as for `SafetensorsDirectory`.

    Attributes:
        settings: the quantisation settings, without null values.
    """

    def __init__(self, path: str | Path, needs_config: bool = True) -> None:
        super().__init__(path, needs_config)
        self.settings = quantization_settings(self.path, self.config)
        formats = read_formats(self.path, self.settings)
        ignored = {suffix for weight_format in formats for suffix in weight_format.ignored_suffixes}
        self._quantized: dict[str, QuantizedWeight] = {}
        infos: dict[str, TensorInfo] = {}
        names = {id(info): name for name, info in self.tensors.items()}
        for weight_name, group in group_by_weight(self.tensors).items():
            used: dict[str, TensorInfo] = {}
            if candidates := candidate_formats(weight_name, group, formats):
                weight = self._quantized[weight_name] = match_format(weight_name, group, candidates)
                used = weight.tensors
                first = used[weight.format.key_suffix]
                nbytes = sum(tensor.nbytes for tensor in used.values())
                infos[weight_name] = replace(
                    first,
                    name=_raw_name(first.name, weight_name),
                    shape=weight.shape,
                    dtype=DTYPES["F32"],
                    nbytes=nbytes,
                )
            left = {s: info for s, info in group.items() if s not in used and s not in ignored}
            infos |= {names[id(info)]: info for info in left.values()}
        unquantized = [info for name, info in infos.items() if name not in self._quantized]
        refuse_unclaimed_bytes(self.path, unquantized, "no format in quantization_config claims")
        self.tensors = MappingProxyType(infos)

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """Read as `SafetensorsDirectory.read_into`; a quantised tensor is dequantised in float32 and rounded once."""
        decoded = self._decode(name)
        if decoded is None:
            super().read_into(name, out, check_finite)
            return
        info = self.tensors[name]
        if out.shape != info.shape:
            raise CheckpointError(
                f"{info.file}: {info.name!r} has shape {list(info.shape)}, expected {list(out.shape)}."
            )
        parts = list(out) if len(decoded) > 1 else [out]
        for part, weight in zip(parts, decoded, strict=True):
            part[...] = dequantize(weight).reshape(part.shape)
        if check_finite and non_finite(out).any():
            raise CheckpointError(f"{info.file}: {info.name!r} holds NaN or infinity. {REDOWNLOAD}")

    def read(self, name: str) -> NDArray[Any]:
        """Return tensor `name` (canonical) as an array with the shape and dtype in `tensors`; raises as `read_into`."""
        out = np.empty(self._info(name).shape, self._info(name).dtype)
        self.read_into(name, out)
        return out

    def read_packed(self, name: str) -> PackedArray | None:
        """Return tensor `name` (canonical) packed, exactly; None if it is unquantised or no layout holds its values."""
        decoded = self._decode(name)
        if decoded is None:
            return None
        if len(self.tensors[name].shape) == 2:
            return decoded[0] if isinstance(decoded[0], PackedArray) else None
        return stack(decoded) if len(decoded) == self.tensors[name].shape[0] else None

    def _decode(self, name: str) -> list[Decoded] | None:
        """Read and decode a quantised tensor, each matrix of a stack by itself; None for any other one."""
        if name not in self._quantized:
            return None
        weight = self._quantized[name]
        arrays = {}
        for suffix, info in weight.tensors.items():
            arrays[suffix] = np.empty(info.shape, info.dtype)
            read_tensor_into(info, arrays[suffix])
        try:
            return weight.decode(arrays)
        except UnsupportedQuantizationError as error:
            raise CheckpointError(f"{self.tensors[name].file}: '{name}': {error}.") from None


def _raw_name(key_name: str, weight_name: str) -> str:
    """Return the name of a weight with the prefix that its tensors have in the file."""
    last = weight_name.rpartition(".")[2]
    position = key_name.rfind(last) if last != "weight" else key_name.rfind(".") + 1
    return key_name[:position] + last
