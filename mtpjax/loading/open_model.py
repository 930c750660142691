"""Everything of a checkpoint that `LLM` needs: weights, tokenizer, generation config, dtype and end-of-text tokens."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from checkpoints import (
    TINY,
    GgufFile,
    OrbaxDirectory,
    TensorSource,
    TrunkAndHead,
    open_checkpoint,
    open_mtp_head,
)
from kernels_pallas.platform import platform
from mtpjax.config import DEFAULT_STOP_TOKEN_IDS, ModelConfig
from mtpjax.generation_config import recommended_stop_token_ids, warn_of_unused_settings
from mtpjax.hf_config import apply_hf_overrides
from mtpjax.loading.load import load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

DTYPES = ("auto", "float32", "bfloat16")


class OpenedModel(NamedTuple):
    """A model with what its checkpoint says of its use.

    Attributes:
        model: config and weights.
        dtype: float32 or bfloat16, of computing and of the cache.
        tokenizer: None if the checkpoint has none.
        generation_config: `generation_config.json`; empty if the checkpoint has none.
        folder: of the checkpoint, or of its file; None for a model that was already loaded.
    """

    model: LoadedModel
    dtype: jnp.dtype
    tokenizer: Tokenizer | None
    generation_config: Mapping[str, Any]
    folder: Path | None = None

    @property
    def vocab_size(self) -> int:
        """Ids below this exist; the matrices of published checkpoints have more rows."""
        size = self.model.cfg.vocab_size
        return min(size, self.tokenizer.size) if self.tokenizer else size


def open_model(
    model: str | PathLike[str] | LoadedModel | None,
    *,
    dtype: str | DTypeLike,
    quantization: str | None,
    mtp: bool,
    tokenizer: str | PathLike[str] | None,
    head: str | PathLike[str] | None = None,
    hf_overrides: Any = None,
) -> OpenedModel:
    """Load a model; the arguments are those of `mtpjax.LLM`.

    Args:
        model: a path, a loaded model, or None: the embedded tiny model.
        dtype: "auto", "float32", "bfloat16", or one of the two dtypes.
        quantization: how matrices are packed, or None.
        mtp: whether to load the MTP head.
        tokenizer: a `tokenizer.json` in place of the checkpoint's own.
        head: the file or folder of the MTP head, in place of the checkpoint's own.
        hf_overrides: merged over config.json; see `apply_hf_overrides`.

    Raises:
        checkpoints.CheckpointError, mtpjax.config.ConfigError: the checkpoint cannot be read.
        ValueError: unknown `dtype` or `quantization`, an unreadable tokenizer, or a `quantization`, `head` or
            `hf_overrides` of a loaded model.
    """
    resolved = resolve_dtype(dtype, model)
    loaded_tokenizer = load_tokenizer(tokenizer) if tokenizer else None
    if isinstance(model, LoadedModel):
        if quantization is not None:
            raise ValueError(f"quantization is {quantization!r}, but the model is already loaded; give a path, or None")
        if head is not None:
            raise ValueError(f"mtp is {str(head)!r}, but the model is already loaded; give its path, or no mtp")
        if hf_overrides is not None:
            raise ValueError("hf_overrides are for reading a checkpoint, but the model is already loaded; give a path")
        return OpenedModel(model, resolved, loaded_tokenizer, {})
    source = open_checkpoint(TINY if model is None else model)
    if hf_overrides is not None:
        settable: Any = source
        settable.config = apply_hf_overrides(source.config, hf_overrides)
    whole = source if head is None or not mtp else with_mtp_head(source, head)
    loaded = load_checkpoint(whole, dtype=resolved, mtp=mtp, quantization=quantization)
    if not isinstance(source, GgufFile):
        warn_of_unused_settings(source.generation_config, str(source.path / "generation_config.json"))
    folder = source.path.parent if isinstance(source, GgufFile) else source.path
    return OpenedModel(loaded, resolved, loaded_tokenizer or own_tokenizer(source), source.generation_config, folder)


def with_mtp_head(source: TensorSource | OrbaxDirectory, mtp_head: str | PathLike[str]) -> TrunkAndHead:
    """Return the checkpoint with the MTP head of another file or folder in place of its own.

    Raises:
        checkpoints.CheckpointError: there is no head, or it is of a model of another width.
        ValueError: the checkpoint is an Orbax folder.
    """
    if isinstance(source, OrbaxDirectory):
        raise ValueError(f"{source.path}: an MTP head of its own (mtp=) is not supported for an Orbax folder")
    return TrunkAndHead(source, open_mtp_head(mtp_head))


def own_tokenizer(source: TensorSource | OrbaxDirectory) -> Tokenizer | None:
    """Load the tokenizer of an opened checkpoint. Returns None if it has none; raises ValueError if it is damaged."""
    if source.tokenizer_file is not None:
        return load_tokenizer(source.tokenizer_file)
    return tokenizer_from_gguf(source.metadata, str(source.path)) if isinstance(source, GgufFile) else None


def compute_dtype_of(model: LoadedModel) -> jnp.dtype:
    """Return the dtype of a model's hidden states."""
    return nnx.merge(model.graph, model.params).compute_dtype


def eos_token_ids(
    cfg: ModelConfig, generation_config: Mapping[str, Any], vocab_size: int, tokenizer: Tokenizer | None = None
) -> tuple[int, ...]:
    """Return the end-of-text tokens of config.json, generation_config.json and the tokenizer, and the usual ones.

    Config files of base models name the end of a document, and tokenizer_config.json that of an answer.
    """
    ids = set(recommended_stop_token_ids(generation_config))
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    ids |= set(cfg.stop_token_ids) | {t for t in DEFAULT_STOP_TOKEN_IDS if t < vocab_size}
    return tuple(sorted(t for t in ids if 0 <= t < cfg.vocab_size))


def resolve_dtype(dtype: str | DTypeLike, model: str | PathLike[str] | LoadedModel | None) -> jnp.dtype:
    if isinstance(dtype, str) and dtype == "auto":
        if isinstance(model, LoadedModel):
            return compute_dtype_of(model)
        return jnp.dtype(jnp.float32 if platform() == "cpu" else jnp.bfloat16)
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = jnp.dtype(object)
    if resolved not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(map(repr, DTYPES))}")
    return resolved
