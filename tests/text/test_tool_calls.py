"""Thoughts and tool calls in a model's text, in all the ways in which models write them."""

from typing import Any

import pytest

from mtpjax.text.reasoning import Thought, split_thought, thought_state
from mtpjax.text.tool_calls import parse_tool_calls, type_arguments

pytestmark = pytest.mark.fast
CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
XML = "<tool_call>\n<function=f>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"


def block(value: str, name: str = "a") -> str:
    return f"<tool_call>\n<function=f>\n<parameter={name}>\n{value}\n</parameter>\n</function>\n</tool_call>"


WHOLE: list[tuple[str, str, list[Any]]] = [
    (XML, "", [{"a": "3"}]),
    (f"I look.\n\n{XML}\n", "I look.", [{"a": "3"}]),
    (f"{XML}\n{XML}", "", [{"a": "3"}, {"a": "3"}]),
    ("<tool_call>\n<function=f>\n</function>\n</tool_call>", "", [{}]),
    (XML.replace("\n", ""), "", [{"a": "3"}]),  # on one line
    (XML.removesuffix("\n</tool_call>"), "", [{"a": "3"}]),  # the model stopped early
    (XML.removeprefix("<tool_call>\n"), "", [{"a": "3"}]),
    (XML.replace("</parameter>\n", ""), "", [{"a": "3"}]),
    (block("1\n<parameter=b>\n2").replace("=a>", "=x>", 1), "", [{"x": "1", "b": "2"}]),  # one mark is forgotten
    (block(""), "", [{"a": ""}]),
    (block("\n  x\n\n"), "", [{"a": "\n  x\n\n"}]),  # white space of a value is its own
    (block("if a < b && c > d:\n\treturn '</b>'"), "", [{"a": "if a < b && c > d:\n\treturn '</b>'"}]),
    (block("the mark </parameter> ends it"), "", [{"a": "the mark </parameter> ends it"}]),
    (block("the mark <parameter=b> begins it"), "", [{"a": "the mark <parameter=b> begins it"}]),
    (block(f"say:\n{XML}\nso"), "", [{"a": f"say:\n{XML}\nso"}]),  # a text about tool calls
    ('<tool_call>\n{"name": "f", "arguments": {"a": [1, null]}}\n</tool_call>', "", [{"a": [1, None]}]),
    ('ok <tool_call>{"name": "f", "arguments": "{\\"a\\": 3}"}</tool_call>', "ok", [{"a": 3}]),
    ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', "", [{"a": "</tool_call>"}]),
    ('<tool_call>{"name": "f"}', "", [{}]),
]
BROKEN = [
    "no call at all, 3 < 4",
    "<tool_call>",
    "<tool_call>\n<function=f>\n<parameter=a>\n3",
    "<tool_call>\n<function=>\n</function>\n</tool_call>",
    '<tool_call>\n{"name": "f", "arguments": {"a": 3}\n</tool_call>',
    '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": "{"}\n</tool_call>',
    '<tool_call>\n{"name": "f"} and more\n</tool_call>',
    "<tool_call>\n[1]\n</tool_call>",
    '<tool_call>\n{"name": "f", "arguments": {"a": "\\ud800"}}\n</tool_call>',
    "<tool_call>\n<function=f>\n<parameter=a>\n" * 2000,
    "<tool_call>" * 2000,
    "<function=f>" * 2000,
]


@pytest.mark.parametrize(("text", "rest", "arguments"), WHOLE)
def test_calls_are_taken_out(text: str, rest: str, arguments: list[Any]) -> None:
    content, calls = parse_tool_calls(text, "seed")
    assert content == rest and [call.arguments for call in calls] == arguments
    assert all(call.name == "f" and call.text in text for call in calls)
    assert len({call.id for call in calls}) == len(calls)
    assert parse_tool_calls(text, "seed") == (content, calls)
    assert [call.id for call in parse_tool_calls(text, "other")[1]] != [call.id for call in calls]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_what_is_not_a_whole_call_stays_in_the_text(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])
    content, (call,) = parse_tool_calls(XML + text)
    assert content == text.strip() and call.arguments == {"a": "3"}


