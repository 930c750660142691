"""Conversations of every kind that people bring, for the tests of chat templates and of parsing outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "text" / "templates"
TEMPLATE_NAMES = tuple(
    f"qwen3_{version}{variant}" for version in ("5_nothink", "5_think", "6", "8") for variant in ("", "_training")
)
PROMPTS = Path(__file__).parent.parent / "golden" / "prompts.json.gz"


def template_text(name: str) -> str:
    """Read one of the templates."""
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Conversation:
    """A conversation and its options.

    Attributes:
        messages: as a user of ours gives them.
        tools, kwargs, add_generation_prompt: options of the template.
        plain: the same messages in the form that transformers takes, written by hand, where that is another one.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    plain: list[dict[str, Any]] | None = None


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    """Make a message."""
    return {"role": role, "content": content, **more}


def user(content: Any) -> dict[str, Any]:
    """Make a user's message."""
    return message("user", content)


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    """Make a tool call as the OpenAI API has it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def tool(name: str, required: list[str], **properties: Any) -> dict[str, Any]:
    """Make a tool's description."""
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


MUL = tool("mul", ["a", "b"], a={"type": "integer"}, b={"type": "number"})
NOW = tool("now", [])
SAVE = tool(
    "save",
    ["text"],
    text={"type": "string", "description": "Größe < 3 & “Zitat”"},
    lines={"type": "array", "items": {"type": "string"}},
    options={"type": "object"},
    force={"type": "boolean"},
    limit={"anyOf": [{"type": "integer"}, {"type": "null"}]},
    ratio={"type": ["number", "null"]},
    mode={"enum": ["new", "append"]},
)
TOOLS = [MUL, NOW, SAVE]
CODE = "def f(x):\n    return x < 3 and '</b>'  # <parameter=x>\n\n"
SAVED = {
    "text": CODE,
    "lines": ["a", "ü", "3"],
    "options": {"deep": {"n": None, "on": True}, "list": [1, 2.5, "x"]},
    "force": False,
    "limit": None,
    "ratio": 0.5,
    "mode": "append",
}

