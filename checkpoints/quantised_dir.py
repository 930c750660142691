"""A folder of safetensors files whose matrices are quantised: each is one tensor to the reader, plain or packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import DTYPES, not_finite
from checkpoints.errors import CheckpointError
from checkpoints.packed import FP8_BLOCK, PackedArray
from checkpoints.quantised_formats import GROUPS, Format, Unsupported, format_of
from checkpoints.reading import read_tensor_into
from checkpoints.safetensors_dir import SafetensorsDirectory
from checkpoints.source import TensorInfo

_WEIGHT = "weight"


def quantisation(config: Mapping[str, Any]) -> Any:
    """`quantization_config` of a checkpoint, which may stand in its `text_config`; None where it is not quantised."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if found:
            return found
    return None


class QuantisedDirectory(SafetensorsDirectory):
    """A `TensorSource` over a quantised checkpoint as Hugging Face publishes it (formats: `quantised_formats.py`).

    `tensors` holds the weights as the model knows them, in float32; `read` dequantises, `read_packed` does not. What the
    checkpoint leaves unquantised is read as it is. Raises CheckpointError for settings that are not supported, and for a
    quantised matrix whose scales are missing or do not fit it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        settings = quantisation(self.config)
        try:
            self._format: Format = format_of(settings if isinstance(settings, Mapping) else {"quant_method": settings})
        except Unsupported as error:
            method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
            raise CheckpointError(
                f"{self.path}: is quantised (quant_method {method!r}), and {error}; use the BF16 files of the same model"
            ) from None
        self._files = self.tensors
        self._parts: dict[str, dict[str, TensorInfo]] = {}
        table, used = {}, set()
        first = self._format.parts[0]
        for name, info in self._files.items():
            base, _, suffix = name.rpartition(".")
            if suffix == first and info.dtype == DTYPES[self._format.dtype]:
                parts = self._gather(base)
                weight = f"{base}.{_WEIGHT}"
                self._parts[weight] = parts
                used |= {f"{base}.{part}" for part in parts}
                shape = self._format.shape({part: i.shape for part, i in parts.items()})
                size = sum(i.nbytes for i in parts.values())
                raw = info.name.removesuffix(first) + _WEIGHT
                table[weight] = replace(info, name=raw, shape=tuple(shape), dtype=DTYPES["F32"], nbytes=size)
        left = {n: i for n, i in self._files.items() if n not in used and n.rpartition(".")[2] not in self._format.ignored}
        self.tensors = MappingProxyType(left | table)

    def _gather(self, base: str) -> dict[str, TensorInfo]:
        """The tensors of one weight, their shapes checked."""
        needed, stored = self._format.parts, self._files
        first = stored[f"{base}.{needed[0]}"]
        where = f"{first.file}: {first.name!r}"
        if missing := [part for part in needed if f"{base}.{part}" not in stored]:
            raise CheckpointError(f"{where} is quantised, but '{base}.{missing[0]}' is not there. Download all files again.")
        parts = {part: stored[f"{base}.{part}"] for part in (*needed, *self._format.optional) if f"{base}.{part}" in stored}
        if any(len(info.shape) != 2 for part, info in parts.items() if part not in ("g_idx", "weight_scale_2")):
            raise CheckpointError(f"{where} or its scales are no matrices: {_shapes(parts)}.")
        rows, size = self._format.shape({part: info.shape for part, info in parts.items()})
        scale = next(info for part, info in parts.items() if "scale" in part)
        if "weight_scale_inv" in parts:
            wanted = {(-(-rows // FP8_BLOCK), -(-size // FP8_BLOCK))}
        else:
            wanted = {(rows, size // group) for group in GROUPS if size % group == 0 and size % 32 == 0}
            wanted = {(b, a) for a, b in wanted} if "qweight" in parts else wanted
        zeros = parts.get("qzeros")
        if scale.shape not in wanted or (zeros and zeros.shape != (scale.shape[0], scale.shape[1] // 8)):
            raise CheckpointError(
                f"{where}: scales do not fit a weight of {rows} x {size}: {_shapes(parts)}; expected one for each of "
                f"{'128 x 128' if 'weight_scale_inv' in parts else '16, 32, 64 or 128'} elements."
            )
        return parts

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """As `SafetensorsDirectory.read_into`; a quantised tensor is dequantised in float32 and rounded once."""
        packed = self.read_packed(name)
        if packed is None:
            super().read_into(name, out, check_finite)
            return
        info = self.tensors[name]
        if out.shape != info.shape:
            raise CheckpointError(f"{info.file}: {info.name!r} has shape {list(info.shape)}, expected {list(out.shape)}.")
        out[...] = packed.dequantize()
        if check_finite and not_finite(out).any():
            raise CheckpointError(f"{info.file}: {info.name!r} holds NaN or infinity. Download the file again.")

    def read(self, name: str) -> NDArray[Any]:
        """Tensor `name` (canonical) as a new array of the shape and dtype in `tensors`; raises as `read_into`."""
        out = np.empty(self._info(name).shape, self._info(name).dtype)
        self.read_into(name, out)
        return out

    def read_packed(self, name: str) -> PackedArray | None:
        """Tensor `name` (canonical) packed, exactly; None where it is not quantised."""
        parts = self._parts.get(name)
        if parts is None:
            return None
        arrays = {}
        for part, info in parts.items():
            arrays[part] = np.empty(info.shape, info.dtype)
            read_tensor_into(info, arrays[part])
        try:
            return self._format.decode(arrays)
        except Unsupported as error:
            raise CheckpointError(f"{self.tensors[name].file}: '{name}': {error}.") from None


def _shapes(parts: Mapping[str, TensorInfo]) -> str:
    return ", ".join(f"{part} {list(info.shape)}" for part, info in parts.items())
