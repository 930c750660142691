"""Structured outputs: tables against the library's own automaton, texts against jsonschema, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mtpjax import StructuredOutputs
from mtpjax.text import regex_dfa, token_automaton
from mtpjax.text.json_schema import FORMATS
from mtpjax.text.regex_dfa import regex_to_dfa
from mtpjax.text.structured_outputs import AutomatonCache, token_bytes
from mtpjax.text.token_automaton import TokenAutomaton, TokenBytes, build_token_automaton
from mtpjax.text.tokenizer import Tokenizer, byte_level_bpe
from tests.helpers.token_oracle import END, VOCAB_SIZE, differences, some_tokens

MANY = int(os.environ.get("MTPJAX_EXAMPLES", "100"))  # random expressions, and as many schemas, of the slow tests
ALPHABET = "ab1é \n"
TOKENS = some_tokens(0, ALPHABET)
JSON_TOKENS = some_tokens(1, 'ab1é {}[]:,"-.e0\\truefalsn')


def compiled(tokens: dict[int, bytes] = TOKENS, **kinds: Any) -> TokenAutomaton:
    dfa = StructuredOutputs(**kinds).to_dfa()
    return build_token_automaton(dfa, TokenBytes(tokens, VOCAB_SIZE), [END])


def follows(automaton: TokenAutomaton, text: str) -> bool:
    """Whether a text is accepted when its tokens are single bytes."""
    state = automaton.walk(list(text.encode()))
    return state >= 0 and bool(automaton.accepting[state])


def random_text(automaton: TokenAutomaton, tokens: dict[int, bytes], seed: int) -> str | None:
    """Follow the automaton at random, and to an end as soon as there is one after some tokens; None: it took long."""
    rng, state, data = np.random.default_rng(seed), 0, b""
    for i in range(400):
        allowed = np.flatnonzero(automaton.allowed(state))
        assert len(allowed), "a state without tokens"
        if END in allowed and (i > 12 or rng.random() < 0.3):
            return data.decode()
        allowed = allowed[allowed != END]
        if not len(allowed):
            return data.decode()
        closing = [t for t in allowed if tokens[t] in (b'"', b"}", b"]", b",", b":")] if i > 12 else []
        token = int(rng.choice(closing or allowed))
        data, state = data + tokens[token], automaton.walk([token], state)
    return None


def expressions() -> st.SearchStrategy[str]:
    atoms = st.sampled_from(["a", "b", "1", "é", " ", "[ab]", "[^a]", ".", "[a-z0-9]", r"\d", "ab", "(?i)b"])

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        several = st.lists(inner, min_size=1, max_size=3)
        times = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,3}"])
        return (
            several.map("".join)
            | several.map(lambda parts: "(" + "|".join(parts) + ")")
            | st.tuples(inner, times).map(lambda pair: f"({pair[0]}){pair[1]}")
        )

    return st.recursive(atoms, larger, max_leaves=6)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "a b", "é", "x.y"])
    small = st.integers(0, 2)
    leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.sampled_from(["integer", "number", "boolean", "null", "string"]).map(lambda t: {"type": t}),
        st.tuples(small, small).map(lambda n: {"type": "string", "minLength": n[0], "maxLength": sum(n)}),
        st.sampled_from(sorted(FORMATS)).map(lambda f: {"type": "string", "format": f}),
        st.just({"type": "string", "pattern": "^[ab]+1?$"}),
        st.lists(st.sampled_from(["a", 'q"b', 1, 1.5, None, True, [1, "a"], {"a": [None]}]), min_size=1).map(
            lambda values: {"enum": values}
        ),
        st.just({"const": "é\n"}),
        st.just({"type": ["integer", "null"]}),
    )

    def larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        properties = st.dictionaries(names, inner, min_size=1, max_size=3)
        return st.one_of(
            st.tuples(properties, st.sets(names)).map(
                lambda p: {"type": "object", "properties": p[0], "required": sorted(set(p[0]) & p[1])}
            ),
            st.tuples(inner, small, small).map(
                lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": p[1] + p[2]}
            ),
            st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"anyOf": parts}),
            st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"prefixItems": parts, "type": "array"}),
            inner.map(lambda part: {"$ref": "#/$defs/x", "$defs": {"x": part}} if "$defs" not in str(part) else part),
            inner.map(lambda part: {"type": "object", "additionalProperties": part}),
        )

    return st.recursive(leaves, larger, max_leaves=4)


def check_expression(regex: str) -> None:
    assert differences(compiled(regex=regex), regex, TOKENS) == []


def check_schema(schema: dict[str, Any]) -> None:
    if "$ref" in str(schema) and "$defs" not in schema:
        schema = {"type": "array", "items": {"type": "null"}}  # a reference is from the root, and is tried there
    automaton = compiled(JSON_TOKENS, json=schema)
    texts = [text for seed in range(5) if (text := random_text(automaton, JSON_TOKENS, seed)) is not None]
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


RELAXED = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=25, derandomize=True, **RELAXED)  # type: ignore[arg-type]
@example("a|ab|abc")
@example("(ab)*")
@example("[^a]{0,20}")
@given(expressions())
def test_expressions(regex: str) -> None:
    """In every state the same tokens are allowed as in the library's own automaton over the tokens."""
    check_expression(regex)


