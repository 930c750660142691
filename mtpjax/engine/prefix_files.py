"""Entries of a `PrefixCache` on disk: one safetensors file each, named by a SHA-256 of model, settings and tokens.

A file is written under another name first and renamed when it is on the disk. Its tensor `checksum` is the SHA-256 of
the settings and of all other bytes, so a damaged file, or one of another model, is never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import CheckpointError
from checkpoints.safetensors.header import encode_header, read_header
from mtpjax.engine.prefix_tree import beginnings
from mtpjax.engine.prompt_chunks import PastTokens
from mtpjax.model.cache import Cache

if TYPE_CHECKING:
    from mtpjax.engine.prefix_cache import PrefixEntry

SUFFIX, UNFINISHED = ".prefix.safetensors", ".unfinished"


def write(folder: Path, settings: Mapping[str, Any], entry: PrefixEntry) -> bool:
    """Write an entry, all or nothing. Returns whether the file is new."""
    text = _text(settings)
    arrays = {field.name: np.asarray(getattr(entry.sequence, field.name)) for field in fields(entry.sequence)}
    arrays["hidden"] = np.asarray(entry.hidden)
    arrays["past"] = np.array(entry.past, np.int32)
    arrays["is_whole"] = np.array([entry.beginning.is_whole], np.uint8)
    arrays["token_ids"] = np.array(entry.token_ids, np.int32)
    arrays["settings"] = np.frombuffer(text, np.uint8)
    arrays["checksum"] = np.frombuffer(_checksum(arrays), np.uint8)
    file = folder / _name(text, entry.beginning.key)
    if file.exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=UNFINISHED, delete=False) as unfinished:
        try:
            unfinished.write(encode_header([(name, a.shape, a.dtype) for name, a in arrays.items()]))
            for array in arrays.values():
                unfinished.write(_bytes(array))
            unfinished.flush()
            os.fsync(unfinished.fileno())  # the rename must not reach the disk before the data
            os.replace(unfinished.name, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished.name)
            raise
    return True


def read_all(folder: Path, settings: Mapping[str, Any], like: Cache, hidden_dtype: Any) -> Iterator[PrefixEntry]:
    """Yield the entries of a folder that belong to these settings; warn of the other files.

    Args:
        folder: it need not exist.
        settings: of the model and of how it reads prompts.
        like: shapes and dtypes of a cache of one sequence.
        hidden_dtype: dtype of hidden states.
    """
    for file in sorted(folder.glob("*" + SUFFIX)):
        try:
            yield _read(file, settings, like, hidden_dtype)
        except (CheckpointError, OSError, ValueError, KeyError) as error:
            warnings.warn(f"{file}: not a usable prefix ({error}); it is ignored", stacklevel=3)


def _read(file: Path, settings: Mapping[str, Any], like: Cache, hidden_dtype: Any) -> PrefixEntry:
    from mtpjax.engine.prefix_cache import PrefixEntry

    infos, arrays = read_header(file), dict[str, np.ndarray]()
    content = file.read_bytes()
    end = len(content) - sum(info.nbytes for info in infos)
    for info in infos:
        part = content[end : end + info.nbytes]
        arrays[info.name], end = np.frombuffer(part, info.dtype).reshape(info.shape), end + info.nbytes
    if _checksum(arrays) != arrays["checksum"].tobytes():
        raise ValueError("its checksum is wrong")
    text = _text(settings)
    if arrays["settings"].tobytes() != text:
        raise ValueError(f"it was made with {difference(json.loads(arrays['settings'].tobytes()), settings)}")
    past, token_ids = PastTokens(*arrays["past"].tolist()), tuple(arrays["token_ids"].tolist())
    is_whole = bool(arrays["is_whole"][0])
    rows = token_ids if is_whole else (*token_ids, 0)  # a row follows the token after a border
    beginning = next((b for b in beginnings(rows) if (b.length, b.is_whole) == (past.length, is_whole)), None)
    if beginning is None or file.name != _name(text, beginning.key):
        raise ValueError("its name is not that of its tokens")
    for field in fields(like):
        have, want = arrays[field.name], getattr(like, field.name)
        shape = (*want.shape[:3], have.shape[3], *want.shape[4:]) if field.name in _KV else want.shape
        if have.shape != shape or have.dtype != want.dtype:
            raise ValueError(f"{field.name} is {have.dtype}{list(have.shape)}, expected {want.dtype}{list(shape)}")
    sequence = type(like)(**{field.name: jnp.asarray(arrays[field.name]) for field in fields(like)})
    hidden = jax.device_put(arrays["hidden"].astype(hidden_dtype))
    return PrefixEntry(beginning, token_ids, past, sequence, hidden)


_KV = "k", "v", "mtp_k", "mtp_v"


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Say which settings differ, and how."""
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    return ", ".join(f"{name} {theirs.get(name)} where {ours.get(name)} is in use" for name in names)


def _text(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(settings), sort_keys=True).encode()


def _name(text: bytes, key: bytes) -> str:
    return hashlib.sha256(text + key).hexdigest() + SUFFIX


def _bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _checksum(arrays: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        if name != "checksum":
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + _bytes(array))
    return digest.digest()
