"""The draft head: which token ids drafts come from, and the rows of the LM head that belong to them.

The LM head is most of what a draft step reads. Drafts may come from the most frequent token ids alone (FR-Spec: Zhao et
al. 2025, arXiv:2502.14856). The trunk still chooses from the whole vocabulary, and a draft counts only if it is the
trunk's own token, so the text does not depend on it; a token outside the part costs the drafts of one round.

The head is a copy: it takes N / V of the memory of the LM head, and the rest of the model stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from kernels_pallas.weights import QuantizedTensor, TransposedWeight
from kernels_pallas.weights.quantized import FP8_BLOCK
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.open_model import OpenedModel, compute_dtype_of
from mtpjax.model.model import DraftHead
from mtpjax.text.draft_vocab import DRAFT_VOCAB_FILE, read_draft_vocab


def with_draft_vocab(
    opened: OpenedModel,
    draft_vocab_size: int | str | PathLike[str] | None,
    stop_token_ids: Sequence[int],
    num_speculative_tokens: int,
) -> LoadedModel:
    """Return the model with the draft head that `LLM(draft_vocab_size=...)` asks for; none if nothing is drafted.

    Raises:
        ValueError: as `choose_draft_token_ids`.
    """
    token_ids = choose_draft_token_ids(opened, draft_vocab_size, stop_token_ids)
    return with_draft_head(opened.model, token_ids) if num_speculative_tokens else opened.model


def choose_draft_token_ids(
    opened: OpenedModel, draft_vocab_size: int | str | PathLike[str] | None, stop_token_ids: Sequence[int]
) -> NDArray[np.int32] | None:
    """Return the ids that drafts come from, ascending; None: all.

    They are the N most frequent ones, the tokenizer's added tokens and the stop tokens. Frequent is

    * what stands first in the file that `draft_vocab_size` names; N is then the length of its list,
    * or in the file `draft_vocab.json` of the checkpoint's folder,
    * or, without such a file and behind the ids that it lists, the lower id: the ids of a byte-level BPE are bytes and
      then its merges in the order in which they were learned, the most frequent pair first.

    Args:
        opened: the model and its tokenizer.
        draft_vocab_size: N, a file that `mtpjax count-tokens` wrote, or None.
        stop_token_ids: of the checkpoint.

    Raises:
        ValueError: N is no whole number of 1...vocabulary size; the file cannot be read or is of another tokenizer.
    """
    if draft_vocab_size is None:
        return None
    limit, tokenizer = opened.vocab_size, opened.tokenizer
    by_frequency: Sequence[int] = ()
    if isinstance(draft_vocab_size, str | PathLike):
        by_frequency = read_draft_vocab(draft_vocab_size, tokenizer, limit).token_ids
        size = len(by_frequency)
    else:
        whole = isinstance(draft_vocab_size, int | np.integer) and not isinstance(draft_vocab_size, bool)
        if not whole or not 1 <= draft_vocab_size <= limit:
            expected = f"a whole number from 1 to {limit} (the vocabulary), the path of a file of ids, or None"
            raise ValueError(f"draft_vocab_size is {draft_vocab_size!r}; expected {expected}")
        size = int(draft_vocab_size)
        if opened.folder is not None and (file := opened.folder / DRAFT_VOCAB_FILE).exists():
            by_frequency = read_draft_vocab(file, tokenizer, limit).token_ids
    ids = list(dict.fromkeys((*by_frequency, *range(limit))))[:size]
    always = [*stop_token_ids, *(tokenizer.added_token_ids if tokenizer else ())]
    chosen = np.unique(np.asarray([*ids, *(i for i in always if i < limit)], np.int32))
    return None if chosen.size == limit else chosen


def with_draft_head(model: LoadedModel, token_ids: NDArray[np.int32] | None) -> LoadedModel:
    """Return the model with a draft head of these ids; the model itself for None.

    The rows are those of the LM head, or of the MTP head's own one, which `load_model` has put there.
    """
    if token_ids is None:
        return model
    merged: Any = nnx.merge(model.graph, model.params)
    if merged.draft_head is not None:
        head = merged.draft_head.weight[...]
    else:
        head = (merged.embedding if merged.lm_head is None else merged.lm_head)[...]
    merged.draft_head = nnx.data(DraftHead(take_rows(head, token_ids, compute_dtype_of(model)), _put(token_ids)))
    graph, params = nnx.split(merged)
    return replace(model, graph=graph, params=params)


def take_rows(weight: Any, rows: NDArray[np.int32], dtype: jnp.dtype) -> Any:
    """Return the rows of a weight `[O, F]` in the form that the weight has, exactly.

    Rows of FP8 share scales in blocks of 128, so chosen rows have no such form: they become an array of `dtype`, which
    is also what `linear` multiplies with where it has no kernel.

    Args:
        weight: an array, a `QuantizedTensor` or a `TransposedWeight`.
        rows: the numbers of the rows.
        dtype: of computing.

    Raises:
        TypeError: another form of weight.
    """
    if isinstance(weight, QuantizedTensor):
        if weight.layout == "fp8":
            codes, scale = np.asarray(weight.codes)[rows], np.asarray(weight.scale)[rows // FP8_BLOCK]
            per_column = np.repeat(scale, FP8_BLOCK, axis=-1)[:, : codes.shape[-1]]
            return _put((codes.astype(np.float32) * per_column).astype(dtype))
        return jax.tree.map(lambda array: _put(np.asarray(array)[rows]), weight)
    if isinstance(weight, TransposedWeight):
        return TransposedWeight(_put(np.asarray(weight.array)[..., rows]))
    if isinstance(weight, jax.Array):
        return _put(np.asarray(weight)[rows])
    raise TypeError(f"rows of {type(weight).__name__} of shape {list(weight.shape)} cannot be taken")


def _put(array: NDArray[Any]) -> jax.Array:
    """Put an array on the device; indexing there would be a program to compile for each shape."""
    return jax.device_put(np.ascontiguousarray(array))
