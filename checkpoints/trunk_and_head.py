"""A trunk and an MTP head from two files: a GGUF file or a folder each, in any pairing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from checkpoints.errors import CheckpointError
from checkpoints.folder import CONFIG
from checkpoints.gguf.file import GgufFile, GgufMtpHead, is_gguf
from checkpoints.hf_quantized.directory import QuantizedDirectory
from checkpoints.hf_quantized.settings import quantization_settings
from checkpoints.mlx import refuse_mlx
from checkpoints.packed_array import PackedArray
from checkpoints.safetensors.reader import SafetensorsDirectory, weight_files
from checkpoints.source import TensorInfo, TensorSource

MTP = "mtp."  # how the canonical names of the head begin
_FC, _EMBEDDING = "mtp.fc.weight", "embed_tokens.weight"
_HEAD_NORM, _FINAL_NORM = "mtp.norm.weight", "norm.weight"
MtpHead = GgufMtpHead | SafetensorsDirectory  # sources of which only the head's tensors are read


def open_mtp_head(path: str | os.PathLike[str]) -> MtpHead:
    """Open the MTP head in a GGUF file or a folder, which may hold the rest of the model, too, and no config.json.

    Raises CheckpointError if there is none, or the files cannot be read.
    """
    place = Path(path)
    if not os.path.exists(place):
        raise CheckpointError(f"{place}: does not exist, expected a .gguf file or a folder with an MTP head.")
    if is_gguf(place):
        return GgufMtpHead(place)
    if not os.path.isdir(place) or not weight_files(place):
        raise CheckpointError(f"{place}: is no .gguf file and no folder with *.safetensors, expected an MTP head.")
    has_config = os.path.exists(place / CONFIG)
    is_quantized = quantization_settings(place) is not None
    head = QuantizedDirectory(place, False) if is_quantized else SafetensorsDirectory(place, has_config)
    refuse_mlx(place, head.config, head.tensors)
    if not any(name.startswith(MTP) for name in head.tensors):
        raise CheckpointError(f"{place}: has no tensor 'mtp.*', expected an MTP head. Give the folder that has it.")
    return head


def refuse_lone_head(source: TensorSource) -> None:
    """Raise CheckpointError for a folder that holds only an MTP head, where a whole model is expected."""
    if all(name.startswith(MTP) for name in source.tensors):
        raise CheckpointError(
            f"{source.path}: holds an MTP head and no other layer, expected a whole model. Give it beside the model "
            f"that it belongs to: LLM(model, mtp={str(source.path)!r}), or --model MODEL --mtp {source.path}."
        )


class TrunkAndHead:
    """A `TensorSource` whose tensors `mtp.*` are those of `head`, and all others those of `trunk`.

    Raises CheckpointError if the head was made for a model of another width.
    """

    def __init__(self, trunk: TensorSource, head: MtpHead) -> None:
        self.trunk, self.head = trunk, head
        self.path, self.config = trunk.path, trunk.config
        self.generation_config, self.tokenizer_file = trunk.generation_config, trunk.tokenizer_file
        tensors = {name: info for name, info in trunk.tensors.items() if not name.startswith(MTP)}
        tensors |= {name: info for name, info in head.tensors.items() if name.startswith(MTP)}
        self._norm_of_trunk = isinstance(head, GgufMtpHead) and _HEAD_NORM not in tensors and _FINAL_NORM in tensors
        if self._norm_of_trunk:
            tensors[_HEAD_NORM] = tensors[_FINAL_NORM]  # as llama.cpp does
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        if _FC in tensors and _EMBEDDING in tensors:
            found, width = tensors[_FC].shape, tensors[_EMBEDDING].shape[-1]
            if found != (width, 2 * width):
                raise CheckpointError(
                    f"{head.path}: its MTP head has a matrix {tensors[_FC].name!r} of {list(found)}, expected "
                    f"{[width, 2 * width]} for {trunk.path}. Use the head that was made for this model."
                )

    @property
    def is_packed(self) -> bool:
        """Whether one of the two may hold packed weights."""
        return any(isinstance(part, GgufFile | GgufMtpHead | QuantizedDirectory) for part in (self.trunk, self.head))

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """Read tensor `name` as the reader of its file does."""
        part, name = self._part(name)
        part.read_into(name, out, check_finite)

    def read(self, name: str) -> NDArray[Any]:
        """Return tensor `name` as the reader of its file does."""
        part, name = self._part(name)
        return part.read(name)

    def read_packed(self, name: str) -> PackedArray | None:
        """Return tensor `name` packed, exactly; None if its file has it unpacked, or no layout holds its values."""
        part, name = self._part(name)
        return part.read_packed(name) if isinstance(part, GgufFile | GgufMtpHead | QuantizedDirectory) else None

    def _part(self, name: str) -> tuple[TensorSource | MtpHead, str]:
        """Return the source that has tensor `name`, and its name there."""
        if name == _HEAD_NORM and self._norm_of_trunk:
            return self.trunk, _FINAL_NORM
        return (self.head if name.startswith(MTP) else self.trunk), name
