"""Tensor names: one canonical spelling for the many prefixes that checkpoints of the same model carry.

Canonical names are `embed_tokens.weight`, `layers.L.…`, `norm.weight`, `lm_head.weight` and `mtp.…`.
"""

from __future__ import annotations

from collections.abc import Iterable

from checkpoints.errors import CheckpointError
from checkpoints.source import TensorInfo

# Stripped from the left in any order and number. This covers `model.language_model.`, `language_model.model.`,
# `language_model.` and `model.`, and the same prefixes of `lm_head` and `mtp`.
_WRAPPERS = frozenset({"model", "language_model"})

# The first component, after the wrappers, of tensors outside the text model.
_OTHER_MODALITIES = frozenset(
    {"visual", "vision_model", "vision_tower", "audio_tower", "multi_modal_projector", "mm_projector"}
)

# Buffers in old exports; the model computes them from its config.
_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


def canonical_name(raw: str) -> str | None:
    """Return the canonical name of the tensor that a file calls `raw`, or None if the text model does not need it.

    The text model needs neither the vision and audio parts nor buffers. An unknown name is returned without its
    prefix: the code that builds the parameter tree reports it as unexpected.
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
    """Return a table of the tensors by canonical name, without the ones that the text model does not need.

    Raises CheckpointError, which names both tensors and both files, if two tensors have the same canonical name.
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
