"""What counts as a prompt, and its token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mtpjax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""A text, or token ids."""


def as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """Return a list of prompts: one text or one list of ids is one prompt, anything else is a collection of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int | np.integer) for item in items):
        return [items]
    return items


def encode_prompt(name: str, prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    """Return the token ids of a prompt.

    Args:
        name: of the prompt, for errors.
        prompt: a text or token ids.
        tokenizer: for texts.
        vocab_size: ids below this are allowed.

    Raises:
        ValueError: neither a text nor a list of ids; a text without a tokenizer; empty; an id outside the vocabulary.
    """
    if not isinstance(prompt, str):
        ids = _checked_ids(name, prompt)
    elif tokenizer is None:
        raise ValueError(
            f"{name} is a text, but the checkpoint has no tokenizer.json; copy that of the base model to it, "
            "give token ids, or tokenizer="
        )
    else:
        ids = tuple(tokenizer.encode(prompt))
    if not ids:
        raise ValueError(f"{name} is empty; give at least one token")
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name}: id {token} at position {position} is outside the vocabulary 0...{vocab_size - 1}"
            )
    return ids


def _checked_ids(name: str, prompt: Sequence[int]) -> tuple[int, ...]:
    try:
        ids = tuple(prompt)
    except TypeError as error:
        raise ValueError(f"{name} must be a text or a list of token ids: {error}") from None
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise ValueError(f"{name} must be a text or a list of token ids: {token!r} is not a token id")
    return tuple(map(int, ids))
