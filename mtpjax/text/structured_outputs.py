"""Structured outputs: a JSON schema, an expression, alternatives or a grammar becomes a `TokenAutomaton`."""

from __future__ import annotations

import json as json_module
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtpjax.argument_names import names_fields
from mtpjax.text.gbnf import grammar_to_regex
from mtpjax.text.json_schema import simplify_schema
from mtpjax.text.regex_dfa import ByteDfa, regex_to_dfa, schema_to_dfa
from mtpjax.text.token_automaton import TokenAutomaton, TokenBytes, build_token_automaton
from mtpjax.text.tokenizer import Tokenizer, bytes_of_token

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_CACHED = 64  # automata kept in memory


@names_fields
@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What a text must be; exactly one of these. Names are those of vLLM's `StructuredOutputsParams`.

    Args:
        json: a JSON schema, as an object or its text.
        regex: a regular expression that the whole text matches.
        choice: the texts to choose from.
        grammar: a grammar in the GBNF form without recursion; see `mtpjax.text.gbnf`.
        json_object: True: any JSON object, nested to a small depth.

    Raises:
        ValueError: none or several of them, or a value of another type. What only the automaton shows is found when the
            request is made.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None and getattr(self, kind) is not False]
        if self.json is False:
            raise ValueError("json is false: nothing satisfies that schema")
        if len(given) != 1:
            raise ValueError(f"StructuredOutputs has {' and '.join(given) or 'none'} of {', '.join(KINDS)}; give one")
        kind, value = given[0], getattr(self, given[0])
        if kind == "json":
            object.__setattr__(self, "json", _schema_text(value))
        elif kind == "choice":
            if isinstance(value, str) or not all(isinstance(text, str) and text for text in value) or not value:
                raise ValueError(f"choice is {value!r}; expected a list of texts, none of them empty")
            object.__setattr__(self, "choice", tuple(value))
        elif kind == "json_object":
            if value is not True:
                raise ValueError(f"json_object is {value!r}; expected True")
        elif not isinstance(value, str) or not value:
            raise ValueError(f"{kind} is {value!r}; expected a text that is not empty")

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind))

    @property
    def text(self) -> str:
        """What is compiled, as text."""
        return json_module.dumps(self.choice) if self.choice else str(getattr(self, self.kind))

    def to_dfa(self) -> ByteDfa:
        """Return the automaton over bytes. Raises ValueError, and ImportError without outlines-core."""
        if self.json_object or self.json is not None:
            schema = {"type": "object"} if self.json_object else json_module.loads(str(self.json))
            return schema_to_dfa(json_module.dumps(simplify_schema(schema, _check_pattern)))
        if self.grammar is not None:
            return regex_to_dfa(grammar_to_regex(self.grammar))
        if self.choice is not None:
            return regex_to_dfa("|".join("".join(f"\\x{{{ord(c):x}}}" for c in text) for text in self.choice))
        return regex_to_dfa(str(self.regex))


def check_structured_outputs(structured_outputs: object, ignore_eos: bool, allowed_token_ids: object = None) -> None:
    """Raise ValueError unless a value of `SamplingParams.structured_outputs` goes with the other parameters."""
    if structured_outputs is None:
        return
    if not isinstance(structured_outputs, StructuredOutputs):
        raise ValueError(f"structured_outputs is {structured_outputs!r}; expected StructuredOutputs(...) or None")
    if ignore_eos:
        raise ValueError("structured_outputs end with an end-of-text token; ignore_eos=True does not go with them")
    if allowed_token_ids:
        raise ValueError("structured_outputs and allowed_token_ids may leave no token; give one of them")


def _schema_text(schema: Any) -> str:
    try:
        parsed = json_module.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, Mapping | bool):
            raise ValueError("expected an object")
        return json_module.dumps(parsed)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json is not a JSON schema: {error}") from None


def _check_pattern(pattern: str) -> None:
    """Refuse a pattern that may match what a JSON string escapes: it would end the string."""
    dfa = regex_to_dfa(pattern)
    used = np.any(dfa.next_state >= 0, axis=0)
    for byte in (*range(32), ord('"'), ord("\\")):
        if used[byte]:
            raise ValueError(
                f"it matches {chr(byte)!r}, which JSON escapes; name the characters that are meant, for example "
                "[A-Za-z ] in place of . or of a class with ^"
            )


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> TokenBytes:
    """Return the bytes of all tokens but the added ones, which are marks and no text.

    Raises:
        ValueError: the tokenizer is not a byte-level BPE.
    """
    decoder = json_module.loads(tokenizer.hf_tokenizer.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise ValueError(
            f"structured outputs need a byte-level tokenizer as Qwen's; this one has the decoder {decoder.get('type')}"
        )
    added, tokens = set(tokenizer.added_token_ids), dict[int, bytes]()
    for text, i in sorted(tokenizer.hf_tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]):
        if i not in added and i < vocab_size and (data := bytes_of_token(text)):
            tokens[i] = data
    return TokenBytes(tokens, vocab_size)


class AutomatonCache:
    """Compiles structured outputs for one vocabulary, and keeps the last `MAX_CACHED` automata.

    Args:
        tokenizer: of the checkpoint; None: it has none, and every structured output is refused.
        vocab_size: number of logits V of a row.
        end_token_ids: the checkpoint's end-of-text tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_token_ids: Sequence[int]):
        self.tokenizer, self.vocab_size, self.end_token_ids = tokenizer, vocab_size, tuple(end_token_ids)
        self._tokens: TokenBytes | None = None
        self._automata: OrderedDict[tuple[str, str], TokenAutomaton] = OrderedDict()

    def compile(self, structured_outputs: StructuredOutputs | None, name: str = "the request") -> TokenAutomaton | None:
        """Return the automaton, or None for None.

        Raises:
            ValueError: `name` has a structured output that cannot be compiled; says why.
            ImportError: outlines-core is not installed.
        """
        if structured_outputs is None:
            return None
        if self.tokenizer is None:
            raise ValueError(f"{name}: structured outputs need a tokenizer, and there is none; give LLM(tokenizer=...)")
        if not self.end_token_ids:
            raise ValueError(f"{name}: structured outputs need an end-of-text token, and the checkpoint names none")
        key = (structured_outputs.kind, structured_outputs.text)
        if key not in self._automata:
            try:
                self._automata[key] = self._compile(structured_outputs)
            except ValueError as error:
                text = structured_outputs.text
                shown = text if len(text) <= 80 else text[:77] + "..."
                raise ValueError(f"{name}: structured output {structured_outputs.kind} {shown!r}: {error}") from None
            if len(self._automata) > MAX_CACHED:
                self._automata.popitem(last=False)
        self._automata.move_to_end(key)
        return self._automata[key]

    def _compile(self, structured_outputs: StructuredOutputs) -> TokenAutomaton:
        assert self.tokenizer is not None
        if self._tokens is None:
            self._tokens = token_bytes(self.tokenizer, self.vocab_size)
        return build_token_automaton(structured_outputs.to_dfa(), self._tokens, self.end_token_ids)
