"""Whether a checkpoint that says `tie_word_embeddings` has an LM head of its own all the same.

transformers does the same: if both matrices are there and differ, it does not tie them.
"""

from __future__ import annotations

import math
import warnings
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import TensorInfo, TensorSource
from checkpoints.errors import CheckpointWarning
from checkpoints.folder import read_error

LM_HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_CHUNK_ELEMENTS = 1 << 20  # elements that are compared at a time


def has_own_lm_head(source: TensorSource) -> bool:
    """Return whether there is an LM head with other values than the embedding's. Reads both a chunk at a time.

    A packed matrix counts as one with other values: quantisation changes them.

    Raises:
        CheckpointError: a file cannot be read.

    Warns:
        CheckpointWarning: there is one, against what config.json says.
    """
    head, embedding = source.tensors.get(LM_HEAD), source.tensors.get(EMBEDDING)
    if head is None or embedding is None or _have_equal_values(head, embedding):
        return False
    warnings.warn(
        f"{source.path}: tie_word_embeddings is true, but {head.name!r} and {embedding.name!r} differ; each is used as "
        'it is, as transformers does. "tie_word_embeddings": false in config.json says so without a warning.',
        CheckpointWarning,
        stacklevel=2,
    )
    return True


def _have_equal_values(one: TensorInfo, other: TensorInfo) -> bool:
    if one.shape != other.shape or _is_packed(one) or _is_packed(other):
        return False
    size = math.prod(one.shape)
    with _open(one) as first, _open(other) as second:
        for start in range(0, size, _CHUNK_ELEMENTS):
            count = min(_CHUNK_ELEMENTS, size - start)
            x, y = _read(first, one, count), _read(second, other, count)
            same_bits = one.dtype == other.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8))
            if not same_bits and not np.array_equal(x.astype(np.float32), y.astype(np.float32)):
                return False
    return True


def _is_packed(info: TensorInfo) -> bool:
    return info.nbytes != math.prod(info.shape) * info.dtype.itemsize


def _open(info: TensorInfo) -> IO[bytes]:
    try:
        stream = open(info.file, "rb")
        stream.seek(info.offset)
    except OSError as error:
        raise read_error(info.file, error) from error
    return stream


def _read(stream: IO[bytes], info: TensorInfo, count: int) -> NDArray[Any]:
    """Read elements; a file that ends early gives fewer, which loading reports."""
    return np.frombuffer(stream.read(count * info.dtype.itemsize), info.dtype)
