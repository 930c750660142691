"""Checkpoints on disk: opening, naming, reading, writing. Knows formats and tensor names, nothing of JAX."""

from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.gguf.file import GgufFile
from checkpoints.gguf.writer import write_gguf
from checkpoints.hf_quantized.directory import QuantisedDirectory, quantisation
from checkpoints.open import open_checkpoint
from checkpoints.orbax_dir import OrbaxDirectory
from checkpoints.safetensors.reader import SafetensorsDirectory
from checkpoints.safetensors.writer import write_safetensors_directory
from checkpoints.source import TensorInfo, TensorSource

TINY = Path(__file__).parent / "tiny"  # the embedded model

__all__ = [
    "TINY",
    "CheckpointError",
    "GgufFile",
    "OrbaxDirectory",
    "QuantisedDirectory",
    "SafetensorsDirectory",
    "TensorInfo",
    "TensorSource",
    "open_checkpoint",
    "quantisation",
    "write_gguf",
    "write_safetensors_directory",
]
