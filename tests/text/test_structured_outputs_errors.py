"""Structured outputs that cannot be: grammars, schemas and expressions that are refused, by name and place."""

from __future__ import annotations

from typing import Any

import pytest

from mtpjax import StructuredOutputs
from mtpjax.text.token_automaton import TokenAutomaton, TokenBytes, build_token_automaton
from tests.helpers.token_oracle import END, VOCAB_SIZE, some_tokens

TOKENS = some_tokens(0, "ab1é \n")
JSON_TOKENS = some_tokens(1, 'ab1é {}[]:,"-.e0\\truefalsn')


def compiled(tokens: dict[int, bytes] = TOKENS, **kinds: Any) -> TokenAutomaton:
    return build_token_automaton(StructuredOutputs(**kinds).to_dfa(), TokenBytes(tokens, VOCAB_SIZE), [END])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= "a" root | "b"', "'root' leads back to itself"),
        ('root ::= x\nx ::= "(" y ")"\ny ::= x | "a"', r"x -> y -> x"),
        ("root ::= other", "'other', which the grammar does not have"),
        ('start ::= "a"', "no rule 'root'"),
        ('root ::= "a" ~', "line 1 of the grammar does not parse at '~'"),
        ('"a"', "begins with a rule"),
        ('root ::= "a"\nroot ::= "b"', "each once"),
    ],
)
def test_bad_grammar(grammar: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputs(grammar=grammar).to_dfa()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({}, "has none of json"),
        ({"json": {}, "regex": "a"}, "json and regex"),
        ({"choice": []}, "none of them empty"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": "ab"}, "expected a list"),
        ({"regex": ""}, "not empty"),
        ({"regex": 3}, "not empty"),
        ({"json": "{"}, "not a JSON schema"),
        ({"json": 3}, "expected an object"),
        ({"json": {"a": {1, 2}}}, "not a JSON schema"),
        ({"json": False}, "nothing satisfies"),
        ({"json_object": 1}, "expected True"),
    ],
)
def test_bad_arguments(kinds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputs(**kinds)
    with pytest.raises(TypeError, match="did you mean 'regex'"):
        StructuredOutputs(regexp="a")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "minimum": 3}, "the schema has 'minimum', which is not supported"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, r"properties\['a'\] has 'not'"),
        ({"type": "foo"}, "the type 'foo'"),
        ({"enum": []}, "no value of 'enum'"),
        ({"enum": ["a"], "type": "integer"}, "no value of 'enum'"),
        ({"type": "string", "minLength": 3, "maxLength": 1}, "nothing satisfies it"),
        ({"type": "array", "minItems": 3, "maxItems": 1}, "nothing satisfies it"),
        ({"type": "string", "maxLength": -1}, "'maxLength' = -1"),
        ({"type": "string", "pattern": ".*"}, "which JSON escapes"),
        ({"type": "string", "pattern": "("}, r"the pattern '\('"),
        ({"type": "string", "pattern": "a+", "maxLength": 3}, "'maxLength' beside 'pattern'"),
        ({"type": "string", "format": "uri"}, "the format 'uri'"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "requires 'b'"),
        ({"type": "object", "properties": {'a"': {}}}, "which JSON escapes"),
        ({"type": "array", "items": False, "minItems": 1}, "items is false"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "both may be number"),
        ({"allOf": [{"type": "integer"}, {"type": "number"}]}, "'allOf' of 2"),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"$ref": "other.json"}, "does not lead into the schema"),
        ({"$defs": {"x": {"items": {"$ref": "#/$defs/x"}}}, "$ref": "#/$defs/x"}, "refers to itself"),
        ({"$ref": "#"}, "refers to itself"),
    ],
)
def test_bad_schema(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled(JSON_TOKENS, json=schema)


@pytest.mark.parametrize("regex", ["(", "a)|(b", "a(?=b)", r"\bfoo", r"(a)\1", "[z-a]"])
def test_bad_expression(regex: str) -> None:
    with pytest.raises(ValueError, match="DFA"):
        compiled(regex=regex)


@pytest.mark.parametrize("regex", ["[a&&b]", "a[a&&b]", "[a&&b]+"])
def test_an_expression_that_nothing_matches(regex: str) -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        compiled(regex=regex)
