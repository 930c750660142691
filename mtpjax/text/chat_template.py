"""Conversations -> prompt text, through the checkpoint's own chat template (Jinja, as Hugging Face stores it)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from checkpoints.folder import read_json_file

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
Message = Mapping[str, Any]  # {"role": "user", "content": "..."} and what else the template reads


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the special tokens that it may name. `where` is its file, for messages."""

    text: str
    where: str
    tokens: Mapping[str, str]

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: Any = None, **options: Any
    ) -> str:
        """The prompt of one conversation.

        Args:
            add_generation_prompt: end with the opening of the assistant's next message.
            tools, options: handed to the template, as `enable_thinking=False`.

        Raises:
            ValueError: the messages have another form, or the template refuses them.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        check_messages(messages)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda how: datetime.now().strftime(how)}
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return environment.from_string(self.text).render(**self.tokens, **options, **given)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.where}: the chat template refuses the conversation: {error}") from None
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.where}: the chat template cannot read the conversation: {error!r}") from None


def check_messages(messages: Any) -> None:
    """Raises ValueError that names the first message which has no role, or neither content nor tool calls."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(
            'a conversation is a list of messages like {"role": "user", "content": "Hello"}, and not empty'
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'message {number} is {message!r}; expected an object like {{"role": "user", "content": "Hello"}}'
            )
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"message {number} has a 'content' of type {type(content).__name__}; expected a text")


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a checkpoint folder: chat_template.jinja, or the one in tokenizer_config.json; None without any.

    Raises checkpoints.CheckpointError that names a file which cannot be read.
    """
    config = folder / TOKENIZER_CONFIG
    names = read_json_file(config) if config.is_file() else {}
    tokens = {name: text for name in ("bos_token", "eos_token", "pad_token") if (text := _token(names.get(name)))}
    if (file := folder / TEMPLATE).is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file), tokens)
    text = names.get("chat_template")
    if isinstance(text, list):  # several, by name
        text = {each.get("name"): each.get("template") for each in text if isinstance(each, dict)}.get("default")
    return ChatTemplate(text, str(config), tokens) if isinstance(text, str) else None


def _token(given: Any) -> str | None:
    given = given.get("content") if isinstance(given, dict) else given
    return given if isinstance(given, str) else None


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
    """Jinja's own escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)
