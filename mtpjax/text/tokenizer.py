"""Text <-> token ids, by the checkpoint's own `tokenizer.json` or the metadata of its GGUF file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from checkpoints.folder import read_json_file
from mtpjax.text.added_tokens import with_added_tokens
from mtpjax.text.chat_template import TOKENIZER_CONFIG, ChatTemplate, find_chat_template, special_tokens_of

# Qwen2's pre-tokenizer, and that of Qwen3.5, which joins combining marks to letters; by the names that GGUF gives them.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s|\p{N}|"
    r" ?[^\s%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRETOKENIZER_REGEX = {"qwen2": _SPLIT % (r"\p{L}+", r"\p{L}"), "qwen35": _SPLIT % (r"[\p{L}\p{M}]+", r"\p{L}\p{M}")}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types of GGUF

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # of thoughts and tool calls


def _byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level BPE stands for: a printable one for itself, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of Hugging Face. It adds no BOS, and leaves special tokens out of decoded text.

    Attributes:
        hf_tokenizer: a `tokenizers.Tokenizer`.
        chat_template: None if the checkpoint has none.
        eos_token: the token that ends a text according to tokenizer_config.json, or None.
    """

    hf_tokenizer: Any
    chat_template: ChatTemplate | None = None
    eos_token: str | None = None

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`; None if there is no such token."""
        return None if self.eos_token is None else self.hf_tokenizer.token_to_id(self.eos_token)

    @property
    def size(self) -> int:
        """Ids below this exist, added tokens included."""
        return max(self.hf_tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def added_token_ids(self) -> list[int]:
        """Ids of the added tokens: end of text, marks of a chat, and the like."""
        return sorted(self.hf_tokenizer.get_added_tokens_decoder())

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that `decode` leaves out."""
        return frozenset(i for i, token in self.hf_tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for some bytes of a text in UTF-8; `bytes_of` returns them."""
        from tokenizers import decoders

        return isinstance(self.hf_tokenizer.decoder, decoders.ByteLevel)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token of a byte-level BPE stands for; none if there is no such token."""
        data = self._known_bytes.get(token)
        if data is None:
            text = self.hf_tokenizer.id_to_token(int(token)) or ""
            is_letters = all(letter in _BYTE_OF for letter in text)  # an added token may be a text of its own
            data = bytes(_BYTE_OF[letter] for letter in text) if is_letters else text.encode()
            self._known_bytes[token] = data
        return data

    @cached_property
    def _known_bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all tokens and their ids: it tells one vocabulary from another, from whatever file it comes."""
        pairs = sorted((i, token) for token, i in self.hf_tokenizer.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(pairs, ensure_ascii=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self.hf_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.hf_tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_with_marks(self, ids: Sequence[int], num_characters: int | None = None) -> str:
        """Return the text of `decode`, but with the marks of thoughts and tool calls where they are special tokens.

        In the checkpoints of Qwen they are not special, and the text has them already.

        Args:
            ids: of the tokens.
            num_characters: length to which the text of `decode` is cut; the marks up to there are added to it. None:
                all of it.
        """
        marks, parts, start = self._special_marks, list[str](), 0
        for position, token in enumerate(ids):
            if token in marks:
                piece = self.decode(ids[start:position])
                if num_characters is not None:
                    if len(piece) > num_characters:
                        break
                    num_characters -= len(piece)
                parts += [piece, marks[token]]
                start = position + 1
        return "".join(parts) + self.decode(ids[start:])[:num_characters]

    def decode_all(self, ids: Sequence[int]) -> str:
        """Return the text of token ids with all special tokens."""
        return self.hf_tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _special_marks(self) -> dict[int, str]:
        added = self.hf_tokenizer.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special and token.content in MARKS}

    def ends_inside_a_character(self, ids: Sequence[int]) -> bool:
        """Return whether the bytes of the last tokens begin a character of UTF-8 and do not end it."""
        added, data = self.hf_tokenizer.get_added_tokens_decoder(), b""
        for token in reversed(ids[-4:]):  # a character has at most four bytes, and a token at least one
            text = self.hf_tokenizer.id_to_token(int(token))
            if text is None or token in added or not all(letter in _BYTE_OF for letter in text):
                break
            data = bytes(_BYTE_OF[letter] for letter in text) + data
        for length in range(1, min(4, len(data) + 1)):  # bytes of a character that is cut: one, two or three
            first = data[-length]
            if first & 0xC0 != 0x80:  # not a byte that continues a character
                return length < (4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC2 else 1)
        return False


def bytes_of_token(token: str) -> bytes | None:
    """Return the bytes that a token of a byte-level BPE stands for; None if it is none of these."""
    return bytes(_BYTE_OF[letter] for letter in token) if all(letter in _BYTE_OF for letter in token) else None


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Read a `tokenizer.json`, and the chat template and the added tokens of tokenizer_config.json beside it.

    Raises:
        ValueError: names a file that cannot be read.
    """
    import tokenizers  # a slow import that research on token ids does not need

    try:
        hf_tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from None
    eos_token = None
    if (config_file := Path(path).parent / TOKENIZER_CONFIG).is_file():
        hf_tokenizer = with_added_tokens(hf_tokenizer, config_file)
        eos_token = special_tokens_of(read_json_file(config_file)).get("eos_token")
    return Tokenizer(hf_tokenizer, find_chat_template(Path(path).parent), eos_token)


def byte_level_bpe(model: Any, pretokenizer: str) -> Any:
    """Build a `tokenizers.Tokenizer` as Qwen's around a BPE model: NFC, a pre-tokenizer, bytes as letters.

    Args:
        model: a `tokenizers.models.BPE`.
        pretokenizer: a key of `PRETOKENIZER_REGEX`.
    """
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

    hf_tokenizer = tokenizers.Tokenizer(model)
    hf_tokenizer.normalizer = normalizers.NFC()
    pattern = tokenizers.Regex(PRETOKENIZER_REGEX[pretokenizer])
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf_tokenizer.decoder = decoders.ByteLevel()
    return hf_tokenizer


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer | None:
    """Build the tokenizer and the chat template that the metadata of a GGUF file describes.

    Args:
        metadata: of the file.
        source: the file, for errors.

    Returns:
        None if the file has no tokenizer.

    Raises:
        ValueError: another kind of tokenizer, or one that cannot be read.
    """
    from tokenizers import AddedToken, models

    tokens, merges, types, kind, pretokenizer = (
        metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type", "model", "pre")
    )
    if tokens is None:
        return None
    if kind != "gpt2" or pretokenizer not in PRETOKENIZER_REGEX:
        supported = ", ".join(map(repr, PRETOKENIZER_REGEX))
        raise ValueError(
            f"{source}: has a tokenizer {kind!r} / {pretokenizer!r}, supported: 'gpt2' with {supported}. "
            "Give tokenizer=."
        )
    types = types or [_NORMAL] * len(tokens)
    try:
        vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
        pairs = [tuple(merge.split(" ", 1)) for merge in merges or []]
        hf_tokenizer = byte_level_bpe(models.BPE(vocab=vocab, merges=pairs), pretokenizer)
        for token, token_type in zip(tokens, types, strict=False):
            if token_type in (_CONTROL, _USER_DEFINED):
                hf_tokenizer.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{source}: its tokenizer cannot be read: {error}. Give tokenizer=.") from None
    special_ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    special_tokens = {
        f"{name}_token": tokens[i] for name, i in special_ids.items() if isinstance(i, int) and 0 <= i < len(tokens)
    }
    template = metadata.get("tokenizer.chat_template")
    chat_template = ChatTemplate(template, source, special_tokens) if isinstance(template, str) else None
    return Tokenizer(hf_tokenizer, chat_template)


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the GGUF metadata of a byte-level BPE tokenizer; the inverse of `tokenizer_from_gguf`.

    Args:
        tokenizer: to describe.
        vocab_size: rows of the embedding matrix; ids that have no token get a name of their own.
        stop_token_ids: the first one becomes the end-of-text token.
    """
    description = json.loads(tokenizer.hf_tokenizer.to_str())
    added = {token["id"]: token for token in description["added_tokens"]}
    by_id = {i: text for text, i in description["model"]["vocab"].items()}
    by_id |= {i: token["content"] for i, token in added.items()}

    def token_type(i: int) -> int:
        if i in added:
            return _CONTROL if added[i]["special"] else _USER_DEFINED
        return _NORMAL if i in by_id else _UNUSED

    qwen35 = json.dumps(PRETOKENIZER_REGEX["qwen35"])[1:-1] in json.dumps(description["pre_tokenizer"])
    merges = description["model"]["merges"]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35" if qwen35 else "qwen2",
        "tokenizer.ggml.tokens": [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [token_type(i) for i in range(vocab_size)],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }
    if stop_token_ids:
        metadata["tokenizer.ggml.eos_token_id"] = stop_token_ids[0]
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template.text
    return metadata