@settings(max_examples=25, derandomize=True, **RELAXED)  # type: ignore[arg-type]
@given(schemas())
def test_schemas(schema: dict[str, Any]) -> None:
    """Texts that follow the automaton at random satisfy the schema."""
    check_schema(schema)


@pytest.mark.slow
@settings(max_examples=MANY, **RELAXED)  # type: ignore[arg-type]
@given(expressions())
def test_many_expressions(regex: str) -> None:
    check_expression(regex)


@pytest.mark.slow
@settings(max_examples=MANY, **RELAXED)  # type: ignore[arg-type]
@given(schemas())
def test_many_schemas(schema: dict[str, Any]) -> None:
    check_schema(schema)


def test_a_wrong_class_is_found() -> None:
    automaton = compiled(regex="(ab|a1)+")
    automaton.class_of_token[ord("b")] = automaton.class_of_token[ord("z")]
    assert differences(automaton, "(ab|a1)+", TOKENS)


def test_texts_of_a_schema_follow() -> None:
    properties = {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {}}}
    automaton = compiled(JSON_TOKENS, json={"type": "object", "properties": properties, "required": ["name"]})
    assert follows(automaton, '{"name": "é\\n"}')
    assert follows(automaton, '{"name":"a","age":-3}')
    assert follows(automaton, '{"name": "a", "tags": [1.5e+3, null, {"a": []}]}')
    for text in ("", '{"age": 3}', '{"name": 3}', '{"name": "a", "age": 03}', '{"name": "a"} ', '{"other": 1}'):
        assert not follows(automaton, text), text


def test_longer_alternatives_follow() -> None:
    """The library alone forgets them: a number after an integer, a text after its beginning."""
    number = compiled(json={"anyOf": [{"type": "integer"}, {"type": "number"}]})
    assert follows(number, "1") and follows(number, "1.5") and not follows(number, "1.")
    choice = compiled(choice=["a", "ab", "(1]"])
    assert [follows(choice, text) for text in ("a", "ab", "(1]", "", "(1")] == [True, True, True, False, False]
    assert follows(compiled(regex="^a|abc$"), "abc")


def test_a_long_string_has_a_small_automaton() -> None:
    """A search for matches that begin later would need exponentially many states."""
    automaton = compiled(JSON_TOKENS, json={"type": "string", "maxLength": 60})
    assert follows(automaton, '"' + '\\"' * 60 + '"') and not follows(automaton, '"' + "a" * 61 + '"')


def test_formats() -> None:
    good = {
        "date": "2024-02-28",
        "time": "23:59:00Z",
        "date-time": "2024-02-28T00:00:00.5+01:00",
        "uuid": "123e4567-e89b-12d3-a456-426614174000",
        "ipv4": "255.0.10.1",
        "email": "a.b@c-d.org",
    }
    for name, text in good.items():
        automaton = compiled(JSON_TOKENS, json={"type": "string", "format": name})
        assert follows(automaton, f'"{text}"') and not follows(automaton, f'"{text[1:]}x"'), name


def test_grammar() -> None:
    grammar = r"""
    root   ::= "SELECT " column (", " column){0,2} [^a-z\n"]?   # at most three
    column ::= "id" | "a.b" | "q\"" | [0-9\]-]+
    """
    automaton = compiled(grammar=grammar)
    for text in ("SELECT id", 'SELECT a.b, q", 12-]', "SELECT id!"):
        assert follows(automaton, text), text
    for text in ("SELECT ", "SELECT axb", "SELECT id, id, id, id", "SELECT id\n", "select id"):
        assert not follows(automaton, text), text


