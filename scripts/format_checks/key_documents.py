"""Checkpoints taken apart into pairs of keys and values, which may be changed in ways that no writer allows.

JSON objects are lists of pairs, so that a key can occur twice. A GGUF file is a list of typed metadata and a list of
tensors; a folder is its JSON files and the tensors of all its shards, which are written as one.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
ALIGNMENT = 32
# Value types of GGUF metadata: format letters of `struct`; 8 is a text, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


class Pairs(list[Any]):
    """A JSON object as a list of [key, value]."""


class TypedPairs(list[Any]):
    """GGUF metadata as a list of [key, (type, value)]."""


@dataclass
class Tensor:
    """A tensor as it lies in a file: `dtype` is a name of safetensors, or a type number of GGUF."""

    name: str
    dtype: Any
    shape: list[int]
    data: bytes


@dataclass
class Document:
    """A checkpoint in parts.

    Attributes:
        objects: JSON files by name, or one table of metadata with the name of the GGUF file.
        tensors: of all shards.
        files: others, copied as they are.
    """

    objects: dict[str, Any]
    tensors: list[Tensor]
    files: dict[str, bytes]

    @property
    def is_gguf(self) -> bool:
        return any(isinstance(value, TypedPairs) for value in self.objects.values())

    def write(self, folder: Path) -> Path:
        """Write the checkpoint into an empty folder. Returns the path to open."""
        if self.is_gguf:
            ((name, metadata),) = self.objects.items()
            (folder / name).write_bytes(_gguf_bytes(metadata, self.tensors))
            return folder / name
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        for name, value in self.objects.items():
            (folder / name).write_text(to_json(value))
        (folder / "model.safetensors").write_bytes(_safetensors_bytes(self.tensors))
        return folder


def to_json(value: Any) -> str:
    """Return JSON of a value that may hold `Pairs`."""
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value)


def read_document(path: Path) -> Document:
    """Take a small checkpoint apart: a folder of safetensors, or a GGUF file of one part."""
    if path.is_file():
        return _read_gguf(path)
    objects, tensors, files = {}, [], {}
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            tensors += _read_safetensors(file.read_bytes())
        elif file.name in ("config.json", "generation_config.json", "tokenizer_config.json", "hf_quant_config.json"):
            objects[file.name] = json.loads(file.read_text(), object_pairs_hook=lambda p: Pairs(map(list, p)))
        elif file.is_file() and file.name != INDEX:
            files[file.name] = file.read_bytes()
    return Document(objects, tensors, files)


def _read_safetensors(raw: bytes) -> list[Tensor]:
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return [
        Tensor(name, entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    ]


def _safetensors_bytes(tensors: list[Tensor]) -> bytes:
    """Return a file of the tensors; names may occur twice in its header."""
    position, entries = 0, Pairs()
    for tensor in tensors:
        end = position + len(tensor.data)
        entry = [["dtype", tensor.dtype], ["shape", tensor.shape], ["data_offsets", [position, end]]]
        entries.append([tensor.name, Pairs(entry)])
        position = end
    header = to_json(entries).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(tensor.data for tensor in tensors)


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.position = raw, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.raw, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.position += length
        return self.raw[self.position - length : self.position].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        item, count = self.number("I"), self.number("Q")
        return item, [self.value(item) for _ in range(count)]


def _read_gguf(path: Path) -> Document:
    from checkpoints.gguf.header import read_gguf_header

    cursor = _Cursor(path.read_bytes())
    cursor.position = 16
    metadata = TypedPairs()
    for _ in range(cursor.number("Q")):
        key, kind = cursor.text(), cursor.number("I")
        metadata.append([key, (kind, cursor.value(kind))])
    tensors = []
    numbers = _tensor_types(cursor, int.from_bytes(cursor.raw[8:16], "little"))
    for tensor in read_gguf_header(path)[1]:
        data = cursor.raw[tensor.offset : tensor.offset + tensor.nbytes]
        tensors.append(Tensor(tensor.name, numbers[tensor.name], list(tensor.shape), data))
    return Document({path.name: metadata}, tensors, {})


def _tensor_types(cursor: _Cursor, count: int) -> dict[str, int]:
    """Return the type numbers in the table of tensors, at which the cursor stands."""
    numbers = {}
    for _ in range(count):
        name = cursor.text()
        for _ in range(cursor.number("I")):
            cursor.number("Q")
        numbers[name] = cursor.number("I")
        cursor.number("Q")
    return numbers


def _text_bytes(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value_bytes(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text_bytes(value)
    if kind != ARRAY:
        return struct.pack("<" + SCALARS[kind], value)
    item, values = value
    return struct.pack("<IQ", item, len(values)) + b"".join(_value_bytes(item, v) for v in values)


def _gguf_bytes(metadata: TypedPairs, tensors: list[Tensor]) -> bytes:
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, (kind, value) in metadata:
        head.append(_text_bytes(key) + struct.pack("<I", kind) + _value_bytes(kind, value))
    offset, body = 0, []
    for tensor in tensors:
        head.append(_text_bytes(tensor.name) + struct.pack("<I", len(tensor.shape)))
        head.append(struct.pack(f"<{len(tensor.shape)}QIQ", *reversed(tensor.shape), tensor.dtype, offset))
        size = math.ceil(len(tensor.data) / ALIGNMENT) * ALIGNMENT
        body.append(tensor.data.ljust(size, b"\0"))
        offset += size
    front = b"".join(head)
    return front.ljust(math.ceil(len(front) / ALIGNMENT) * ALIGNMENT, b"\0") + b"".join(body)
