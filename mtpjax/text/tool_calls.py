"""Tool calls in a model's text: Qwen's XML form and the JSON form, typed by the JSON schemas of the tools.

The XML form is what the templates of Qwen3.5 to 3.8 ask for, the JSON form that of Qwen3 and Hermes:

    <tool_call>                                    <tool_call>
    <function=add>                                 {"name": "add", "arguments": {"a": 3}}
    <parameter=a>                                  </tool_call>
    3
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END, _PARAMETER_END = "<function=", "</function>", "</parameter>"
_FUNCTION_NAME = re.compile(r"\s*<function=([^<>\n]+)>")
_PARAMETER_NAME = re.compile(r"\s*<parameter=([^<>\n]+)>\n?")
_END_OF_FUNCTION = re.compile(r"\s*</function>")
_END_OF_CALL = re.compile(r"\s*</tool_call>")
_AFTER_A_VALUE = re.compile(r"\s*(?:<parameter=[^<>\n]+>|</function>)")
_PARAMETER_TAG = re.compile(r"<parameter=[^<>\n]+>|</parameter>")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
MAX_DIGITS = 4000  # of a whole number; Python reads no longer ones


@dataclass(frozen=True)
class ToolCall:
    """One call of a function that the model asks for.

    Attributes:
        name: of the function.
        arguments: by name. From the XML form they are texts, until a schema says what they are.
        id: "call_" and 24 hexadecimal digits; the same request gives the same.
        text: the model's own text of the call.
        is_xml: whether it was in the XML form.
    """

    name: str
    arguments: dict[str, Any]
    id: str
    text: str = field(repr=False, default="")
    is_xml: bool = field(repr=False, default=False)

    def to_openai(self) -> dict[str, Any]:
        """Return the call as the OpenAI API has it; its arguments are a JSON text."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


def parse_tool_calls(text: str, seed: str = "") -> tuple[str, list[ToolCall]]:
    """Return what is left of a text without its tool calls, and the calls.

    What is not a whole, well-formed call stays in the text: a call that was cut off, JSON that cannot be read, a call
    without a name. A `</parameter>` or `</tool_call>` that the model forgot is forgiven.

    Args:
        text: of the model, without its thought.
        seed: part of the ids of the calls, which tells one request from another.
    """
    rest: list[str] = []
    calls: list[ToolCall] = []
    position = 0
    while (start := _next_call(text, position)) >= 0:
        found = _call_at(text, start)
        if found is None:
            end = start + 1
            rest.append(text[position:end])
        else:
            name, arguments, end, is_xml = found
            rest.append(text[position:start])
            digest = hashlib.sha256(f"{seed}\0{len(calls)}\0{text[start:end]}".encode(errors="replace")).hexdigest()
            calls.append(ToolCall(name, arguments, f"call_{digest[:24]}", text[start:end], is_xml))
        position = end
    rest.append(text[position:])
    return "".join(rest) if not calls else "".join(rest).strip(), calls


def _next_call(text: str, position: int) -> int:
    """Where the next call may begin, or -1; models leave out `<tool_call>` now and then."""
    found = [i for tag in (OPEN, _FUNCTION) if (i := text.find(tag, position)) >= 0]
    return min(found, default=-1)


def _call_at(text: str, start: int) -> tuple[str, dict[str, Any], int, bool] | None:
    """The name, arguments, end and form (True: XML) of the call that begins at `start`, or None."""
    inside = start + len(OPEN) if text.startswith(OPEN, start) else start
    if match := _FUNCTION_NAME.match(text, inside):
        if text.find(_FUNCTION_END, match.end()) < 0:  # soon said of a text that repeats beginnings without an end
            return None
        found = _parameters(text, match.end(), nested=True) or _parameters(text, match.end(), nested=False)
        if found is None:
            return None
        closing = _END_OF_CALL.match(text, found[1])
        return match[1].strip(), found[0], closing.end() if closing else found[1], True
    begin = len(text) - len(text[inside:].lstrip())
    try:
        call, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    closing = _END_OF_CALL.match(text, end)
    if not isinstance(arguments, dict) or not _is_text_value(call) or (closing is None and text[end:].strip()):
        return None
    return call["name"], arguments, closing.end() if closing else end, False


