"""The parts of `SamplingParams` that keep tokens out of a text: their checks, and what a `Request` has of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mtpjax.decoding.constraints import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from mtpjax.engine.stack_constraints import MAX_EARLY_STOP_TOKENS
from mtpjax.text.tokenizer import Tokenizer

MAX_N = 16384  # samples of a prompt, as in vLLM
MAX_BIAS = 100.0


@runtime_checkable
class ConstraintParams(Protocol):
    """The fields of `SamplingParams` that this module is about."""

    @property
    def min_tokens(self) -> int: ...
    @property
    def logit_bias(self) -> Mapping[int, float] | None: ...
    @property
    def allowed_token_ids(self) -> Sequence[int] | None: ...
    @property
    def bad_words(self) -> Sequence[str] | None: ...


def check_n(n: object, temperature: float) -> None:
    """Raise ValueError unless `n` samples can be taken at this temperature."""
    if not _is_whole(n) or not 1 <= n <= MAX_N:  # type: ignore[operator]
        raise ValueError(f"n is {n!r}; expected a whole number from 1 to {MAX_N}, the number of samples of a prompt")
    if n != 1 and temperature == 0:
        raise ValueError(f"n is {n} and temperature is 0, so all samples would be the same; give a temperature above 0")


def settle_constraints(params: ConstraintParams, max_tokens: int | None) -> dict[str, Any]:
    """Check the fields that keep tokens out of a text, as far as this needs no model.

    Returns:
        them with keys of a bias as numbers, biases limited to -100...100 as in vLLM, and lists as tuples.

    Raises:
        ValueError: names the field, what was expected and what was found.
    """
    least = params.min_tokens
    if not _is_whole(least) or least < 0:
        raise ValueError(f"min_tokens is {least!r}; expected a whole number >= 0")
    if max_tokens is not None and least > max_tokens:
        raise ValueError(f"min_tokens is {least}, more than max_tokens, which is {max_tokens}; expected at most that")
    allowed, words, bias = params.allowed_token_ids, params.bad_words, params.logit_bias
    if allowed is not None:
        allowed = tuple(dict.fromkeys(_sequence("allowed_token_ids", allowed, "token ids")))
        for token in allowed:
            if not _is_whole(token) or token < 0:
                raise ValueError(f"allowed_token_ids has {token!r}; expected token ids, whole numbers >= 0")
        if not allowed:
            raise ValueError("allowed_token_ids is empty, so no token is allowed; give at least one, or None for all")
        allowed = tuple(map(int, allowed))
    words = tuple(dict.fromkeys(_sequence("bad_words", () if words is None else words, "texts")))
    for word in words:
        if not isinstance(word, str) or not word:
            raise ValueError(f"bad_words has {word!r}; expected texts of at least one character")
    return {"allowed_token_ids": allowed, "bad_words": words, "logit_bias": None if bias is None else _bias(bias)}


def constraint_fields(
    params: ConstraintParams,
    name: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    stop_token_ids: Sequence[int],
) -> dict[str, Any]:
    """Return the fields of a `Request` that `params` ask for.

    Args:
        params: settled sampling parameters.
        name: of the prompt, for errors.
        tokenizer: for bad words.
        vocab_size: ids below this exist.
        stop_token_ids: of the request and of the checkpoint, ignored ones too.

    Raises:
        ValueError: an id outside the vocabulary, too many or too long bad words, or no token that could be generated.
    """
    bias = tuple(sorted((params.logit_bias or {}).items()))
    allowed = tuple(params.allowed_token_ids or ())
    words = _bad_words(params.bad_words or (), name, tokenizer, vocab_size)
    early = tuple(dict.fromkeys(stop_token_ids)) if params.min_tokens else ()
    for field, ids in (("logit_bias", [token for token, _ in bias]), ("allowed_token_ids", allowed)):
        for token in ids:
            if token >= vocab_size:
                raise ValueError(f"{name}: {field} has token {token}, outside the vocabulary 0...{vocab_size - 1}")
    if len(early) > MAX_EARLY_STOP_TOKENS:
        raise ValueError(
            f"{name}: min_tokens forbids {len(early)} stop tokens, the checkpoint's included; "
            f"at most {MAX_EARLY_STOP_TOKENS} are possible"
        )
    _check_something_is_left(name, allowed, words, early, vocab_size)
    return {
        "min_tokens": params.min_tokens,
        "early_stop_token_ids": early,
        "logit_bias": bias,
        "allowed_token_ids": allowed,
        "bad_words": words,
    }


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _sequence(name: str, value: Any, of: str) -> Sequence[Any]:
    if isinstance(value, str | bytes | Mapping):
        raise ValueError(f"{name} is {value!r}; expected a list of {of}")
    try:
        return list(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected a list of {of}") from None


def _bias(bias: Mapping[Any, Any]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias is {bias!r}; expected an object of token ids and numbers")
    settled: dict[int, float] = {}
    for key, value in bias.items():
        token = key
        if isinstance(key, str) and key.strip().isdecimal():  # keys of JSON are texts
            token = int(key)
        if not _is_whole(token) or token < 0:
            raise ValueError(f"logit_bias has the key {key!r}; expected a token id, a whole number >= 0")
        if int(token) in settled:
            raise ValueError(f"logit_bias has token {token} twice, as a text and as a number; give it once")
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(
                f"logit_bias of token {token} is {value!r}; expected a finite number, -{MAX_BIAS:g} to {MAX_BIAS:g}"
            )
        settled[int(token)] = min(MAX_BIAS, max(-MAX_BIAS, float(value)))
    return settled


def _bad_words(
    words: Sequence[str], name: str, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of bad words, each once."""
    if not words:
        return ()
    if tokenizer is None:
        raise ValueError(f"{name} has bad_words, but the checkpoint has no tokenizer; give tokenizer=")
    try:
        sequences = _encode_bad_words(tokenizer.hf_tokenizer, tuple(words))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    for sequence in sequences:
        if outside := [token for token in sequence if token >= vocab_size]:
            raise ValueError(f"{name}: bad_words have token {outside[0]}, outside the vocabulary 0...{vocab_size - 1}")
    return sequences


