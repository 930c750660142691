"""Tensor names: one canonical spelling for the many prefixes that checkpoints of the same model carry.

Canonical names are `embed_tokens.weight`, `layers.L.…`, `norm.weight`, `lm_head.weight` and `mtp.…`.
"""

from __future__ import annotations

from collections.abc import Iterable

from checkpoints.errors import CheckpointError
from checkpoints.source import TensorInfo

# Stripped from the left in any order and number: covers `model.language_model.`, `language_model.model.`,
# `language_model.`, `model.`, and the same in front of `lm_head` and `mtp` (../spec/model.md 2.1).
_WRAPPERS = frozenset({"model", "language_model"})

# First component, after the wrappers, of parts that are no text model.
_OTHER_MODALITIES = frozenset(
    {"visual", "vision_model", "vision_tower", "audio_tower", "multi_modal_projector", "mm_projector"}
)

# Buffers that old exports stored; computed from the config instead.
_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


def canonical_name(raw: str) -> str | None:
    """Canonical name of the tensor called `raw` in a file; None for what the text model does not need.

    None means: vision and audio parts, and buffers that are no weights. A name this module has never seen is
    returned without its prefix, so that whoever builds the parameter tree can complain about it.
    """
    name = raw
    while True:
        head, dot, rest = name.partition(".")
        if not (dot and head in _WRAPPERS):
            break
        name = rest
    if dot and head in _OTHER_MODALITIES:
        return None
    if name.endswith(_BUFFERS):
        return None
    return name


def by_canonical_name(infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Table of tensors by canonical name, without the ignored ones.

    Raises CheckpointError naming both tensors and both files when two of them mean the same weight.
    """
    table: dict[str, TensorInfo] = {}
    for info in infos:
        name = canonical_name(info.name)
        if name is None:
            continue
        first = table.setdefault(name, info)
        if first is not info:
            raise CheckpointError(
                f"{info.file}: {info.name!r} and {first.name!r} in {first.file} are both the weight "
                f"{name!r}; expected it once. Remove the file that does not belong to this checkpoint."
            )
    return table
