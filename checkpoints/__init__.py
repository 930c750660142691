"""Checkpoints on disk: open, name, read and write them. This package knows formats and tensor names, but no JAX."""

from pathlib import Path

from checkpoints.errors import CheckpointError, CheckpointWarning
from checkpoints.gguf.file import GgufFile
from checkpoints.gguf.writer import write_gguf
from checkpoints.hf_quantized.directory import QuantizedDirectory
from checkpoints.hf_quantized.settings import quantization_config
from checkpoints.open import open_checkpoint
from checkpoints.orbax_dir import OrbaxDirectory
from checkpoints.safetensors.reader import SafetensorsDirectory
from checkpoints.safetensors.writer import write_safetensors_directory
from checkpoints.source import TensorInfo, TensorSource
from checkpoints.trunk_and_head import TrunkAndHead, open_mtp_head

TINY = Path(__file__).parent / "tiny"  # the embedded model

__all__ = [
    "TINY",
    "CheckpointError",
    "CheckpointWarning",
    "GgufFile",
    "OrbaxDirectory",
    "QuantizedDirectory",
    "SafetensorsDirectory",
    "TensorInfo",
    "TensorSource",
    "TrunkAndHead",
    "open_checkpoint",
    "open_mtp_head",
    "quantization_config",
    "write_gguf",
    "write_safetensors_directory",
]