def test_expressions_that_explode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many states, too much memory, too much time: each is an error with its size."""
    with pytest.raises(ValueError, match="has 25001 states over bytes; at most 20000"):
        regex_to_dfa("(x{100}){250}")
    if sys.platform == "linux":
        monkeypatch.setattr(regex_dfa, "MAX_DFA_BYTES", 300 << 20)
        with pytest.raises(ValueError, match="needs more than 300 MiB"):
            regex_to_dfa("(a|b)*a(a|b){30}")
    monkeypatch.setattr(regex_dfa, "MAX_DFA_BYTES", 4 << 30)
    monkeypatch.setattr(regex_dfa, "MAX_DFA_SECONDS", 0.5)
    with pytest.raises(ValueError, match="more than 0 s|more than 1 s"):
        regex_to_dfa("(a|b)*a(a|b){30}")


def test_too_large_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_automaton, "MAX_TABLE_ENTRIES", 100)
    with pytest.raises(ValueError, match=r"has \d+ states and at least \d+ classes"):
        compiled(regex="[ab]{40}1")


def test_a_vocabulary_that_cannot_spell_it() -> None:
    tokens = {i: token for i, token in TOKENS.items() if b"1" not in token}
    with pytest.raises(ValueError, match="cannot spell any text that satisfies it: no token has '1'"):
        build_token_automaton(regex_to_dfa("a1|1b"), TokenBytes(tokens, VOCAB_SIZE), [END])
    automaton = build_token_automaton(regex_to_dfa("a(b|1)|1"), TokenBytes(tokens, VOCAB_SIZE), [END])
    assert follows(automaton, "ab") and not automaton.allowed(0)[ord("1")]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regex_dfa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'mtpjax\\[structured\\]'"):
        regex_to_dfa("a")


def test_tokens_of_a_tokenizer() -> None:
    """Added tokens are marks and no text; another kind of tokenizer is refused."""
    from tokenizers import models

    byte_level = byte_level_bpe(models.BPE(vocab={"a": 0, "Ġ": 1, "Ã": 2, "Ġa": 3}, merges=[("Ġ", "a")]), "qwen35")
    byte_level.add_special_tokens(["<end>"])
    tokens = token_bytes(Tokenizer(byte_level), 8)
    assert tokens.ids.tolist() == [0, 1, 2, 3] and bytes(tokens.data) == b"a \xc3 a"
    with pytest.raises(ValueError, match="byte-level"):
        token_bytes(Tokenizer(type(byte_level)(models.WordLevel({"a": 0}, unk_token="a"))), 8)


def test_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import models

    byte_level = byte_level_bpe(models.BPE(vocab={"a": 0, "b": 1}, merges=[]), "qwen35")
    cache = AutomatonCache(Tokenizer(byte_level), 8, (7,))
    first = cache.compile(StructuredOutputs(choice=["a"]))
    assert first is not None and first is cache.compile(StructuredOutputs(choice=("a",)))
    assert first.allowed(0).tolist() == [True] + [False] * 7 and first.allowed(1).tolist() == [False] * 7 + [True]
    with pytest.raises(ValueError, match="prompt 3: structured output choice .*cannot spell"):
        cache.compile(StructuredOutputs(choice=["z"]), "prompt 3")
    monkeypatch.setattr("mtpjax.text.structured_outputs.MAX_CACHED", 1)
    cache.compile(StructuredOutputs(choice=["b"]))
    assert cache.compile(StructuredOutputs(choice=["a"])) is not first
    with pytest.raises(ValueError, match="need a tokenizer"):
        AutomatonCache(None, 8, (7,)).compile(StructuredOutputs(choice=["a"]))
    with pytest.raises(ValueError, match="end-of-text"):
        AutomatonCache(Tokenizer(byte_level), 8, ()).compile(StructuredOutputs(choice=["a"]))


def test_the_worker_imports_nothing_of_the_package() -> None:
    """It starts in a fraction of a second."""
    code = f"import runpy, sys; runpy.run_path({str(regex_dfa._WORKER)!r}); print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'mtpjax" not in modules and "'jax'" not in modules and "'numpy'" not in modules
