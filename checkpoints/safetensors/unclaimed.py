"""The guard against quantised values that no reader has understood: they must never be taken for the weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from checkpoints.dtypes import DTYPE_NAMES
from checkpoints.errors import CheckpointError
from checkpoints.source import TensorInfo

# Types of which a published text model has no plain tensor: one byte an element, or words that may hold several.
_BYTES_OR_WORDS = ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL", "I16", "U16", "I32", "U32")
_MAX_NAMED = 5


def refuse_unclaimed_bytes(path: Path, tensors: Iterable[TensorInfo], reason: str) -> None:
    """Raise CheckpointError if one of the tensors holds single bytes or packed words; names them.

    Args:
        reason: what to say of them, after "which".
    """
    found = [info for info in tensors if DTYPE_NAMES[info.dtype] in _BYTES_OR_WORDS]
    if found:
        listed = ", ".join(f"{info.name!r} ({DTYPE_NAMES[info.dtype]})" for info in found[:_MAX_NAMED])
        more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        raise CheckpointError(
            f"{path}: {len(found)} tensor(s) hold single bytes or packed words, which {reason}: {listed}{more}; "
            "expected floats. Are config.json and hf_quant_config.json those of these weights? Otherwise use the BF16 "
            "files of the same model."
        )
