"""GGUF files as people have them: read with the `gguf` package, changed, and written with it again."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from checkpoints import GgufFile, open_checkpoint, write_gguf
from checkpoints.gguf.header import TENSOR_TYPES
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.hf_config import config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.loading.weight_map import check_source
from tests.helpers.models import PACKABLE_SIZES, numpy_model, tiny_config

Type = gguf.GGMLQuantizationType
TWO_BY_TWO: dict[str, Any] = PACKABLE_SIZES | {"layer_pattern": (LINEAR, FULL), "num_superblocks": 2}

# The byte offsets of the float16 scales in a block, for all types but 0.
FLOAT16_OFFSETS = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
FLOAT16_OFFSETS |= {"Q6_K": (208,), "IQ1_M": (), "MXFP4": (), "NVFP4": ()}
QUANTIZED_TYPES = {t.name: t for t in TENSOR_TYPES.values() if t.repack is not None}


def random_blocks(name: str, rows: int, blocks: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Return random bytes `[rows, bytes]` whose float16 scales are finite and of the magnitude `scale`."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, QUANTIZED_TYPES[name].bytes_per_block), dtype=np.uint8)
    for offset in FLOAT16_OFFSETS.get(name, (0,)):
        raw[..., offset : offset + 2] = (scale * rng.normal(size=(rows, blocks, 1))).astype("<f2").view(np.uint8)
    if name == "IQ1_M":  # the float16 scale is the high nibbles of the last four words
        raw[..., -1] &= 0xBF
    if name == "NVFP4":  # the bytes that are no number, and zero with a sign
        raw[0, 0, :3] = 0x7F, 0xFF, 0x80
    if name == "MXFP4":  # the scale is a power of two
        raw[..., 0] = rng.integers(0, 160, (rows, blocks))
    return raw.reshape(rows, -1)


def uint64(value: int) -> bytes:
    return struct.pack("<Q", value)


def change_entry(raw: bytes, name: bytes, type_number: int | None = None, offset: int | None = None) -> bytes:
    """Return the file `raw` with another type number or offset of the matrix `name`."""
    start = raw.index(uint64(len(name)) + name) + 8 + len(name) + 4 + 16
    old_type_number, old_offset = struct.unpack_from("<IQ", raw, start)
    new_type_number = old_type_number if type_number is None else type_number
    entry = struct.pack("<IQ", new_type_number, old_offset if offset is None else offset)
    return raw[:start] + entry + raw[start + 12 :]


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


def assert_same(path: Path, original: Path, without: str = "none") -> None:
    """Check that a file has the config and the values of the original, but for tensors that begin with `without`."""
    found, expected = open_checkpoint(path), open_checkpoint(original)
    assert isinstance(found, GgufFile) and isinstance(expected, GgufFile)
    assert found.config["layer_types"] == expected.config["layer_types"]
    names = {name for name in expected.tensors if not name.startswith(without)}
    assert set(found.tensors) == names
    for name in names:
        np.testing.assert_array_equal(found.read(name), expected.read(name), err_msg=name)
    check_source(found)
