"""Text <-> token ids through the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mtpjax.chat import ChatTemplate, find_chat_template


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what the engine needs. No BOS is added; special tokens are left out of decoded text."""

    backend: Any
    chat_template: ChatTemplate | None = None

    @property
    def size(self) -> int:
        """Ids below this exist (added tokens included)."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Read a `tokenizer.json`, and the chat template beside it. Raises ValueError that names a file that cannot be read."""
    import tokenizers  # a slow import that research on token ids does not need

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from None
    return Tokenizer(backend, find_chat_template(Path(path).parent))
