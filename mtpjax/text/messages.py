"""Messages of a conversation as people have them, brought into the one form that chat templates read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, with the other keys of the OpenAI API; see `normalize_messages`."""

EXAMPLE = '{"role": "user", "content": "Hello"}'
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
# What a part of another kind is, by its type or by a key that it has.
MEDIA = {
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "a video",
    "video_url": "a video",
    "input_video": "a video",
    "file": "a file",
    "input_file": "a file",
}
# Keys of a message that need no effect, and why.
HARMLESS = {
    "tool_call_id": "templates show results in the order of the messages",
    "id": "a name for programs",
    "index": "a name for programs",
    "type": "the Responses API says 'message' here",
    "weight": "a setting for training",
    "annotations": "marks in the text, which is there",
    "status": "a setting of the Responses API",
}
KEYS = ("role", "content", "tool_calls", *REASONING_NAMES)
# Keys of a part of a content; the last three are marks for services.
PART_KEYS = {"type", "text", "refusal", *MEDIA, "annotations", "cache_control", "detail"}
CALL_KEYS = {"function", "name", "arguments", "id", "type", "index"}


def normalize_messages(messages: Any, template_names: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Return copies of the messages in the form that chat templates read.

    * Keys whose value is None are absent. Content None is an empty text.
    * `reasoning`, `thinking` and `reasoning_content` are one thing, which is given as `reasoning_content`.
    * An assistant's content that still has its thought before `</think>`, without `reasoning_content`, is split, as the
      templates of Qwen3.5 and 3.6 do themselves and that of 3.8 does not.
    * Arguments of tool calls that are a JSON text become the object; an empty text becomes {}.
    * Parts of texts are joined. The content of a tool's answer that is neither text nor parts becomes JSON.

    Args:
        messages: of one conversation.
        template_names: names that the template reads. A key of a message that is not among them, and not known to be
            harmless, is named in a warning. None: no warnings.

    Raises:
        ValueError: names the number of the message, and of its part or tool call, from 0: another form, or an image,
            audio, video or file, which a text model cannot read.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"a conversation is a list of messages like {EXAMPLE}, and not empty")
    normal = [_normalize(number, message) for number, message in enumerate(messages)]
    if template_names is not None:
        _warn_of_unread_keys(normal, template_names)
        for message in normal:
            if "reasoning_content" in template_names:
                _split_thought(message)
    return normal


def _normalize(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} is {_short(message)}; expected an object like {EXAMPLE}")
    role, where = message["role"], f"message {number}"
    normal = {key: value for key, value in message.items() if value is not None}
    if normal.get("function_call"):
        raise ValueError(f"{where} has the old key 'function_call'; give 'tool_calls', a list of calls")
    if "tool_calls" in normal:
        normal["tool_calls"] = _tool_calls(where, normal["tool_calls"])
        if not normal["tool_calls"]:
            del normal["tool_calls"]
    given = [name for name in REASONING_NAMES if name in normal]
    if given:
        reasoning = normal[given[0]]
        if not isinstance(reasoning, str):
            raise ValueError(f"{where} has {given[0]!r} of type {type(reasoning).__name__}; expected a text")
        for name in given[1:]:
            if normal.pop(name) != reasoning:
                raise ValueError(f"{where} has {given[0]!r} and {name!r}, which differ; give one of them")
        normal.pop(given[0])
        normal["reasoning_content"] = reasoning
    if "content" not in message and not (role == "assistant" and ("tool_calls" in normal or given)):
        alike = get_close_matches("content", normal, 1, 0.7)
        hint = f"; did you mean 'content' by {alike[0]!r}?" if alike else f"; expected {EXAMPLE}"
        raise ValueError(f"{where} has no 'content'{hint}")
    normal["content"] = _content(where, role, normal.get("content"))
    return normal


def _content(where: str, role: str, content: Any) -> str:
    """The text of a message's content."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = isinstance(content, list | tuple) and all(isinstance(p, str) or _part_type(p) for p in content)
    if parts:
        return "".join(_part_text(f"{where}, part {i}", part) for i, part in enumerate(content))
    if role == "tool":
        try:
            return json.dumps(content, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} has a 'content' that cannot be written as JSON: {error}") from None
    if isinstance(content, list | tuple):
        bad = next(i for i, part in enumerate(content) if not isinstance(part, str) and not _part_type(part))
        raise ValueError(
            f'{where}, part {bad} is {_short(content[bad])}; expected an object like {{"type": "text", "text": "Hi"}}'
        )
    raise ValueError(f"{where} has a 'content' of type {type(content).__name__}; expected a text or a list of parts")


def _part_type(part: Any) -> str | None:
    """What kind of part a mapping is: its type, or the key that says so; None if nothing does."""
    if not isinstance(part, Mapping):
        return None
    if isinstance(part.get("type"), str):
        return part["type"]
    return next((key for key in (*MEDIA, "text", "refusal") if part.get(key) is not None), None)


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = _part_type(part)
    media = kind if kind in MEDIA else next((key for key in MEDIA if part.get(key) is not None), None)
    if media is not None:
        raise ValueError(f"{where} is {MEDIA[media]} ({media!r}), which a text model cannot read; leave it out")
    if unknown := sorted(key for key in set(part) - PART_KEYS if part[key]):
        warnings.warn(f"parts of messages have a key {unknown[0]!r}, which has no effect", stacklevel=6)
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
        raise ValueError(f'{where} is {_short(part)}; expected an object like {{"type": "text", "text": "Hi"}}')
    return text


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where} has 'tool_calls' of type {type(calls).__name__}; expected a list of calls")
    return [_tool_call(f"{where}, tool call {i}", call) for i, call in enumerate(calls)]


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    """A call as `{"type": "function", "function": {"name": ..., "arguments": {...}}}` with arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f"{where} is {_short(call)}; expected "
            '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}'
        )
    if unknown := sorted((set(call) | set(function)) - CALL_KEYS):
        warnings.warn(f"tool calls have a key {unknown[0]!r}, which has no effect", stacklevel=6)
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        arguments = _parse_arguments(where, arguments or "")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where} has 'arguments' of type {type(arguments).__name__}; expected an object")
    rest = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **rest, "function": {"name": function["name"], "arguments": dict(arguments)}}


def _parse_arguments(where: str, text: str) -> Any:
    """The object that a JSON text of arguments describes; no text and null are no arguments."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} has 'arguments' that are not JSON ({error}): {_short(text)}") from None
    return {} if value is None else value


def _split_thought(message: dict[str, Any]) -> None:
    """Move the thought of an assistant's raw text into `reasoning_content`; the rule is that of Qwen's templates."""
    content = message["content"]
    if message["role"] != "assistant" or "reasoning_content" in message or "</think>" not in content:
        return
    thought, _, _ = content.partition("</think>")
    message["reasoning_content"] = thought.rstrip("\n").split("<think>")[-1].lstrip("\n")
    message["content"] = content.split("</think>")[-1].lstrip("\n")


def _warn_of_unread_keys(messages: Sequence[Message], template_names: Collection[str]) -> None:
    for message in messages:
        for key in message:
            named_by_call = key == "name" and message["role"] == "tool"  # the call before it names the function
            if key in ("role", "content") or key in template_names or key in HARMLESS or named_by_call:
                continue
            if not message[key]:  # an empty list or text says nothing
                continue
            alike = get_close_matches(key, KEYS, 1, 0.8) if key not in KEYS else []
            hint = f" (did you mean {alike[0]!r}?)" if alike else ""
            warnings.warn(
                f"messages have a key {key!r} that the chat template does not read; it has no effect{hint}",
                stacklevel=4,
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
