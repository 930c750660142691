"""Text <-> token ids through the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from mtpjax.text.chat_template import ChatTemplate, find_chat_template

# Pre-tokenisers: Qwen2's, and that of Qwen3.5, which joins marks to letters.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s|\p{N}|"
    r" ?[^\s%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"qwen2": _SPLIT % (r"\p{L}+", r"\p{L}"), "qwen35": _SPLIT % (r"[\p{L}\p{M}]+", r"\p{L}\p{M}")}
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # token types of GGUF


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


def byte_level_bpe(model: Any, split: str) -> Any:
    """A `tokenizers.Tokenizer` around a BPE model, as Qwen's: NFC, the pre-tokeniser `SPLITS[split]`, bytes as letters."""
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    pattern = tokenizers.Regex(SPLITS[split])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> Tokenizer | None:
    """The tokenizer and chat template in the metadata of a GGUF file; None where it holds none.

    Raises ValueError that names what cannot be read; `where` is the file.
    """
    from tokenizers import AddedToken, models

    tokens, merges, types, kind, pre = (
        metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges", "token_type", "model", "pre")
    )
    if tokens is None:
        return None
    if kind != "gpt2" or pre not in SPLITS:
        wanted = ", ".join(map(repr, SPLITS))
        raise ValueError(
            f"{where}: has a tokenizer {kind!r} / {pre!r}, supported: 'gpt2' with {wanted}. Give tokenizer=."
        )
    types = types or [1] * len(tokens)
    try:
        vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
        pairs = [tuple(merge.split(" ", 1)) for merge in merges or []]
        backend = byte_level_bpe(models.BPE(vocab=vocab, merges=pairs), pre)
        added = {i: t for i, t in enumerate(tokens) if types[i] in (_CONTROL, _USER_DEFINED)}
        for i, token in added.items():
            backend.add_tokens([AddedToken(token, special=types[i] == _CONTROL, normalized=False)])
    except Exception as error:  # the package raises bare Exceptions
        raise ValueError(f"{where}: its tokenizer cannot be read: {error}. Give tokenizer=.") from None
    names = {
        n: metadata.get(f"tokenizer.ggml.{key}_token_id") for n, key in (("bos_token", "bos"), ("eos_token", "eos"))
    }
    texts = {name: tokens[i] for name, i in names.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, ChatTemplate(template, where, texts) if isinstance(template, str) else None)


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int, stops: Sequence[int]) -> dict[str, Any]:
    """What a GGUF file says about a byte-level BPE tokenizer; the inverse of `tokenizer_from_gguf`."""
    whole = json.loads(tokenizer.backend.to_str())
    added = {token["id"]: token for token in whole["added_tokens"]}
    by_id = {i: text for text, i in whole["model"]["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [
        (_CONTROL if added[i]["special"] else _USER_DEFINED) if i in added else 1 if i in by_id else _UNUSED
        for i in range(vocab_size)
    ]
    split = json.dumps(SPLITS["qwen35"])[1:-1]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35" if split in json.dumps(whole["pre_tokenizer"]) else "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]],
    }
    if stops:
        found["tokenizer.ggml.eos_token_id"] = stops[0]
    if tokenizer.chat_template is not None:
        found["tokenizer.chat_template"] = tokenizer.chat_template.text
    return found
