"""Grammars in the GBNF form (that of llama.cpp and xgrammar) that do not recurse, as regular expressions.

    root   ::= "SELECT " column (", " column)* " FROM " [a-z]+
    column ::= "id" | "name"   # a comment

A rule has alternatives of sequences of "text", [characters], other rules, parentheses and `.`, each with `*`, `+`, `?`,
`{n}` or `{n,m}`. A text follows the rule `root`. A rule that leads back to itself needs a stack, which a finite
automaton has not: it is refused, by name.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)|(?P<rule>[A-Za-z_][A-Za-z0-9_-]*)|(?P<text>"(?:[^"\\\n]|\\.)*")"""
    r"""|(?P<chars>\[(?:[^\]\\\n]|\\.)*\])|(?P<repeat>[*+?]|\{\d+(?:,\d*)?\})|(?P<mark>::=|[|().])"""
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
MAX_REGEX_LENGTH = 1 << 20


def grammar_to_regex(grammar: str) -> str:
    """Return the regular expression of the texts of the rule `root`.

    Raises:
        ValueError: the grammar does not parse, has no `root`, a rule is missing or recurs, or the expression is longer
            than `MAX_REGEX_LENGTH`.
    """
    rules = _split_rules(_tokens(grammar))
    if "root" not in rules:
        raise ValueError("the grammar has no rule 'root'")
    done: dict[str, str] = {}

    def expand(name: str, open_rules: tuple[str, ...]) -> str:
        if name in open_rules:
            path = " -> ".join((*open_rules[open_rules.index(name) :], name))
            raise ValueError(f"the rule {name!r} leads back to itself ({path}); a finite automaton has no recursion")
        if name not in done:
            if name not in rules:
                raise ValueError(f"the rule {open_rules[-1]!r} uses {name!r}, which the grammar does not have")
            parts = []
            for kind, value in rules[name]:
                if kind == "rule":
                    parts.append(expand(value, (*open_rules, name)))
                elif kind == "text":
                    parts.append("(?:" + re.sub(r"([^A-Za-z0-9_])", _escaped, _unescaped(value[1:-1])) + ")")
                elif kind == "chars":
                    parts.append(_characters(value))
                else:
                    parts.append({"(": "(?:", ".": "(?s:.)"}.get(value, value))
            done[name] = "(?:" + "".join(parts) + ")"
            if len(done[name]) > MAX_REGEX_LENGTH:
                raise ValueError(f"the rule {name!r} is longer than {MAX_REGEX_LENGTH} characters when written out")
        return done[name]

    for name in rules:
        expand(name, ())
    return done["root"]


def _tokens(grammar: str) -> list[tuple[str, str]]:
    tokens, position = [], 0
    while position < len(grammar):
        found = _TOKEN.match(grammar, position)
        if found is None:
            line = grammar.count("\n", 0, position) + 1
            raise ValueError(f"line {line} of the grammar does not parse at {grammar[position : position + 20]!r}")
        position = found.end()
        if found.lastgroup != "space":
            tokens.append((str(found.lastgroup), found.group()))
    return tokens


def _split_rules(tokens: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    starts = [i - 1 for i, token in enumerate(tokens) if token == ("mark", "::=")]
    if not starts or starts[0] != 0:
        raise ValueError("a grammar begins with a rule: name ::= ...")
    rules: dict[str, list[tuple[str, str]]] = {}
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        kind, name = tokens[start]
        if kind != "rule" or name in rules:
            raise ValueError(f"{name!r} before '::=': expected the name of a rule, each once")
        rules[name] = tokens[start + 2 : end]
        if not rules[name]:
            raise ValueError(f"the rule {name!r} is empty")
    return rules


def _unescaped(text: str) -> str:
    def replace(found: re.Match[str]) -> str:
        code = found.group(1)
        return chr(int(code[1:], 16)) if code[0] in "xuU" and len(code) > 1 else _ESCAPES.get(code, code)

    return _ESCAPE.sub(replace, text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{{{ord(found.group()):x}}}"


def _characters(chars: str) -> str:
    """Rewrite [characters]: all but ranges and the first ^ stand for themselves."""
    body = chars[1:-1]
    negated = body.startswith("^")
    body = body[negated:]
    parts = _ESCAPE.split(body)  # plain text and what follows a backslash, in turn
    out = []
    for i, part in enumerate(parts):
        if i % 2:
            out.append(re.sub("(.)", _escaped, _unescaped("\\" + part), flags=re.DOTALL))
        else:
            out.append(re.sub(r"([^A-Za-z0-9_-])", _escaped, part))
    if not body:
        raise ValueError(f"{chars} has no characters")
    return f"[{'^' * negated}{''.join(out)}]"
