"""From a conversation to the text of a prompt, by the checkpoint's own chat template (in Jinja)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from checkpoints.folder import read_json_file
from mtpjax.text.messages import Message, normalize_messages

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
OLD_TEMPLATE = "chat_template.json"  # where earlier versions of transformers kept the template of a processor
TOOL = '{"type": "function", "function": {"name": "f", "description": "...", "parameters": {...}}}'


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

    @cached_property
    def names(self) -> frozenset[str]:
        """Names that the template reads: its variables, attributes of values, and constant texts (keys, roles).

        Raises:
            ValueError: the template is not Jinja.
        """
        from jinja2 import nodes

        tree = self._parsed
        attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
        constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return self.variables | attributes | constants

    @cached_property
    def variables(self) -> frozenset[str]:
        """Variables that the template takes from outside. Raises ValueError as `names` does."""
        from jinja2 import meta

        return frozenset(meta.find_undeclared_variables(self._parsed))

    @cached_property
    def _environment(self) -> Any:
        return _environment()

    @cached_property
    def _parsed(self) -> Any:
        import jinja2

        try:
            return self._environment.parse(self.text)
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.source}: the chat template is not Jinja: {error}") from None

    @cached_property
    def _compiled(self) -> Any:
        return self._environment.from_string(self.text)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt of one conversation, after `normalize_messages`.

        Args:
            messages: of the conversation.
            tools: descriptions of functions that the model may call.
            chat_template_kwargs: other variables of the template, for example `{"enable_thinking": False}`.
            add_generation_prompt: end with the opening of the assistant's next message.

        Raises:
            ValueError: the messages have another form, the template refuses them or knows no tools, or
                `chat_template_kwargs` has a variable that is an argument of its own.

        Warns:
            UserWarning: a key of a message or a variable that the template does not read.
        """
        import jinja2

        own = {"tools": check_tools(tools), "add_generation_prompt": add_generation_prompt}
        others = dict(chat_template_kwargs or {})
        if twice := sorted({"messages", *own} & others.keys()):
            raise ValueError(f"chat_template_kwargs has {twice[0]!r}, which is an argument of its own; give it there")
        normal = normalize_messages(messages, self.names)
        if tools and "tools" not in self.variables:
            raise ValueError(f"{self.source}: the chat template has no place for tools; the model would not see them")
        self._warn_of_unread(others)
        try:
            return self._compiled.render({**self.special_tokens, **others, **own, "messages": normal})
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.source}: the chat template refuses the conversation: {error}") from None
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"{self.source}: the chat template cannot read the conversation: {error!r}") from None

    def _warn_of_unread(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.variables:
                alike = get_close_matches(name, self.variables, 1, 0.7)
                hint = f" (did you mean {alike[0]!r}?)" if alike else ""
                text = (
                    f"chat_template_kwargs has {name!r}, which the chat template does not read; it has no effect{hint}"
                )
                warnings.warn(text, stacklevel=4)


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return descriptions of functions as a list, or None for none.

    Raises:
        ValueError: names the tool by its number, from 0: it is not an object with the name of a function.
    """
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools are of type {type(tools).__name__}; expected a list like [{TOOL}]")
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool {number} is {tool!r:.200}; expected an object like {TOOL}")
    return [dict(tool) for tool in tools]


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template of a checkpoint folder, or None.

    It is in chat_template.jinja, in tokenizer_config.json, or in chat_template.json; the first one counts.

    Raises:
        checkpoints.CheckpointError: names a file that cannot be read.
    """
    config_file = folder / TOKENIZER_CONFIG
    config = read_json_file(config_file) if config_file.is_file() else {}
    special_tokens = special_tokens_of(config)
    if (file := folder / TEMPLATE).is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), str(file), special_tokens)
    text = config.get("chat_template")
    if text is None and (old := folder / OLD_TEMPLATE).is_file():
        config_file, text = old, read_json_file(old).get("chat_template")
    if isinstance(text, list):  # several templates, each with a name
        by_name = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
        text = by_name.get("default")
    return ChatTemplate(text, str(config_file), special_tokens) if isinstance(text, str) else None


def special_tokens_of(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of `bos_token`, `eos_token` and `pad_token` in the content of a tokenizer_config.json."""
    names = ("bos_token", "eos_token", "pad_token")
    return {name: text for name in names if (text := _token_text(tokenizer_config.get(name)))}


def _token_text(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object with "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _environment() -> Any:
    """The Jinja environment that transformers has for chat templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Renders the body of `{% generation %}`, which marks an assistant's tokens for training."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's built-in `tojson` escapes HTML; prompts must not be escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
