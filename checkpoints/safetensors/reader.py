"""A folder of safetensors files with its config.json, as Hugging Face publishes models."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import REDOWNLOAD, CheckpointError
from checkpoints.folder import CONFIG, find_tokenizer, list_names, read_generation_config, read_json_file
from checkpoints.names import by_canonical_name
from checkpoints.read_tensor import read_tensor_into
from checkpoints.safetensors.header import read_header
from checkpoints.source import TensorInfo

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*)-\d{5,6}-of-(\d{5,6})\.safetensors", re.ASCII | re.DOTALL)


class SafetensorsDirectory:
    """A `TensorSource` over all `*.safetensors` of a folder: one file, shards with an index, or loose files.

    Opening reads and checks every header, but no data. Files that the index does not mention
    (`model_extra_tensors.safetensors`) are read too. Raises CheckpointError if a file is missing, damaged or
    contradicts the index.

    Args:
        path: the folder.
        needs_config: False if it may lack config.json, as a folder with nothing but an MTP head may.
    """

    def __init__(self, path: str | Path, needs_config: bool = True) -> None:
        self.path = Path(path)
        config = self.path / CONFIG
        self.config = read_json_file(config) if needs_config or config.exists() else {}
        self.generation_config = read_generation_config(self.path)
        self.tokenizer_file = find_tokenizer(self.path)
        files = weight_files(self.path)
        if not files:
            raise CheckpointError(
                f"{self.path}: has no *.safetensors; found {list_names(self.path)}. Download the weights too."
            )
        index = self.path / INDEX
        weight_map = _read_index(index) if index.exists() else {}
        _check_no_shard_missing(self.path, files, weight_map)
        headers = {file.name: read_header(file) for file in files}
        _check_index(index, weight_map, headers)
        tensors = by_canonical_name(info for infos in headers.values() for info in infos)
        if not tensors:
            raise CheckpointError(
                f"{self.path}: no weights of a text model in {', '.join(headers)}. Is this a Qwen3.5/3.6 checkpoint?"
            )
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def read_into(self, name: str, out: NDArray[Any], check_finite: bool = True) -> None:
        """Read tensor `name` (canonical) into `out`: same shape, C-contiguous, any float dtype for floats.

        Raises CheckpointError, see `checkpoints.read_tensor.read_tensor_into`; also if there is no such tensor.
        """
        read_tensor_into(self._info(name), out, check_finite)

    def read(self, name: str) -> NDArray[Any]:
        """Return tensor `name` (canonical) as a new array of the file's shape and dtype; raises as `read_into`."""
        info = self._info(name)
        out = np.empty(info.shape, info.dtype)
        read_tensor_into(info, out)
        return out

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            similar = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f"The nearest are {', '.join(similar)}." if similar else "Is this a Qwen3.5/3.6 checkpoint?"
            raise CheckpointError(f"{self.path}: has no tensor {name!r} among its {len(self.tensors):,}. {hint}")
        return info


def weight_files(folder: Path) -> list[Path]:
    """Return all `*.safetensors` of `folder`, sorted, without hidden ones (macOS makes `._model.safetensors`)."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def _read_index(index: Path) -> dict[str, str]:
    """Return the `weight_map` of an index: raw tensor name -> file name inside the same folder."""
    weight_map = read_json_file(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no table 'weight_map'. {REDOWNLOAD}")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: places {name!r} in {file!r}, expected a file name. Download it again.")
    return weight_map


def _check_no_shard_missing(folder: Path, files: Iterable[Path], weight_map: Mapping[str, str]) -> None:
    """Check that every shard exists that the index or the numbering of the others (`-00002-of-00003`) implies."""
    present = {file.name for file in files}
    missing = sorted(set(weight_map.values()) - present)
    if missing:
        raise CheckpointError(
            f"{folder / INDEX}: names {missing[0]!r}, which does not exist ({len(missing)} of "
            f"{len(set(weight_map.values()))} shards are missing). Download the missing ones."
        )
    shard_counts = Counter(match.group(1, 2) for match in map(_SHARD.fullmatch, present) if match)
    for (stem, count), num_present in sorted(shard_counts.items()):
        if num_present != int(count):
            raise CheckpointError(
                f"{folder}: has {num_present} files {stem}-*-of-{count}.safetensors, expected {int(count)}. "
                "Download the others too."
            )


def _check_index(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, list[TensorInfo]]) -> None:
    """Check that every tensor of the index is in the shard that the index names."""
    names_in_file = {file: {info.name for info in infos} for file, infos in headers.items()}
    for name, file in weight_map.items():
        if name not in names_in_file[file]:
            raise CheckpointError(
                f"{index.parent / file}: lacks {name!r}, which {index.name} places there. "
                "Do index and shards come from the same download?"
            )
