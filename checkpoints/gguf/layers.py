"""Metadata of a GGUF file that its tensors contradict: numbers of layers and MTP blocks, and which layers attend."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError, CheckpointWarning
from checkpoints.gguf.header import GgufTensor

_IN_BLOCK = re.compile(r"blk\.(\d+)\.(nextn\.|attn_norm\.weight$)", re.ASCII)
_DEFAULT_INTERVAL = 4


def mtp_blocks(tensors: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the blocks that hold tensors of an MTP head (`blk.N.nextn.*`)."""
    return sorted({int(m[1]) for name in tensors if (m := _IN_BLOCK.match(name)) and m[2] == "nextn."})


def trunk_blocks(tensors: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the other blocks: those with the norm that every layer begins with."""
    blocks = {int(m[1]) for name in tensors if (m := _IN_BLOCK.match(name)) and m[2] != "nextn."}
    return sorted(blocks - set(mtp_blocks(tensors)))


def refuse_parts_of_models(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
    """Raise CheckpointError for a file that holds only the vision part or only the MTP head of a model."""
    if metadata.get("general.architecture") == "clip":
        raise CheckpointError(
            f"{file}: is the vision part (mmproj) of a model, expected its text part. Text is all that this program "
            "generates: give the model's other .gguf file."
        )
    if mtp_blocks(tensors) and not trunk_blocks(tensors):
        raise CheckpointError(
            f"{file}: holds an MTP head and no other layer, expected a whole model. Give it beside the model that it "
            f"belongs to: LLM(model, mtp={str(file)!r}), or --model MODEL --mtp {file}."
        )


def settle_metadata(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """Return the metadata with the numbers of layers that the tensors show.

    Fine-tuned models are written with `nextn_predict_layers` 1 although their MTP head was not saved. The metadata stay
    as they are if a part of the blocks is missing: then the loader lists the missing tensors.

    Warns:
        CheckpointWarning: the tensors contradict the metadata.
    """
    architecture = metadata.get("general.architecture")
    key_count, key_mtp = f"{architecture}.block_count", f"{architecture}.nextn_predict_layers"
    count, num_mtp = metadata.get(key_count), metadata.get(key_mtp, 0)
    settled = dict(metadata) | _layer_types(architecture, metadata)
    if not isinstance(count, int) or not isinstance(num_mtp, int) or num_mtp > 1:
        return settled
    interval = metadata.get(f"{architecture}.full_attention_interval", _DEFAULT_INTERVAL)
    trunk, mtp = trunk_blocks(tensors), mtp_blocks(tensors)
    num_layers = len(trunk)
    is_consecutive = trunk == list(range(num_layers)) and mtp in ([], [num_layers])
    if not num_layers or not is_consecutive or (num_layers + len(mtp), len(mtp)) == (count, num_mtp):
        return settled
    if not mtp and num_mtp:
        # As many layers as the metadata say with or without the head. If they are no whole number of patterns, the last
        # block is what is left of a head.
        is_known = num_layers == count - 1 or (num_layers == count and isinstance(interval, int) and interval > 0)
        is_trunk = num_layers == count - 1 or (is_known and count % interval == 0)
    else:
        is_trunk = bool(mtp) and num_layers in (count - 1, count)
    if not is_trunk:
        return settled
    found = f"a head in block {mtp[0]}" if mtp else "no tensor of a head (blk.*.nextn.*)"
    warnings.warn(
        f"{file}: {key_count} is {count} with {key_mtp} {num_mtp}, but the file has {num_layers} layers and {found}; "
        "its tensors are trusted",
        CheckpointWarning,
        stacklevel=4,
    )
    return settled | {key_count: num_layers + len(mtp), key_mtp: len(mtp)}


def _layer_types(architecture: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return `attention.recurrent_layers` where only zeros among the numbers of key/value heads tell them (Ollama)."""
    heads = metadata.get(f"{architecture}.attention.head_count_kv")
    key, interval = f"{architecture}.attention.recurrent_layers", f"{architecture}.full_attention_interval"
    if not isinstance(heads, list) or 0 not in heads or key in metadata or interval in metadata:
        return {}
    return {key: [number == 0 for number in heads]}