CONVERSATIONS: dict[str, Conversation] = {
    "hello": Conversation([user("Hello!")]),
    "system, no thinking": Conversation(
        [message("system", " Be brief. "), user("Why?")], kwargs={"enable_thinking": False}
    ),
    "system, thinking": Conversation([message("system", "Be brief."), user("Why?")], kwargs={"enable_thinking": True}),
    "several turns": Conversation(
        [user("One?"), message("assistant", "1."), user("Two?"), message("assistant", "2."), user("Three?")]
    ),
    "reasoning_content kept": Conversation(
        [user("One?"), message("assistant", "1.", reasoning_content="\nSo 1.\n"), user("Two?")],
        kwargs={"preserve_thinking": True},
    ),
    "reasoning, not kept": Conversation(
        [user("One?"), message("assistant", "1.", reasoning="So 1."), user("Two?")],
        kwargs={"preserve_thinking": False},
    ),
    "reasoning, low effort": Conversation(
        [user("One?"), message("assistant", "1.", reasoning="So 1."), user("Two?")],
        kwargs={"reasoning_effort": "low"},
    ),
    "raw text of an output as history": Conversation(
        [user("One?"), message("assistant", "plan\n</think>\n\nHi"), user("Two?")],
        plain=[user("One?"), message("assistant", "Hi", reasoning_content="plan"), user("Two?")],
    ),
    "raw text with both marks": Conversation(
        [user("One?"), message("assistant", "<think>\nplan\n</think>\n\nHi"), user("Two?")],
        kwargs={"preserve_thinking": True},
        plain=[user("One?"), message("assistant", "Hi", reasoning_content="plan"), user("Two?")],
    ),
    "tools": Conversation([user("What is 3 times 4?")], tools=TOOLS),
    "tools and system": Conversation(
        [message("system", "Use tools."), user("3 * 4?")],
        tools=[MUL],
        kwargs={"reasoning_effort": "low", "enable_thinking": True},
    ),
    "arguments as a JSON text": Conversation(
        [
            user("3 * 4?"),
            message("assistant", None, tool_calls=[call("mul", '{"a": 3, "b": 4}', id="call_1")]),
            message("tool", "12", tool_call_id="call_1", name="mul"),
        ],
        tools=TOOLS,
        plain=[
            user("3 * 4?"),
            message("assistant", None, tool_calls=[call("mul", {"a": 3, "b": 4}, id="call_1")]),
            message("tool", "12", tool_call_id="call_1"),
        ],
    ),
    "no arguments, no result": Conversation(
        [
            user("What time is it?"),
            message("assistant", "I look.", tool_calls=[call("now", ""), call("now", None), call("now", "{}")]),
            message("tool", None),
            message("tool", ""),
            message("tool", "noon"),
        ],
        tools=TOOLS,
        plain=[
            user("What time is it?"),
            message("assistant", "I look.", tool_calls=[call("now", {}), call("now", {}), call("now", {})]),
            message("tool", ""),
            message("tool", ""),
            message("tool", "noon"),
        ],
    ),
    "parallel calls, results as objects": Conversation(
        [
            user("Save it and 3 * 4.5"),
            message("assistant", "", tool_calls=[call("save", SAVED), call("mul", {"a": 3, "b": 4.5})]),
            message("tool", {"ok": True, "path": "ä.txt"}),
            message("tool", [13.5, None]),
        ],
        tools=TOOLS,
        plain=[
            user("Save it and 3 * 4.5"),
            message("assistant", "", tool_calls=[call("save", SAVED), call("mul", {"a": 3, "b": 4.5})]),
            message("tool", '{"ok": true, "path": "ä.txt"}'),
            message("tool", "[13.5, null]"),
        ],
    ),
    "reasoning between calls": Conversation(
        [
            user("(3 * 4) * 5?"),
            message("assistant", None, reasoning="First 3 * 4.", tool_calls=[call("mul", {"a": 3, "b": 4})]),
            message("tool", "12"),
            message("assistant", "Now 12 * 5.", reasoning="Then 12 * 5.", tool_calls=[call("mul", {"a": 12, "b": 5})]),
            message("tool", "60"),
        ],
        tools=[MUL],
    ),
    "an agent's whole run": Conversation(
        [
            message("system", "You are an agent."),
            user("(3 * 4) * 5?"),
            message("assistant", None, reasoning="First.", tool_calls=[call("mul", {"a": 3, "b": 4})]),
            message("tool", "12"),
            message("assistant", "Next.", reasoning="Second.", tool_calls=[call("mul", {"a": 12, "b": 5})]),
            message("tool", "60"),
            message("assistant", "It is 60.", reasoning="Done."),
            user("Thanks. And times 2?"),
            message("assistant", "120.", reasoning="60 * 2 = 120."),
        ],
        tools=TOOLS,
        kwargs={"preserve_thinking": True, "reasoning_effort": "medium"},
        add_generation_prompt=False,
    ),
    "parts of texts": Conversation(
        [
            message("system", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]),
            user([{"type": "text", "text": "What"}, {"type": "text", "text": " is it?\n"}, {"text": "Say."}]),
        ]
    ),
    "white space and signs": Conversation(
        [user("  <b>\"A\" & 'B'</b> \n\n"), message("assistant", "\n{{ x }} {% y %}\n"), user("日本語 🙂 <|im_end|>")]
    ),
    "a user who sends a tool's answer": Conversation(
        [user("3 * 4?"), message("assistant", "mul"), user("<tool_response>\n12\n</tool_response>")]
    ),
    "an assistant who only thinks": Conversation(
        [user("One?"), {"role": "assistant", "reasoning_content": "Hm."}, user("And?")],
        kwargs={"preserve_thinking": True},
    ),
    "an assistant who says nothing": Conversation(
        [user("One?"), message("assistant", None, tool_calls=None, reasoning=None), user("And?")]
    ),
    "no thinking, after thoughts": Conversation(
        [user("One?"), message("assistant", "1.", reasoning="So 1."), user("Two?"), message("assistant", "2.")],
        kwargs={"enable_thinking": False},
        add_generation_prompt=False,
    ),
    # The templates refuse these.
    "developer": Conversation([message("developer", "Be brief."), user("Why?")]),
    "two system messages": Conversation([message("system", "A."), user("Why?"), message("system", "B."), user("Why?")]),
    "system only": Conversation([message("system", "Be brief.")]),
    "high effort": Conversation([user("Why?")], kwargs={"reasoning_effort": "high"}),
}
