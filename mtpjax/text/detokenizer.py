"""Tokens to text, one after another: in time that is linear in the text, and never half a character.

The pieces together are the text that `Tokenizer.decode` or `decode_all` gives of all tokens at once, up to a character
at its end whose bytes are not all there.
"""

from __future__ import annotations

import codecs
from typing import Protocol, runtime_checkable

from mtpjax.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # stands for bytes that are no character
MAX_HELD_TOKENS = 4  # a character has at most four bytes, and a token at least one


@runtime_checkable
class Detokenizer(Protocol):
    """Turns the tokens of one text into characters."""

    def add(self, token: int) -> str:
        """Return the characters that are whole with this token; empty if there are none."""
        ...


def make_detokenizer(tokenizer: Tokenizer, skip_special_tokens: bool = True) -> Detokenizer:
    """Make a detokenizer for one text.

    Args:
        tokenizer: of the checkpoint.
        skip_special_tokens: leave special tokens out.
    """
    kind = _ByteDetokenizer if tokenizer.is_byte_level else _WindowDetokenizer
    return kind(tokenizer, skip_special_tokens)


class _ByteDetokenizer:
    """For a byte-level BPE, as Qwen's: a token is some bytes, and all bytes together are the text in UTF-8.

    Python's decoder replaces what is no character as Rust's does, which `tokenizers` uses: the longest bytes that begin
    a character become one U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        if token in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(token))


class _WindowDetokenizer:
    """For any other tokenizer: decodes the tokens since the last piece together with those of the piece before.

    The result is that of decoding all tokens where a token's text depends on no more than that, as with words between
    spaces.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._before: list[int] = []  # tokens of the last piece
        self._new: list[int] = []  # tokens that have given no text so far

    def add(self, token: int) -> str:
        if token in self._skipped or self._tokenizer.hf_tokenizer.id_to_token(int(token)) is None:
            return ""
        self._new.append(token)
        known, text = (self._tokenizer.decode_all(ids) for ids in (self._before, self._before + self._new))
        piece = text[len(known) :]
        if not piece or (piece.endswith(REPLACEMENT) and len(self._new) < MAX_HELD_TOKENS):
            return ""
        self._before, self._new = self._new, []
        return piece
