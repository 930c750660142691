"""Text token by token: the pieces are the text of all tokens at once, and no piece has half a character."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from checkpoints import TINY
from mtpjax.text.detokenizer import make_detokenizer
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.fast
NEW_TOKENS = (
    AddedToken("<é à>"),
    AddedToken("<ctrl>", special=True),
    AddedToken("éé"),
    AddedToken("日本", special=True),
)


@cache
def tokenizer() -> Tokenizer:
    """The embedded one with added tokens that are no letters of bytes, or are such letters by accident."""
    tokenizer = load_tokenizer(TINY / "tokenizer.json")
    tokenizer.hf_tokenizer.add_tokens([token for token in NEW_TOKENS if not token.special])
    tokenizer.hf_tokenizer.add_special_tokens([token for token in NEW_TOKENS if token.special])
    return Tokenizer(tokenizer.hf_tokenizer)


@cache
def byte_tokens() -> list[int]:
    """The token of each byte."""
    by_byte = {tokenizer().bytes_of(i): i for i in range(tokenizer().size) if i not in tokenizer().added_token_ids}
    return [by_byte[bytes([byte])] for byte in range(256)]


def in_bytes(text: str) -> list[int]:
    return [byte_tokens()[byte] for byte in text.encode()]


def pieces(ids: list[int], skip: bool) -> list[str]:
    add = make_detokenizer(tokenizer(), skip).add
    return [add(token) for token in ids]


TOKENS = st.one_of(
    st.integers(0, 255).map(lambda byte: [byte_tokens()[byte]]),
    st.characters(min_codepoint=0x80, exclude_categories=["Cs"]).map(in_bytes),
    st.characters(min_codepoint=0x10000).map(in_bytes),
    st.sampled_from(["Once upon", " \n", "日本語", "🙂👩‍👧", "\ufffd"]).map(lambda text: tokenizer().encode(text)),
    st.integers(0, 5000).map(lambda token: [token]),  # ids that no token has are among them
    st.integers(0, 99).map(lambda i: [tokenizer().added_token_ids[i % len(tokenizer().added_token_ids)]]),
)


@given(st.lists(TOKENS, max_size=30).map(lambda parts: sum(parts, [])), st.booleans())
def test_pieces_are_the_text_of_all_tokens(ids: list[int], skip: bool) -> None:
    """At every length, up to a character whose bytes are not all there; invalid bytes and special tokens included."""
    decode = tokenizer().decode if skip else tokenizer().decode_all
    text = ""
    for length, piece in enumerate(pieces(ids, skip), 1):
        text += piece
        whole = decode(ids[:length])
        assert whole in (text, text + "\ufffd")
    if ids and text != decode(ids):
        assert decode([*ids, *in_bytes("a")]) == text + "\ufffda"  # it was a beginning, and nothing else is held


@given(st.text(max_size=40), st.booleans())
def test_valid_text_has_no_replacement_characters(text: str, skip: bool) -> None:
    text = text.replace("\ufffd", "").encode(errors="ignore").decode()
    assert "".join(pieces(in_bytes(text), skip)) == text
    assert not any("\ufffd" in piece for piece in pieces(in_bytes(text), skip))
    found = pieces(in_bytes(text), skip)
    assert [piece for piece in found if piece] == list(text)  # each character comes with its last byte


def test_special_tokens_are_skipped_if_asked() -> None:
    ids = [tokenizer().hf_tokenizer.token_to_id(token.content) for token in NEW_TOKENS] + in_bytes("a")
    assert "".join(pieces(ids, False)) == tokenizer().decode_all(ids)
    assert "".join(pieces(ids, True)) == tokenizer().decode(ids) != tokenizer().decode_all(ids)


def test_nothing_is_decoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is linear: one step for each token, and the package's own `decode` is not called."""
    ids, steps = tokenizer().encode("漢字🙂 and more. ") * 100, 0

    def count(self: Tokenizer, token: int) -> bytes:
        nonlocal steps
        steps += 1
        return bytes_of(self, token)

    def fail(*_: Any) -> str:
        raise AssertionError("decoded as a whole")

    bytes_of = Tokenizer.bytes_of
    monkeypatch.setattr(Tokenizer, "bytes_of", count)
    monkeypatch.setattr(Tokenizer, "decode", fail)
    monkeypatch.setattr(Tokenizer, "decode_all", fail)
    assert "".join(pieces(ids, True)) == "漢字🙂 and more. " * 100 and steps == len(ids)


def other_tokenizers() -> list[Tokenizer]:
    """Words between spaces, and words that begin with a mark for the space."""
    words = {word: i for i, word in enumerate(["a", "bc", "def", "."])}
    plain = HfTokenizer(models.WordLevel(words, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    marked = HfTokenizer(models.WordLevel({f"▁{word}": i for word, i in words.items()} | {"x": 4}, unk_token="x"))
    marked.decoder = decoders.Metaspace()
    for one in (plain, marked):
        one.add_special_tokens([AddedToken("<s>", special=True)])
    return [Tokenizer(plain), Tokenizer(marked)]


@given(st.lists(st.integers(0, 9), max_size=20), st.booleans(), st.sampled_from([0, 1]))
def test_other_tokenizers_than_byte_level_ones(ids: list[int], skip: bool, which: int) -> None:
    one = other_tokenizers()[which]
    assert not one.is_byte_level
    add = make_detokenizer(one, skip).add
    decode = one.decode if skip else one.decode_all
    text = ""
    for length, token in enumerate(ids, 1):
        text += add(token)
        assert text == decode(ids[:length])
