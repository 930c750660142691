"""GGUF files as people have them: read with the `gguf` package, changed, and written with it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from checkpoints import write_gguf
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from tests.helpers.models import PACKABLE_SIZES, numpy_model, tiny_config

Type = gguf.GGMLQuantizationType
TWO_BY_TWO: dict[str, Any] = PACKABLE_SIZES | {"layer_pattern": (LINEAR, FULL), "num_superblocks": 2}


@dataclass
class GgufContents:
    """What is in a GGUF file.

    Attributes:
        architecture: its `general.architecture`.
        metadata: all other keys. An integer becomes a uint32 or, below zero, an int32; a float becomes a float32.
        tensors: bytes or values, and type, by name.
    """

    architecture: str
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[np.ndarray, Type]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> GgufContents:
        reader = gguf.GGUFReader(path)
        metadata = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
        return cls(metadata.pop("general.architecture"), metadata, tensors)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.metadata.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, (data, tensor_type) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def set(self, **values: Any) -> None:
        """Set metadata of the architecture; None removes a key, and "__" in a name stands for a dot."""
        for name, value in values.items():
            key = f"{self.architecture}.{name.replace('__', '.')}"
            self.metadata.pop(key, None)
            if value is not None:
                self.metadata[key] = value

    def drop(self, prefix: str) -> dict[str, tuple[np.ndarray, Type]]:
        """Remove the tensors whose names begin with `prefix`, and return them."""
        dropped = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in dropped}
        return dropped

    def rename(self, old: str, new: str) -> None:
        """Rename every tensor whose name ends with `old`."""
        self.tensors = {
            name.removesuffix(old) + new if name.endswith(old) else name: tensor
            for name, tensor in self.tensors.items()
        }

    def put(self, name: str, values: np.ndarray, tensor_type: Type = Type.F32) -> None:
        """Add or replace a tensor, encoded by the package's own quantiser."""
        values = values.astype(np.float32)
        self.tensors[name] = (
            values if tensor_type == Type.F32 else gguf.quants.quantize(values, tensor_type),
            tensor_type,
        )

    def values(self, name: str) -> np.ndarray:
        """Return the values of a tensor by the package's own dequantiser."""
        data, tensor_type = self.tensors[name]
        return gguf.quants.dequantize(data, tensor_type)


def random_gguf(path: Path, tensor_type: str = "f32", moe: bool = True, seed: int = 0, **sizes: Any) -> ModelConfig:
    """Write a random model of four layers and an MTP head, and return its config; `sizes` replaces `TWO_BY_TWO`."""
    cfg = tiny_config(moe=moe, **(TWO_BY_TWO | sizes))
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(numpy_model(cfg, seed=seed))]
    write_gguf(path, config_to_hf(cfg), tensors, tensor_type)
    return cfg
