"""`LLM.chat` and `LLM.chat_prompt`: conversations in place of prompts. Names follow vLLM's offline API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtpjax.argument_names import names_arguments
from mtpjax.outputs import RequestOutput
from mtpjax.sampling_params import SamplingParams
from mtpjax.text.chat_template import ChatTemplate
from mtpjax.text.messages import Message
from mtpjax.text.tokenizer import Tokenizer


class ChatMethods:
    """The methods of `LLM` for conversations."""

    tokenizer: Tokenizer | None
    generate: Callable[..., list[RequestOutput]]

    @names_arguments
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, a list of messages `{"role": "user", "content": "..."}`, or each of several.

        An output has the thought (`reasoning`), the answer (`content`) and the `tool_calls` apart;
        `output.to_message()` is the assistant's message for the next turn.

        Args:
            messages: one conversation or several.
            sampling_params, on_tokens: as for `generate`.
            tools, chat_template, chat_template_kwargs, add_generation_prompt: as for `chat_prompt`.

        Raises:
            ValueError: as `generate` and `chat_prompt`.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self.chat_prompt(
                conversation,
                tools=tools,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
                add_generation_prompt=add_generation_prompt,
            )
            for conversation in conversations
        ]
        outputs = self.generate(prompts, sampling_params, on_tokens=on_tokens)
        return [output.with_tools(tools) for output in outputs]

    @names_arguments
    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt that `chat` makes of one conversation.

        Args:
            messages: of the conversation. `mtpjax.text.messages.normalize_messages` says what they may have.
            tools: descriptions of functions that the model may call, as the OpenAI API has them.
            chat_template: the text of a template in Jinja, in place of the checkpoint's own.
            chat_template_kwargs: other variables of the template, for example `{"enable_thinking": False}`.
            add_generation_prompt: end with the opening of the assistant's next message.

        Raises:
            ValueError: the checkpoint has no chat template, or the template refuses the conversation, or a message
                has a form or a part that a text model cannot read; names the message and the part.

        Warns:
            UserWarning: a key of a message, or one of `chat_template_kwargs`, that the template does not read.
        """
        own = self.tokenizer.chat_template if self.tokenizer else None
        if chat_template is not None:
            own = ChatTemplate(chat_template, "chat_template", own.special_tokens if own else {})
        if own is None:
            raise ValueError(
                "the checkpoint has no chat template (chat_template.jinja, or in tokenizer_config.json); "
                "give chat_template= or use generate"
            )
        return own.render(
            messages,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
        )
