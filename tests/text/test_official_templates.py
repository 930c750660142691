"""The official templates: prompts are those of transformers, and outputs parse back to the conversation."""

import gzip
import hashlib
import json
import warnings
from functools import cache
from typing import Any

import pytest

from checkpoints import TINY
from mtpjax.engine.request import Request, RequestState
from mtpjax.outputs import RequestOutput, make_output
from mtpjax.text.chat_template import ChatTemplate
from mtpjax.text.messages import normalize_messages
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.conversations import (
    CONVERSATIONS,
    PROMPTS,
    SAVED,
    TEMPLATE_NAMES,
    TOOLS,
    Conversation,
    call,
    message,
    template_text,
    user,
)

pytestmark = pytest.mark.fast

# Where transformers fails on messages as our users give them, or renders what nobody wants; we normalise them first.
JSON_TEXTS = {"arguments as a JSON text", "no arguments, no result"}
OBJECTS = {"parallel calls, results as objects"}
RAW_TEXTS = {"raw text of an output as history", "raw text with both marks"}


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(template_text(name), name, {"eos_token": "<|im_end|>"})


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY / "tokenizer.json")


@cache
def golden() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(gzip.decompress(PROMPTS.read_bytes()))["prompts"]


def render(name: str, messages: list[dict[str, Any]], conversation: Conversation, generation: bool, **more: Any) -> str:
    with warnings.catch_warnings():
        # Not every template has every option.
        warnings.filterwarnings("ignore", message="chat_template_kwargs has '(preserve_thinking|reasoning_effort)'")
        return template(name).render(
            messages,
            tools=conversation.tools,
            chat_template_kwargs=conversation.kwargs | more,
            add_generation_prompt=generation,
        )


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_prompts_are_those_of_transformers(name: str) -> None:
    """Text for text, and token for token by the embedded tokenizer."""
    assert len(golden()[name]) == len(CONVERSATIONS) >= 24
    refused = 0
    for title, conversation in CONVERSATIONS.items():
        expected = golden()[name][title]
        if "refusal" in expected:
            refused += 1
            with pytest.raises(ValueError, match="refuses the conversation: ") as raised:
                render(name, conversation.messages, conversation, conversation.add_generation_prompt)
            assert str(raised.value).endswith(expected["refusal"])
            continue
        prompt = render(name, conversation.messages, conversation, conversation.add_generation_prompt)
        assert prompt == expected["prompt"], title
        ids = tokenizer().encode(prompt)
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == expected["ids"], title
    assert refused == (4 if "8" in name else 3)


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_what_transformers_makes_of_the_same_messages(name: str) -> None:
    """Only where `normalize_messages` says so is our prompt not that of transformers for the very same messages."""
    how = {title: answer["as_given"] for title, answer in golden()[name].items() if answer["as_given"] != "same"}
    raw = RAW_TEXTS if "8" in name else set()
    assert how == dict.fromkeys(JSON_TEXTS, "error") | dict.fromkeys(OBJECTS | raw, "other")


def test_the_small_models_think_only_when_asked() -> None:
    """The templates of Qwen3.5-0.8B and of 4B differ in their default."""
    hello = [user("Hello!")]
    ends = {name: template(name).render(hello)[-30:] for name in TEMPLATE_NAMES}
    assert all(end.endswith("assistant\n<think>\n") == ("nothink" not in name) for name, end in ends.items())
    assert ends["qwen3_5_nothink"].endswith("<think>\n\n</think>\n\n")


def answer(prompt: str, text: str, stopped: bool = True) -> RequestOutput:
    """What a model's text becomes that follows a prompt."""
    ids = tokenizer().encode(text)
    state = RequestState(Request(0, tuple(tokenizer().encode(prompt)), 99, 0.0, 0, (), (4095,)))
    state.tokens, state.stopped = ids + [4095] if stopped else ids, stopped
    return make_output(prompt, state, tokenizer(), "real")


def without_ids(one: dict[str, Any]) -> dict[str, Any]:
    """A message without ids of calls, and without white space that templates cut off."""
    calls = [{key: value for key, value in c.items() if key != "id"} for c in one.get("tool_calls", [])]
    texts = {key: one[key].strip() for key in ("content", "reasoning_content") if one.get(key, "").strip()}
    return {"role": one["role"]} | texts | ({"tool_calls": calls} if calls else {})


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_outputs_parse_back_to_the_conversation(name: str) -> None:
    """Each assistant turn is rendered, cut out as a model would have written it, parsed, and rendered again."""
    turns = 0
    for title, conversation in CONVERSATIONS.items():
        if "refusal" in golden()[name][title]:
            continue
        messages = normalize_messages(conversation.messages, template(name).names)
        for i, one in enumerate(messages):
            if one["role"] != "assistant":
                continue
            thinking = bool(one.get("reasoning_content"))
            more = {"enable_thinking": thinking}
            prompt = render(name, messages[:i], conversation, True, **more)
            whole = render(name, messages[: i + 1], conversation, False, **more)
            assert whole.startswith(prompt) and whole.endswith("<|im_end|>\n"), title
            text = whole[len(prompt) : -len("<|im_end|>\n")]
            output = answer(prompt, text).with_tools(conversation.tools)
            assert output.text == text and not output.outputs[0].unfinished_thought
            assert without_ids(output.to_message()) == without_ids(one), title
            again = render(name, [*messages[:i], output.to_message()], conversation, False, **more)
            assert again == whole, title
            turns += 1
    assert turns >= 20


@pytest.mark.parametrize("name", TEMPLATE_NAMES)
def test_a_thought_in_the_history_reaches_every_template(name: str) -> None:
    """S7: 3.8 takes thoughts from `reasoning_content` only, 3.5 and 3.6 out of the content, too."""
    first = [user("One?")]
    prompt = template(name).render(first, chat_template_kwargs={"enable_thinking": True})
    output = answer(prompt, "plan\n</think>\n\nHi")
    assert (output.reasoning, output.content) == ("plan", "Hi")
    kwargs = {"preserve_thinking": True} if "preserve_thinking" in template(name).variables else {}
    prompts = {
        template(name).render([*first, past, user("Two?")], chat_template_kwargs=kwargs)
        for past in (output.to_message(), message("assistant", output.text))
    }
    assert len(prompts) == 1
    for text in prompts:
        keeps = bool(kwargs) or "training" in name
        assert text.count("plan") == keeps and text.count("plan\n</think>\n\nHi") == keeps


def test_arguments_get_the_types_of_the_schemas() -> None:
    """3.5 writes None and True as Python does, 3.6 as JSON; without a schema they stay texts."""
    messages = [user("Save."), message("assistant", None, tool_calls=[call("save", SAVED)])]
    for name in TEMPLATE_NAMES:
        options: dict[str, Any] = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
        prompt = template(name).render(messages[:1], **options)
        text = template(name).render(messages, **options, add_generation_prompt=False)[len(prompt) :]
        output = answer(prompt, text.removesuffix("<|im_end|>\n"))
        (raw,), (typed,) = output.tool_calls, output.with_tools(TOOLS).tool_calls
        assert typed.arguments == SAVED and typed.arguments["force"] is False
        assert raw.arguments["ratio"] == "0.5" and raw.arguments["text"] == SAVED["text"]
        assert json.loads(typed.to_openai()["function"]["arguments"]) == SAVED
        assert output.content is None and raw.id == typed.id and raw.text.startswith("<tool_call>\n<function=save>")
