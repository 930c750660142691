"""From a conversation to the text of a prompt, by the checkpoint's own chat template (in Jinja)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from checkpoints.folder import read_json_file

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, with other keys if the template reads them."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template.

    Attributes:
        text: the template.
        source: the file that it comes from, for errors.
        special_tokens: texts of special tokens that the template may name, for example `eos_token`.
    """

    text: str
    source: str
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt of one conversation.

        Args:
            messages: of the conversation.
            tools: descriptions of functions that the model may call.
            chat_template_kwargs: other variables of the template, for example `{"enable_thinking": False}`.
            add_generation_prompt: end with the opening of the assistant's next message.

        Raises:
            ValueError: the messages have another form, the template refuses them, or `chat_template_kwargs` has a
                variable that is an argument of its own.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        check_messages(messages)
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        others = dict(chat_template_kwargs or {})
        if twice := sorted(variables.keys() & others.keys()):
            raise ValueError(f"chat_template_kwargs has {twice[0]!r}, which is an argument of its own; give it there")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            return environment.from_string(self.text).render({**self.special_tokens, **others, **variables})
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.source}: the chat template refuses the conversation: {error}") from None
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.source}: the chat template cannot read the conversation: {error!r}") from None


def check_messages(messages: Any) -> None:
    """Raise ValueError that names the first message which has no role, or neither content nor tool calls."""
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
    """Return the template of a checkpoint folder: chat_template.jinja, or the one in tokenizer_config.json, or None.

    Raises:
        checkpoints.CheckpointError: names a file that cannot be read.
    """
    config_file = folder / TOKENIZER_CONFIG
    config = read_json_file(config_file) if config_file.is_file() else {}
    names = ("bos_token", "eos_token", "pad_token")
    special_tokens = {name: text for name in names if (text := _token_text(config.get(name)))}
    if (file := folder / TEMPLATE).is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file), special_tokens)
    text = config.get("chat_template")
    if isinstance(text, list):  # several templates, each with a name
        by_name = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
        text = by_name.get("default")
    return ChatTemplate(text, str(config_file), special_tokens) if isinstance(text, str) else None


def _token_text(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object with "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's built-in `tojson` escapes HTML; prompts must not be escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