def _parameters(text: str, position: int, nested: bool) -> tuple[dict[str, Any], int] | None:
    """The parameters up to `</function>`, and where that ends; None if it is missing.

    Args:
        nested: a value may hold whole parameters of its own, as a text about tool calls does.
    """
    arguments: dict[str, Any] = {}
    while match := _PARAMETER_NAME.match(text, position):
        end = _end_of_value(text, match.end(), nested)
        if end is None:
            return None
        value = text[match.end() : end]
        arguments[match[1].strip()] = value[:-1] if value.endswith("\n") else value
        position = end + len(_PARAMETER_END) if text.startswith(_PARAMETER_END, end) else end
    closing = _END_OF_FUNCTION.match(text, position)
    return (arguments, closing.end()) if closing else None


def _end_of_value(text: str, position: int, nested: bool) -> int | None:
    """Where a value ends: at the `</parameter>` that a parameter or `</function>` follows, or at these themselves."""
    depth = 1
    for tag in _PARAMETER_TAG.finditer(text, position):
        closing = tag[0] == _PARAMETER_END
        if nested:
            depth += -1 if closing else 1
            if depth == 0 and _AFTER_A_VALUE.match(text, tag.end()):
                return tag.start()
        elif closing and _AFTER_A_VALUE.match(text, tag.end()):
            return tag.start()
        elif not closing and text[tag.start() - 1] == "\n":
            return tag.start()
    end = text.find(_FUNCTION_END, position)
    return None if nested or end < 0 else end


def type_arguments(calls: Sequence[ToolCall], tools: Sequence[Mapping[str, Any]] | None) -> list[ToolCall]:
    """Return the calls with the texts of XML arguments converted to what the schemas of their tools say.

    A text that cannot be converted, and one without a schema, stays a text.
    """
    schemas = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        schemas[function.get("name")] = function.get("parameters")
    return [
        replace(call, arguments=_typed(call.arguments, schemas.get(call.name))) if call.is_xml else call
        for call in calls
    ]


def _typed(arguments: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    if not isinstance(schema, Mapping) or not isinstance(properties := schema.get("properties"), Mapping):
        return dict(arguments)
    return {
        name: _convert(value, _types(properties.get(name), schema)) if isinstance(value, str) else value
        for name, value in arguments.items()
    }


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> list[str]:
    """The names of JSON types that a schema allows, in its order; empty if it does not say."""
    if not isinstance(schema, Mapping) or depth > 16:
        return []
    if isinstance(reference := schema.get("$ref"), str):
        target: Any = root
        for key in reference.removeprefix("#").strip("/").split("/"):
            target = target.get(key) if isinstance(target, Mapping) else None
        return _types(target, root, depth + 1)
    kind = schema.get("type")
    if kind is not None:
        return [str(one).strip().lower() for one in (kind if isinstance(kind, list) else [kind])]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list):
            return [name for option in options for name in _types(option, root, depth + 1)]
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    return list(dict.fromkeys(_json_type(value) for value in values))


def _json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "integer", float: "number", dict: "object", list: "array", type(None): "null"}
    return names.get(type(value), "string")


def _convert(text: str, types: Sequence[str]) -> Any:
    """The value that a text stands for under the first of the types that fits; the text itself if none does.

    Spellings of types and values beyond JSON's are those that vLLM's parser `qwen3_coder` takes: the templates of
    Qwen3.5 write None, True and False as Python does.
    """
    lower = text.strip().lower()
    no_text = bool(types) and not any(_is_text(name) for name in types)
    if lower in ("null", "none") and ("null" in types or no_text):
        return None
    for name in types:
        if _is_text(name):
            return text
        if name.startswith(("int", "uint", "long", "short", "unsigned")):
            if _WHOLE_NUMBER.fullmatch(text.strip()) and len(text) < MAX_DIGITS:
                return int(text)
        elif name.startswith(("num", "float", "double")):
            try:
                value = int(text) if _WHOLE_NUMBER.fullmatch(text.strip()) else float(text)
            except ValueError:
                continue
            if abs(value) < float("inf"):  # JSON has neither infinity nor NaN
                return value
        elif name in ("boolean", "bool", "binary"):
            if lower in ("true", "false"):
                return lower == "true"
        elif name != "null":
            value = _container(text)
            if value is not None:
                return value
    return text


def _is_text(name: str) -> bool:
    return name in ("string", "str", "text", "varchar", "char", "enum")


def _container(text: str) -> Any:
    """The object or list that a text writes in JSON or as Python does, or None."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, tuple):
            value = list(value)
        if isinstance(value, dict | list) and _is_text_value(value):
            return value
    return None


def _is_text_value(value: Any) -> bool:
    """Whether a value can be written as JSON in UTF-8: it has no half of a surrogate pair, no set and no infinity."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return False
    return True
