"""Tokens that only tokenizer_config.json or the token types of a GGUF file know."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizer

from checkpoints import TINY, CheckpointWarning
from mtpjax.text.tokenizer import load_tokenizer, tokenizer_from_gguf, tokenizer_to_gguf

pytestmark = pytest.mark.fast


def folder(path: Path, decoder: Any, **config: Any) -> Path:
    """Write the embedded model's tokenizer.json with another tokenizer_config.json; return the tokenizer's path."""
    path.mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer.json", path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder} | config))
    return path / "tokenizer.json"


def token(content: str, special: bool = False, **options: bool) -> dict[str, Any]:
    return {"content": content, "special": special, "lstrip": False, "normalized": False, "rstrip": False} | options


def test_tokens_of_the_config_get_their_ids(tmp_path: Path) -> None:
    """As the tokenizers package gives them where they follow one another, and also where they do not."""
    original = HfTokenizer.from_file(str(TINY / "tokenizer.json"))
    size = original.get_vocab_size(with_added_tokens=True)
    decoder = {str(size): token("<tool_call>"), str(size + 1): token("<|tool|>", special=True)}
    text = "a <tool_call>{}<|tool|> b <gap>"
    loaded = load_tokenizer(folder(tmp_path / "a", decoder))
    original.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<|tool|>", special=True)])
    assert loaded.encode(text) == original.encode(text, add_special_tokens=False).ids
    assert loaded.decode(loaded.encode(text)) == "a <tool_call>{} b <gap>" and loaded.size == size + 2
    gap = load_tokenizer(folder(tmp_path / "b", decoder | {str(size + 9): token("<gap>")}))
    assert gap.encode("<gap>") == [size + 9] and gap.encode("<tool_call>") == [size] and gap.size == size + 10


def test_known_tokens_and_the_class_name_change_nothing(tmp_path: Path) -> None:
    """tinker-cookbook 582: transformers 5 writes "TokenizersBackend" for every tokenizer."""
    original = load_tokenizer(TINY / "tokenizer.json")
    added = original.hf_tokenizer.get_added_tokens_decoder()
    decoder = {str(i): token(t.content, t.special) for i, t in added.items()}
    for class_name in ("TokenizersBackend", "Qwen2Tokenizer", None, 7):
        loaded = load_tokenizer(folder(tmp_path / "a", decoder, tokenizer_class=class_name))
        assert loaded.hf_tokenizer.to_str() == original.hf_tokenizer.to_str()
        assert loaded.sha256 == original.sha256


@pytest.mark.parametrize(
    ("key", "entry", "named"),
    [("5", token("<new>"), "'<new>' with id 5"), ("9000", "text", "'9000': 'text'"), ("x", token("<a>"), "'x': ")],
)
def test_a_contradiction_is_named_and_tokenizer_json_followed(key: str, entry: Any, named: str, tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning, match=f"1 entries of added_tokens_decoder contradict.*{named}"):
        loaded = load_tokenizer(folder(tmp_path / "a", {key: entry}))
    assert loaded.size == load_tokenizer(TINY / "tokenizer.json").size


def test_token_types_of_a_gguf_file_are_followed() -> None:
    """Control tokens are left out of texts, user-defined ones are not; both are cut out before the merges."""
    metadata = tokenizer_to_gguf(load_tokenizer(TINY / "tokenizer.json"), 4096, [4095])
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    metadata |= {"tokenizer.ggml.tokens": [*tokens, "<tool_call>", "<|tool|>", "[PAD4098]"]}
    metadata |= {"tokenizer.ggml.token_type": [*types, 4, 3, 5]}
    tokenizer = tokenizer_from_gguf(metadata, "m.gguf")
    assert tokenizer is not None
    ids = tokenizer.encode("x<tool_call>y<|tool|>[PAD4098]")
    assert 4096 in ids and 4097 in ids and 4098 not in ids
    assert tokenizer.decode(ids) == "x<tool_call>y[PAD4098]"