@lru_cache(maxsize=8)  # the requests of a job often have the same words
def _encode_bad_words(hf_tokenizer: Any, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Encode each word as vLLM does: without white space in front, and with one space if this is other tokens.

    The form with a space counts only if it has as many tokens and another first one.
    """
    encode, sequences = Tokenizer(hf_tokenizer).encode, dict[tuple[int, ...], None]()
    for word in words:
        bare = tuple(encode(word.lstrip()))
        if not bare:
            raise ValueError(f"bad_words has {word!r}, which has no token; expected texts with at least one")
        spaced = tuple(encode(" " + word.lstrip()))
        forms = [bare, spaced] if len(spaced) == len(bare) and spaced[0] != bare[0] else [bare]
        for form in forms:
            if len(form) > MAX_BAD_WORD_TOKENS:
                raise ValueError(f"bad_words has {word!r} with {len(form)} tokens; at most {MAX_BAD_WORD_TOKENS}")
            sequences[form] = None
    if len(sequences) > MAX_BAD_WORDS:
        raise ValueError(
            f"bad_words are {len(sequences)} token sequences ({len(words)} words, with and without a space in front); "
            f"at most {MAX_BAD_WORDS}"
        )
    return tuple(sequences)


def _check_something_is_left(
    name: str, allowed: Sequence[int], words: Sequence[tuple[int, ...]], early: Sequence[int], vocab_size: int
) -> None:
    """Raise ValueError if no token can be generated, whatever the text is."""
    if not allowed:
        if len({word[-1] for word in words} | set(early)) >= vocab_size:
            raise ValueError(f"{name}: bad_words and min_tokens may forbid all {vocab_size} tokens of the vocabulary")
        return
    single = {word[0] for word in words if len(word) == 1}
    if single.issuperset(allowed):
        raise ValueError(f"{name}: bad_words forbid every token of allowed_token_ids; no token is left")
    if single.union(early).issuperset(allowed):
        raise ValueError(
            f"{name}: every token of allowed_token_ids that bad_words leave is a stop token, which min_tokens forbids; "
            "allow another one, or set min_tokens to 0"
        )
