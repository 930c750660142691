"""A folder of safetensors files whose matrices are quantised: each is one tensor to the reader, plain or packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import DTYPE_NAMES, DTYPES, not_finite
from checkpoints.errors import CheckpointError
from checkpoints.hf_quantized.decode import Decoded, Unsupported
from checkpoints.hf_quantized.formats import FLOATS, Format, Misfit, formats_of
from checkpoints.packed_array import PackedArray
from checkpoints.reading import read_tensor_into
from checkpoints.safetensors.reader import SafetensorsDirectory
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
            formats = formats_of(settings if isinstance(settings, Mapping) else {"quant_method": settings})
        except Unsupported as error:
            method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
            raise CheckpointError(
                f"{self.path}: is quantised (quant_method {method!r}), and {error}; use the BF16 files of the same model"
            ) from None
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: quantization_config cannot be understood ({type(error).__name__}: {error}). Download it again."
            ) from None
        self._files = self.tensors
        self._parts: dict[str, tuple[Format, dict[str, TensorInfo]]] = {}
        table, used = {}, set()
        for name, info in self._files.items():
            base, _, suffix = name.rpartition(".")
            dtype, marked = DTYPE_NAMES[info.dtype], [form for form in formats if suffix == form.mark]
            meant = [form for form in marked if dtype in form.parts[suffix]]
            if marked and not meant and dtype not in FLOATS:
                expected = " or ".join(form.parts[suffix][0] for form in marked)
                raise CheckpointError(
                    f"{info.file}: {info.name!r} is {dtype}, expected {expected}, as quantization_config says, or floats. Do "
                    "config.json and the weights belong together?"
                )
            if meant:
                form, parts, shape = self._gather(base, meant)
                weight = f"{base}.{_WEIGHT}"
                self._parts[weight] = form, parts
                used |= {f"{base}.{part}" for part in parts}
                size = sum(i.nbytes for i in parts.values())
                raw = info.name.removesuffix(suffix) + _WEIGHT
                table[weight] = replace(info, name=raw, shape=shape, dtype=DTYPES["F32"], nbytes=size)
        ignored = {part for form in formats for part in form.ignored}
        left = {n: i for n, i in self._files.items() if n not in used and n.rpartition(".")[2] not in ignored}
        self.tensors = MappingProxyType(left | table)

    def _gather(self, base: str, formats: Sequence[Format]) -> tuple[Format, dict[str, TensorInfo], tuple[int, int]]:
        """Of the formats that mark a weight alike, the first that fits its tensors; these; and its shape."""
        first = self._files[f"{base}.{formats[0].mark}"]
        where, found, problems = f"{first.file}: {first.name!r}", [], []
        if len(first.shape) != 2:
            raise CheckpointError(
                f"{where} is quantised and has shape {list(first.shape)}, expected a matrix. Several matrices in one tensor "
                "are not supported yet: use a checkpoint with one for each expert."
            )
        for form in formats:
            names = {part: f"{base}.{part}" for part in (*form.parts, *form.optional)}
            parts = {part: self._files[name] for part, name in names.items() if name in self._files}
            if missing := [part for part in form.parts if part not in parts]:
                problems.append(
                    f"{where} is quantised, but '{names[missing[0]]}' is not there. Download all files again."
                )
                continue
            wanted = {**form.parts, **form.optional}
            if odd := [part for part, info in parts.items() if DTYPE_NAMES[info.dtype] not in wanted[part]]:
                info, dtypes = parts[odd[0]], " or ".join(wanted[odd[0]])
                problems.append(f"{where}: {info.name!r} is {DTYPE_NAMES[info.dtype]}, expected {dtypes}.")
                continue
            try:
                found.append((form, parts, form.shape({part: info.shape for part, info in parts.items()})))
            except Misfit as error:
                says, expected = error.args
                problems.append(f"{where}: {says}: {_shapes(parts)}; expected {expected}.")
            except Unsupported as error:
                problems.append(f"{where} {error}.")
        if not found:
            raise CheckpointError(problems[0])
        if len({shape for *_, shape in found}) > 1:
            raise CheckpointError(
                f"{where} fits several of the formats in quantization_config: {_shapes(found[0][1])}."
            )
        return found[0]

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """As `SafetensorsDirectory.read_into`; a quantised tensor is dequantised in float32 and rounded once."""
        decoded = self._decoded(name)
        if decoded is None:
            super().read_into(name, out, check_finite)
            return
        info = self.tensors[name]
        if out.shape != info.shape:
            raise CheckpointError(
                f"{info.file}: {info.name!r} has shape {list(info.shape)}, expected {list(out.shape)}."
            )
        out[...] = decoded.dequantize() if isinstance(decoded, PackedArray) else decoded
        if check_finite and not_finite(out).any():
            raise CheckpointError(f"{info.file}: {info.name!r} holds NaN or infinity. Download the file again.")

    def read(self, name: str) -> NDArray[Any]:
        """Tensor `name` (canonical) as a new array of the shape and dtype in `tensors`; raises as `read_into`."""
        out = np.empty(self._info(name).shape, self._info(name).dtype)
        self.read_into(name, out)
        return out

    def read_packed(self, name: str) -> PackedArray | None:
        """Tensor `name` (canonical) packed, exactly; None where it is not quantised, or no layout holds its values."""
        decoded = self._decoded(name)
        return decoded if isinstance(decoded, PackedArray) else None

    def _decoded(self, name: str) -> Decoded | None:
        if name not in self._parts:
            return None
        form, parts = self._parts[name]
        arrays = {}
        for part, info in parts.items():
            arrays[part] = np.empty(info.shape, info.dtype)
            read_tensor_into(info, arrays[part])
        try:
            return form.decode(arrays)
        except Unsupported as error:
            raise CheckpointError(f"{self.tensors[name].file}: '{name}': {error}.") from None


def _shapes(parts: Mapping[str, TensorInfo]) -> str:
    return ", ".join(f"{part} {list(info.shape)}" for part, info in parts.items())
