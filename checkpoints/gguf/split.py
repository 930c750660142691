"""The header of a GGUF model that `gguf-split` may have split into several files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.gguf.header import GgufTensor, read_gguf_header


def read_split_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return metadata and tensors by name of a GGUF file, or of all files of a split model.

    Args:
        path: the file, or the first file of a split model; the others are expected beside it.

    Raises:
        CheckpointError: `path` is not the first file, or another file is missing or belongs to another model; or as
            `read_gguf_header`.
    """
    metadata, first_tensors = read_gguf_header(path)
    count, number = metadata.get("split.count", 0), metadata.get("split.no", 0)
    tensors = {tensor.name: tensor for tensor in first_tensors}
    if not isinstance(count, int) or count < 2:
        return metadata, tensors
    ending = f"-of-{count:05d}.gguf"
    stem = path.name.removesuffix(f"-{number + 1:05d}{ending}")
    if number != 0 or stem == path.name:
        first = f"{stem if stem != path.name else 'NAME'}-00001{ending}"
        raise CheckpointError(
            f"{path}: is part {number + 1} of {count} of a split model. Open '{first}', with all parts beside it."
        )
    for other in range(1, count):
        file = path.with_name(f"{stem}-{other + 1:05d}{ending}")
        label = f"part {other + 1} of {count} of the model that '{path.name}' begins"
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing, expected {label}. Download all parts.")
        other_metadata, other_tensors = read_gguf_header(file)
        is_other_part = (other_metadata.get("split.no"), other_metadata.get("split.count")) == (other, count)
        if not is_other_part or any(tensor.name in tensors for tensor in other_tensors):
            raise CheckpointError(f"{file}: is not {label}. Download all parts from the same place.")
        tensors |= {tensor.name: tensor for tensor in other_tensors}
    expected = metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{path}: its {count} parts have {len(tensors)} tensors, expected {expected}. Download them again."
        )
    return metadata, tensors
