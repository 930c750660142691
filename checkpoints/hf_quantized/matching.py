"""Which tensors stand for one weight, and which format they fit: matrices, stacks of experts, and convolutions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from checkpoints.dtypes import DTYPE_NAMES
from checkpoints.errors import CheckpointError
from checkpoints.hf_quantized.decode import Arrays, Decoded
from checkpoints.hf_quantized.errors import ScaleShapeError, UnsupportedQuantizationError
from checkpoints.hf_quantized.formats import FLOATS, WeightFormat
from checkpoints.packed_array import FP8_BLOCK, PackedArray, concatenate, to_common_layout
from checkpoints.source import TensorInfo

_WEIGHT = "weight"
_GATE_UP = ".experts.gate_up_proj"
# Tensors of experts that are fused to one stack: `experts.down_proj`, `experts.down_proj_packed`, `..._scale_inv`.
_FUSED = re.compile(
    r"(.*\.experts\.(?:gate_up_proj|down_proj))"
    r"(?:[._](?:weight_)?(packed|scale|scale_inv|scale_2|global_scale|zero_point|shape)|[._](input_\w+)|(\.weight))?",
    re.ASCII,
)
TensorGroup = dict[str, TensorInfo]  # the tensors of a weight by suffix
Shape = tuple[int, ...]


def group_by_weight(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorGroup]:
    """Return the tensors of each weight by suffix, under the name that the weight has unquantised.

    Raises CheckpointError if two tensors have the same part in one weight.
    """
    groups: dict[str, TensorGroup] = {}
    for name, info in tensors.items():
        weight, suffix = _split(name)
        first = groups.setdefault(weight, {}).setdefault(suffix, info)
        if first is not info:
            raise CheckpointError(
                f"{info.file}: {info.name!r} and {first.name!r} are both the {suffix!r} of {weight!r}; expected one."
            )
    return groups


def _split(name: str) -> tuple[str, str]:
    """Return the name of the weight that a tensor belongs to, and its suffix there."""
    if fused := _FUSED.fullmatch(name):
        part, activation = fused[2], fused[3]
        return fused[1], activation or (f"{_WEIGHT}_{part}" if part else _WEIGHT)
    base, dot, suffix = name.rpartition(".")
    return f"{base}{dot}{_WEIGHT}", suffix


class QuantizedWeight(NamedTuple):
    """A weight in a format.

    Attributes:
        tensors: by suffix.
        shape: of the weight as the model has it.
        halves: suffixes of factors of which the gate has one and the up projection another.
    """

    format: WeightFormat
    tensors: TensorGroup
    shape: Shape
    halves: tuple[str, ...] = ()

    def decode(self, arrays: Arrays) -> list[Decoded]:
        """Decode a matrix, each matrix of a stack, or a convolution as a matrix `[C, taps]`."""
        if self.tensors[self.format.key_suffix].shape[1:-1] in ((), (1,)):
            return [self.format.decode({s: _flat(a) for s, a in arrays.items()})]
        num_experts = self.shape[0]
        return [self._decode_expert(arrays, e, num_experts) for e in range(num_experts)]

    def _decode_expert(self, arrays: Arrays, expert: int, num_experts: int) -> Decoded:
        own = {s: _of_expert(a, expert, num_experts) for s, a in arrays.items()}
        if not self.halves:
            return self.format.decode(own)
        parts = [self.format.decode({s: _half(a, s in self.halves, h) for s, a in own.items()}) for h in (0, 1)]
        packed = [part for part in parts if isinstance(part, PackedArray)]
        if len(packed) == 2 and (packed[0].layout != "fp8" or packed[0].codes.shape[0] % FP8_BLOCK == 0):
            return concatenate(packed, axis=0)
        return np.concatenate([dequantize(part) for part in parts])


def dequantize(decoded: Decoded) -> NDArray[np.float32]:
    """Return a decoded weight as float32."""
    return decoded.dequantize() if isinstance(decoded, PackedArray) else decoded


def stack(decoded: Sequence[Decoded]) -> PackedArray | None:
    """Stack the decoded experts of a layer along a new first axis; None if one of them is not packed."""
    packed = [weight for weight in decoded if isinstance(weight, PackedArray)]
    if len(packed) < len(decoded) or len({weight.layout == "fp8" for weight in packed}) > 1:
        return None
    common = to_common_layout(packed)
    arrays: dict[str, Any] = {name: np.stack([w.arrays[name] for w in common]) for name in common[0].arrays}
    return replace(common[0], **arrays)


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    """Drop the middle axis of a convolution `[C, 1, taps]` and of its scales."""
    return array[:, 0] if array.ndim == 3 and array.shape[1] == 1 else array


def _of_expert(array: NDArray[Any], expert: int, num_experts: int) -> NDArray[Any]:
    """Return the part of one expert; a single number belongs to all."""
    return array[expert] if array.ndim and array.shape[0] == num_experts and array.size > 1 else array


def _half(array: NDArray[Any], has_two: bool, half: int) -> NDArray[Any]:
    """Return the part of the gate (0) or the up projection (1) of one expert: of its rows, or of two factors."""
    if has_two:
        return array.reshape(2, -1)[half]
    rows = array.shape[0] // 2 if array.ndim == 2 else 0
    return array[half * rows : (half + 1) * rows] if rows else array


def candidate_formats(weight: str, tensors: TensorGroup, formats: Iterable[WeightFormat]) -> list[WeightFormat]:
    """Return the formats whose key suffix and dtype one of the tensors has; none if it is a plain float tensor.

    Raises CheckpointError if the suffix is that of a format but the dtype is neither the format's nor a float.
    """
    same_suffix = [weight_format for weight_format in formats if weight_format.key_suffix in tensors]
    if not same_suffix:
        return []
    suffix = same_suffix[0].key_suffix
    info, dtype = tensors[suffix], DTYPE_NAMES[tensors[suffix].dtype]
    candidates = [
        weight_format
        for weight_format in same_suffix
        if DTYPE_NAMES[tensors[weight_format.key_suffix].dtype] in weight_format.required[weight_format.key_suffix]
    ]
    if not candidates and dtype not in FLOATS:
        expected = " or ".join(dict.fromkeys(f.required[f.key_suffix][0] for f in same_suffix))
        raise CheckpointError(
            f"{info.file}: {info.name!r} is {dtype}, expected {expected}, as quantization_config says, or floats. Do "
            "config.json and the weights belong together?"
        )
    return candidates


def match_format(weight: str, group: TensorGroup, candidates: Sequence[WeightFormat]) -> QuantizedWeight:
    """Return the weight in the first of the formats that its tensors fit; raises CheckpointError if they fit none."""
    first = group[candidates[0].key_suffix]
    label = f"{first.file}: {first.name!r}"
    is_stack = len(first.shape) == 3 and ".experts." in weight
    is_convolution = len(first.shape) == 3 and first.shape[1] == 1 and not is_stack
    if len(first.shape) != 2 and not is_stack and not is_convolution:
        raise CheckpointError(
            f"{label} is quantised and has shape {list(first.shape)}, expected a matrix, or a stack of matrices "
            "(experts.gate_up_proj, experts.down_proj)."
        )
    matches: list[QuantizedWeight] = []
    problems: list[str] = []
    absent: list[str] = []
    for weight_format in candidates:
        dtypes = {**weight_format.required, **weight_format.optional}
        tensors = {suffix: group[suffix] for suffix in dtypes if suffix in group}
        missing = [suffix for suffix in weight_format.required if suffix not in tensors]
        wrong_dtype = [s for s, info in tensors.items() if DTYPE_NAMES[info.dtype] not in dtypes[s]]
        if missing:
            absent.append(f"{weight.removesuffix(_WEIGHT)}{missing[0]}")
            continue
        if wrong_dtype:
            info, expected = tensors[wrong_dtype[0]], " or ".join(dtypes[wrong_dtype[0]])
            problems.append(f"{label}: {info.name!r} is {DTYPE_NAMES[info.dtype]}, expected {expected}.")
            continue
        try:
            shapes = {suffix: info.shape for suffix, info in tensors.items()}
            if is_stack:
                matches.append(_match_stack(weight, weight_format, tensors, shapes))
            elif is_convolution:
                weight_format.shape(
                    {s: (*shape[:1], *shape[2:]) if len(shape) == 3 else shape for s, shape in shapes.items()}
                )
                matches.append(QuantizedWeight(weight_format, tensors, first.shape))
            else:
                matches.append(QuantizedWeight(weight_format, tensors, weight_format.shape(shapes)))
        except ScaleShapeError as error:
            problems.append(f"{label}: {error.problem}: {list_shapes(tensors)}; expected {error.expected}.")
        except UnsupportedQuantizationError as error:
            problems.append(f"{label} {error}.")
    if not matches and not problems:
        names = ", and so is ".join(f"'{name}'" for name in dict.fromkeys(absent))
        raise CheckpointError(
            f"{label} is quantised, but {names.replace(',', ' is missing,', 1)}"
            f"{'' if ',' in names else ' is missing'}. Download all files again."
        )
    if not matches:
        raise CheckpointError(problems[0])
    if len({match.shape for match in matches}) > 1:
        raise CheckpointError(
            f"{label} fits several of the formats in quantization_config: {list_shapes(matches[0].tensors)}."
        )
    return matches[0]


def _match_stack(
    weight: str, weight_format: WeightFormat, tensors: TensorGroup, shapes: Mapping[str, Shape]
) -> QuantizedWeight:
    """Match a stack of experts: every tensor has the experts on its first axis, or is one number for all of them."""
    num_experts = shapes[weight_format.key_suffix][0]
    of_expert: dict[str, Shape] = {}
    halves: list[str] = []
    for suffix, shape in shapes.items():
        size = math.prod(shape)
        if size == 1 or shape in ((num_experts,), (num_experts, 1), (num_experts, 1, 1)):
            of_expert[suffix] = ()
        elif (
            weight.endswith(_GATE_UP)
            and size == 2 * num_experts
            and shape[:2] in ((num_experts, 2), (2 * num_experts,))
        ):
            of_expert[suffix] = ()
            halves.append(suffix)
        elif shape[0] == num_experts:
            of_expert[suffix] = shape[1:]
        else:
            raise UnsupportedQuantizationError(
                f"is a stack of {num_experts} experts, but '{suffix}' has shape {list(shape)}; expected the experts on "
                "its first axis"
            )
    rows, columns = weight_format.shape(of_expert)
    return QuantizedWeight(weight_format, tensors, (num_experts, rows, columns), tuple(halves))


def list_shapes(tensors: Mapping[str, TensorInfo]) -> str:
    """Return suffixes and shapes for an error."""
    return ", ".join(f"{suffix} {list(info.shape)}" for suffix, info in tensors.items())
