"""Tokens that only `added_tokens_decoder` of tokenizer_config.json knows: some tools add them there alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointWarning
from checkpoints.folder import read_json_file

_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def with_added_tokens(hf_tokenizer: Any, config_file: Path) -> Any:
    """Return a `tokenizers.Tokenizer` that has the tokens of `added_tokens_decoder`, each under the id given there.

    Args:
        hf_tokenizer: of tokenizer.json, whose own tokens stay as they are.
        config_file: tokenizer_config.json. Its `tokenizer_class` does not matter.

    Raises:
        checkpoints.CheckpointError: the file cannot be read.

    Warns:
        CheckpointWarning: a token or an id means something else in tokenizer.json, or an entry is no token.
    """
    decoder = read_json_file(config_file).get("added_tokens_decoder")
    if not isinstance(decoder, Mapping):
        return hf_tokenizer
    known = {i: token.content for i, token in hf_tokenizer.get_added_tokens_decoder().items()}
    missing: dict[int, Mapping[str, Any]] = {}
    contradictions: list[str] = []
    for key, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(content, str) or not content or not str(key).isdecimal():
            contradictions.append(f"{key!r}: {entry!r}")
        elif known.get(int(key)) != content:
            missing[int(key)] = entry
    if not missing and not contradictions:
        return hf_tokenizer
    ids = hf_tokenizer.get_vocab(with_added_tokens=True)
    tokens = {i: token for token, i in ids.items()}
    for i, content in [(i, entry["content"]) for i, entry in missing.items()]:
        if ids.get(content, i) != i or tokens.get(i, content) != content:
            contradictions.append(f"{content!r} with id {i}")
            del missing[i]
    if contradictions:
        warnings.warn(
            f"{config_file}: {len(contradictions)} entries of added_tokens_decoder contradict tokenizer.json, which is "
            f"followed: {', '.join(contradictions[:5])}",
            CheckpointWarning,
            stacklevel=4,
        )
    return _add(hf_tokenizer, {i: missing[i] for i in sorted(missing)}, ids)


def _add(hf_tokenizer: Any, missing: Mapping[int, Mapping[str, Any]], ids: Mapping[str, int]) -> Any:
    """Add tokens under their ids: the package numbers new tokens itself, but keeps the ids of those in its model."""
    import tokenizers

    new = {entry["content"]: i for i, entry in missing.items() if entry["content"] not in ids}
    if new:
        description = json.loads(hf_tokenizer.to_str())
        description["model"]["vocab"] |= new
        hf_tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    added = [
        tokenizers.AddedToken(entry["content"], **{o: bool(entry[o]) for o in _OPTIONS if o in entry})
        for entry in missing.values()
    ]
    if added:
        hf_tokenizer.add_tokens(added)
    return hf_tokenizer
