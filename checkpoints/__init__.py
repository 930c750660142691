"""Checkpoints on disk: opening, naming, reading, writing. Knows formats and tensor names, nothing of JAX."""

from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.gguf_file import GgufFile
from checkpoints.gguf_writer import write_gguf
from checkpoints.opening import open_checkpoint
from checkpoints.orbax_dir import OrbaxDirectory
from checkpoints.quantised_dir import QuantisedDirectory, quantisation
from checkpoints.safetensors_dir import SafetensorsDirectory
from checkpoints.source import TensorInfo, TensorSource
from checkpoints.writer import write_safetensors_directory

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
