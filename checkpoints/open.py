"""`open_checkpoint`: choose the reader for a path."""

from __future__ import annotations

import os
from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.folder import CONFIG, list_names, read_json_file
from checkpoints.gguf.file import GgufFile, is_gguf
from checkpoints.hf_quantized.directory import QuantizedDirectory
from checkpoints.hf_quantized.settings import HF_QUANT_CONFIG, quantization_settings
from checkpoints.mlx import refuse_mlx
from checkpoints.orbax_dir import PARAMS, OrbaxDirectory
from checkpoints.safetensors.reader import SafetensorsDirectory, weight_files
from checkpoints.safetensors.unclaimed import refuse_unclaimed_bytes
from checkpoints.source import TensorSource
from checkpoints.trunk_and_head import refuse_lone_head

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # of peft
_FORMATS = "a folder with config.json and *.safetensors, one saved by mtpjax, or a .gguf file"


def open_checkpoint(path: str | os.PathLike[str]) -> TensorSource | OrbaxDirectory:
    """Open the checkpoint in the folder or GGUF file `path`; reads configs and headers, but no weights.

    Raises CheckpointError if the path does not exist, has an unknown format, or contains a damaged file.
    """
    folder = Path(path)
    if not os.path.exists(folder):  # Path.exists raises for a name that is too long
        raise CheckpointError(f"{folder}: does not exist, expected {_FORMATS}. Download the model first.")
    if is_gguf(folder):
        return GgufFile(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: {_describe_file(folder)}")
    names = list_names(folder)
    _refuse_adapter(folder)
    if not os.path.exists(folder / CONFIG):
        hint = " For GGUF, give the .gguf file itself." if any(folder.glob("*.gguf")) else ""
        raise CheckpointError(f"{folder}: has no {CONFIG}; found {names}. Expected {_FORMATS}.{hint}")
    has_safetensors, has_orbax = bool(weight_files(folder)), os.path.isdir(folder / PARAMS)
    if has_safetensors and has_orbax:
        raise CheckpointError(
            f"{folder}: has *.safetensors and also a folder {PARAMS}/; expected one of the two. "
            "Move the other elsewhere."
        )
    if has_safetensors:
        return _open_safetensors(folder)
    if has_orbax:
        return OrbaxDirectory(folder)
    raise CheckpointError(
        f"{folder}: has {CONFIG} but no weights; found {names}. Expected *.safetensors: download the weights "
        "too, or convert them from another format."
    )


def _refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds a LoRA adapter, alone or beside the model that it would change."""
    found = [name for name in ADAPTER if os.path.exists(folder / name)]
    if found:
        raise CheckpointError(
            f"{folder}: holds an adapter ({', '.join(found)}), which changes a model and is none; adapters are not "
            "loaded. Merge it into its model (peft: merge_and_unload, save_pretrained) and give that folder; if the "
            "folder holds the merged model already, move these files away."
        )


def _open_safetensors(folder: Path) -> SafetensorsDirectory:
    """Open a folder of safetensors files as a whole model."""
    config = read_json_file(folder / CONFIG)
    refuse_mlx(folder, config, {})
    is_quantized = quantization_settings(folder, config) is not None
    source = QuantizedDirectory(folder) if is_quantized else SafetensorsDirectory(folder)
    refuse_mlx(folder, config, source.tensors)
    refuse_lone_head(source)
    if not is_quantized:
        reason = f"need a quantization_config, and neither {CONFIG} nor {HF_QUANT_CONFIG} has one"
        refuse_unclaimed_bytes(folder, source.tensors.values(), reason)
    return source


def _describe_file(file: Path) -> str:
    if file.suffix == ".safetensors":
        return f"is a single file, expected {_FORMATS}. Give the folder that holds it: {file.parent}"
    return f"is a file of unknown format, expected {_FORMATS}."
