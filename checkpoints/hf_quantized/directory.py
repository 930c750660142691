"""A folder of safetensors files with quantised matrices. The reader presents each matrix as one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import DTYPE_NAMES, DTYPES, non_finite
from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.hf_quantized.decode import Decoded
from checkpoints.hf_quantized.errors import ScaleShapeError, UnsupportedQuantizationError
from checkpoints.hf_quantized.formats import FLOATS, WeightFormat, formats_from_config
from checkpoints.packed_array import PackedArray
from checkpoints.read_tensor import read_tensor_into
from checkpoints.safetensors.reader import SafetensorsDirectory
from checkpoints.source import TensorInfo

_WEIGHT = "weight"


class _QuantizedWeight(NamedTuple):
    """A weight's format, its tensors by suffix, and its shape."""

    format: WeightFormat
    tensors: dict[str, TensorInfo]
    shape: tuple[int, int]


def quantization_config(config: Mapping[str, Any]) -> Any:
    """Return `quantization_config` of a config.json, which may be inside `text_config`; None if there is none."""
    for section in (config, config.get("text_config")):
        settings = section.get("quantization_config") if isinstance(section, Mapping) else None
        if settings:
            return settings
    return None


class QuantizedDirectory(SafetensorsDirectory):
    """A `TensorSource` over a quantised checkpoint as Hugging Face publishes it.

    `checkpoints/hf_quantized/formats.py` lists the formats. `tensors` holds the weights under the names of the
    model, in float32. `read` dequantises them, `read_packed` does not. Tensors that the checkpoint leaves unquantised
    are read as they are. Raises CheckpointError for unsupported settings, and for a quantised matrix whose scales are
    missing or do not fit it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        formats = _read_formats(self.path, quantization_config(self.config))
        self._raw_tensors = self.tensors
        self._quantized: dict[str, _QuantizedWeight] = {}
        infos: dict[str, TensorInfo] = {}
        used: set[str] = set()
        for name, info in self._raw_tensors.items():
            base, _, suffix = name.rpartition(".")
            if not (candidates := _candidate_formats(info, suffix, formats)):
                continue
            weight_name = f"{base}.{_WEIGHT}"
            weight = self._quantized[weight_name] = self._match_format(base, candidates)
            used |= {f"{base}.{suffix}" for suffix in weight.tensors}
            nbytes = sum(tensor.nbytes for tensor in weight.tensors.values())
            raw_name = info.name.removesuffix(suffix) + _WEIGHT
            infos[weight_name] = replace(info, name=raw_name, shape=weight.shape, dtype=DTYPES["F32"], nbytes=nbytes)
        ignored = {suffix for weight_format in formats for suffix in weight_format.ignored_suffixes}
        unquantized = {
            name: info
            for name, info in self._raw_tensors.items()
            if name not in used and name.rpartition(".")[2] not in ignored
        }
        self.tensors = MappingProxyType(unquantized | infos)

    def _match_format(self, base: str, candidates: Sequence[WeightFormat]) -> _QuantizedWeight:
        """Return the weight in the first of the formats that its tensors fit.

        Args:
            base: the weight's name without its suffix.
            candidates: formats with the same key suffix.
        """
        first = self._raw_tensors[f"{base}.{candidates[0].key_suffix}"]
        label = f"{first.file}: {first.name!r}"
        if len(first.shape) != 2:
            raise CheckpointError(
                f"{label} is quantised and has shape {list(first.shape)}, expected a matrix. Several matrices in one "
                "tensor are not supported yet: use a checkpoint with one for each expert."
            )
        matches: list[_QuantizedWeight] = []
        problems: list[str] = []
        for weight_format in candidates:
            dtypes = {**weight_format.required, **weight_format.optional}
            names = {suffix: f"{base}.{suffix}" for suffix in dtypes}
            tensors = {s: self._raw_tensors[name] for s, name in names.items() if name in self._raw_tensors}
            missing = [names[suffix] for suffix in weight_format.required if suffix not in tensors]
            wrong_dtype = [s for s, info in tensors.items() if DTYPE_NAMES[info.dtype] not in dtypes[s]]
            if missing:
                problems.append(f"{label} is quantised, but '{missing[0]}' is missing. Download all files again.")
                continue
            if wrong_dtype:
                info, expected = tensors[wrong_dtype[0]], " or ".join(dtypes[wrong_dtype[0]])
                problems.append(f"{label}: {info.name!r} is {DTYPE_NAMES[info.dtype]}, expected {expected}.")
                continue
            try:
                shape = weight_format.shape({suffix: info.shape for suffix, info in tensors.items()})
            except ScaleShapeError as error:
                problems.append(f"{label}: {error.problem}: {_list_shapes(tensors)}; expected {error.expected}.")
            except UnsupportedQuantizationError as error:
                problems.append(f"{label} {error}.")
            else:
                matches.append(_QuantizedWeight(weight_format, tensors, shape))
        if not matches:
            raise CheckpointError(problems[0])
        if len({weight.shape for weight in matches}) > 1:
            raise CheckpointError(
                f"{label} fits several of the formats in quantization_config: {_list_shapes(matches[0].tensors)}."
            )
        return matches[0]

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
        out[...] = decoded.dequantize() if isinstance(decoded, PackedArray) else decoded
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
        return decoded if isinstance(decoded, PackedArray) else None

    def _decode(self, name: str) -> Decoded | None:
        """Read and decode a quantised tensor; None for any other one."""
        if name not in self._quantized:
            return None
        weight = self._quantized[name]
        arrays = {}
        for suffix, info in weight.tensors.items():
            arrays[suffix] = np.empty(info.shape, info.dtype)
            read_tensor_into(info, arrays[suffix])
        try:
            return weight.format.decode(arrays)
        except UnsupportedQuantizationError as error:
            raise CheckpointError(f"{self.tensors[name].file}: '{name}': {error}.") from None


def _read_formats(folder: Path, settings: Any) -> tuple[WeightFormat, ...]:
    """Return the formats in `settings`, the quantization_config of `folder`; raises CheckpointError."""
    if not isinstance(settings, Mapping):
        settings = {"quant_method": settings}
    try:
        return formats_from_config(settings)
    except UnsupportedQuantizationError as error:
        method = settings.get("quant_method")
        raise CheckpointError(
            f"{folder}: is quantised (quant_method {method!r}), and {error}; use the BF16 files of the same model"
        ) from None
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: quantization_config cannot be understood ({type(error).__name__}: {error}). {REDOWNLOAD}"
        ) from None


def _candidate_formats(info: TensorInfo, suffix: str, formats: Sequence[WeightFormat]) -> list[WeightFormat]:
    """Return the formats whose key suffix and dtype are those of the tensor; none if it is a plain float tensor.

    Raises CheckpointError if the suffix is that of a format but the dtype is neither the format's nor a float.
    """
    dtype = DTYPE_NAMES[info.dtype]
    same_suffix = [weight_format for weight_format in formats if suffix == weight_format.key_suffix]
    candidates = [weight_format for weight_format in same_suffix if dtype in weight_format.required[suffix]]
    if same_suffix and not candidates and dtype not in FLOATS:
        expected = " or ".join(weight_format.required[suffix][0] for weight_format in same_suffix)
        raise CheckpointError(
            f"{info.file}: {info.name!r} is {dtype}, expected {expected}, as quantization_config says, or floats. Do "
            "config.json and the weights belong together?"
        )
    return candidates


def _list_shapes(tensors: Mapping[str, TensorInfo]) -> str:
    return ", ".join(f"{suffix} {list(info.shape)}" for suffix, info in tensors.items())