TYPED: list[tuple[Any, str, Any]] = [
    ({"type": "integer"}, "3", 3),
    ({"type": "integer"}, "-12", -12),
    ({"type": "integer"}, "3.5", "3.5"),
    ({"type": "integer"}, "None", None),
    ({"type": "number"}, "3.0", 3.0),
    ({"type": "number"}, "12345678901234567890", 12345678901234567890),
    ({"type": "number"}, "1e3", 1000.0),
    ({"type": "number"}, "many", "many"),
    ({"type": "number"}, "inf", "inf"),
    ({"type": "integer"}, "1" * 5000, "1" * 5000),
    ({"type": "object"}, '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
    ({"type": "array"}, "[1, {2}]", "[1, {2}]"),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "false", False),
    ({"type": "boolean"}, "yes", "yes"),
    ({"type": "string"}, "3", "3"),
    ({"type": "string"}, "null", "null"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["string", "null"]}, "nil", "nil"),
    ({"type": ["integer", "string"]}, "3", 3),
    ({"type": ["integer", "string"]}, "three", "three"),
    ({"type": "object"}, '{"a": [1, true]}', {"a": [1, True]}),
    ({"type": "object"}, "{'a': None}", {"a": None}),
    ({"type": "array"}, "[1, 2", "[1, 2"),
    ({"type": "array"}, "(1, 2)", [1, 2]),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "7", "7"),
    ({"enum": ["a", "b"]}, "a", "a"),
    ({"enum": [1, 2]}, "2", 2),
    ({"const": True}, "true", True),
    ({"$ref": "#/$defs/count"}, "4", 4),
    ({"$ref": "#/$defs/loop"}, "4", "4"),
    ({"$ref": "#/nowhere"}, "4", "4"),
    ({}, "4", "4"),
    ("odd", "4", "4"),
]


@pytest.mark.parametrize(("schema", "text", "value"), TYPED)
def test_texts_become_what_the_schema_says(schema: Any, text: str, value: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": schema},
        "$defs": {"count": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}},
    }
    _, calls = parse_tool_calls(block(text) + block(text, "unknown"))
    for tool in ({"name": "f", "parameters": parameters}, {"function": {"name": "f", "parameters": parameters}}):
        first, second = type_arguments(calls, [tool])
        assert first.arguments == {"a": value} and type(first.arguments["a"]) is type(value)
        assert second.arguments == {"unknown": text}
    assert [call.arguments for call in type_arguments(calls, [{"name": "g"}])] == [call.arguments for call in calls]
    _, written = parse_tool_calls('<tool_call>{"name": "f", "arguments": {"a": "3"}}</tool_call>')
    assert type_arguments(written, [{"name": "f", "parameters": parameters}]) == written  # JSON has its types already


@pytest.mark.parametrize(
    ("prompt", "text", "thought"),
    [
        (CHAT, "Hi", Thought(None, "Hi", False)),
        (CHAT, "<think>\nHm.\n</think>\n\nHi\n", Thought("Hm.", "Hi\n", False)),
        (CHAT, "Hm.\n</think>\n\nHi", Thought("Hm.", "Hi", False)),  # models that open a thought without saying so
        (CHAT, "<think>\nHm", Thought("Hm", None, True)),
        (CHAT + "<think>\n", "Hm.\n</think>\n\nHi", Thought("Hm.", "Hi", False)),
        (CHAT + "<think>\n", "\n</think>\n\nHi", Thought("", "Hi", False)),
        (CHAT + "<think>\n", "Hm.</think> and </think>", Thought("Hm.", " and </think>", False)),
        (CHAT + "<think>\n", "<think>\nHm.\n</think>\n\nHi", Thought("Hm.", "Hi", False)),
        (CHAT + "<think>\n", "Hm", Thought("Hm", None, True)),
        (CHAT + "<think>\n", "", Thought("", None, True)),
        (CHAT + "<think>\nFirst, ", "second</think>Hi", Thought("second", "Hi", False)),
        (CHAT + "<think>\n\n</think>\n\n", "Hi", Thought(None, "Hi", False)),
        (
            CHAT + "<think>\n\n</think>\n\n",
            "the mark </think> ends it",
            Thought(None, "the mark </think> ends it", False),
        ),
        ("What is <think>?\n" + CHAT, "A mark.", Thought(None, "A mark.", False)),
        ("What is <think>?", "A </think> mark.", Thought(None, "A </think> mark.", False)),
        ("Q: why?\n<think>\n", "Hm.</think>So.", Thought("Hm.", "So.", False)),
    ],
)
def test_thoughts_are_taken_apart(prompt: str, text: str, thought: Thought) -> None:
    assert split_thought(text, thought_state(prompt)) == thought
