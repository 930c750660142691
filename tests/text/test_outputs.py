"""What a user gets for a prompt: texts without half a character, marks that are special tokens, names of arguments."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from mtpjax.chat import ChatMethods
from mtpjax.engine.request import Request, RequestState
from mtpjax.outputs import RequestOutput, make_output
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.conversations import MUL, message, template_text, user

pytestmark = pytest.mark.fast
IM_END = 4095


@cache
def embedded() -> Tokenizer:
    return load_tokenizer(TINY / "tokenizer.json")


def output(tokens: list[int], stopped: bool, tokenizer: Tokenizer, prompt: Any = "Hi") -> RequestOutput:
    ids = tuple(tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
    state = RequestState(Request(0, ids, 99, 0.0, 0, (), (IM_END,)), tokens, True, stopped)
    return make_output(prompt, state, tokenizer, "real")


def byte_tokens() -> list[int]:
    """The token of each byte, by the rule that GPT-2 made for byte-level BPE: not the code that is tested."""
    kept = [b for b in range(256) if chr(b).isprintable() and b not in (0x20, 0xA0, 0xAD)]
    letters = {b: chr(b) for b in kept}
    letters |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in kept)}
    return [embedded().hf_tokenizer.token_to_id(letters[b]) for b in range(256)]


@pytest.mark.parametrize("character", ["é", "€", "🙂", "\U00010348"])
def test_a_character_that_the_limit_cut_is_left_out(character: str) -> None:
    """A49: its tokens stay. A text that a stop token ended, and the character U+FFFD itself, stay whole."""
    tokenizer, token_of = embedded(), byte_tokens()
    tokens = [token_of[b] for b in character.encode()]
    before = tokenizer.encode("Once")
    for length in range(1, len(tokens)):
        cut = before + tokens[:length]
        assert tokenizer.decode(cut) == "Once\ufffd"
        one = output(cut, False, tokenizer)
        assert (one.text, one.content, one.token_ids) == ("Once", "Once", cut)
        assert output([*cut, IM_END], True, tokenizer).text == "Once\ufffd"
    assert output(before + tokens, False, tokenizer).text == "Once" + character
    replacement = [token_of[b] for b in "\ufffd".encode()]
    assert output(before + replacement, False, tokenizer).text == "Once\ufffd"
    assert output([tokens[-1]], False, tokenizer).text == "\ufffd"  # the end of a character begins none


def test_marks_that_are_special_tokens_are_seen() -> None:
    """Qwen's own are not special; a tokenizer that makes them so hides them in `text` only."""
    base = embedded().hf_tokenizer.to_str()
    for special in (True, False):
        tokenizer = Tokenizer(type(embedded().hf_tokenizer).from_str(base))
        marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
        tokenizer.hf_tokenizer.add_tokens([AddedToken(mark, special=special) for mark in marks])
        call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
        tokens = tokenizer.encode(f"Hm.\n</think>\n\nHi {call}")
        prompt = "<|im_start|>assistant\n<think>\n"
        for given in (prompt, tokenizer.encode(prompt)):
            one = output([*tokens, IM_END], True, tokenizer, given)
            assert (one.reasoning, one.content, one.tool_calls[0].arguments) == ("Hm.", "Hi", {"a": 1})
            assert ("</think>" in str(one.text)) != special
            assert one.to_message() == {
                "role": "assistant",
                "content": "Hi",
                "reasoning_content": "Hm.",
                "tool_calls": [
                    {"id": one.tool_calls[0].id, "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
                ],
            }


class Echo(ChatMethods):
    """Answers every prompt with the same text."""

    def __init__(self, text: str) -> None:
        self.tokenizer = embedded()
        self.generate = lambda prompts, params, on_tokens: [
            output([*embedded().encode(text), IM_END], True, embedded(), prompt) for prompt in prompts
        ]


def test_chat_gives_thought_answer_and_calls_of_every_conversation() -> None:
    """A whole turn: the answer's message and the tool's answer go into the next prompt."""
    template = template_text("qwen3_6")
    call = "<tool_call>\n<function=mul>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
    llm = Echo(f"Three times.\n</think>\n\nI look.\n\n{call}")
    past = [user("3 * 4?")]
    first, second = llm.chat([past, past], tools=[MUL], chat_template=template)
    assert first == second and first.tool_calls[0].arguments == {"a": 3}
    assert (first.reasoning, first.content) == ("Three times.", "I look.")
    past += [first.to_message(), message("tool", {"product": 12})]
    prompt = llm.chat_prompt(past, tools=[MUL], chat_template=template)
    assert str(first.prompt) + str(first.text) + "<|im_end|>\n" in prompt
    assert prompt.endswith(
        '<tool_response>\n{"product": 12}\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n'
    )
    (raw,) = llm.chat(past[:1], chat_template=template)
    assert raw.tool_calls[0].arguments == {"a": "3"}


def test_an_unfinished_thought_is_said_to_be_one() -> None:
    prompt = "<|im_start|>assistant\n<think>\n"
    one = output(embedded().encode("Let me see"), False, embedded(), prompt)
    assert one.outputs[0].unfinished_thought and (one.reasoning, one.content) == ("Let me see", None)
    assert one.to_message() == {"role": "assistant", "content": "", "reasoning_content": "Let me see"}
    done = output(embedded().encode("So.</think>Yes"), False, embedded(), prompt)
    assert not done.outputs[0].unfinished_thought and (done.reasoning, done.content) == ("So.", "Yes")


def test_an_output_without_a_tokenizer_has_no_texts() -> None:
    state = RequestState(Request(0, (1,), 9, 0.0, 0), [1, 2])
    one = make_output([1], state, None, "real")
    assert (one.text, one.reasoning, one.content, one.tool_calls) == (None, None, None, ())
    assert one.with_tools([{"name": "f"}]) is one


def test_unknown_arguments_are_answered_with_the_name_that_is_alike() -> None:
    """Names that exist are taken as before; a dataclass can be copied with changes."""
    chat = ChatMethods()
    calls: list[tuple[Any, dict[str, Any], str]] = [
        (SamplingParams, {"max_token": 3}, "SamplingParams has no argument 'max_token'; did you mean 'max_tokens'"),
        (SamplingParams, {"q": 3}, "SamplingParams has no argument 'q'; it has max_tokens, temperature, top_k"),
        (LLM, {"max_num_seq": 3}, "LLM has no argument 'max_num_seq'; did you mean 'max_num_seqs'"),
        (LLM, {"tensor_parallel_size": 2}, "LLM has no argument 'tensor_parallel_size'"),
        (chat.chat, {"messages": [], "tool": 3}, "chat has no argument 'tool'; did you mean 'tools'"),
        (chat.chat_prompt, {"messages": [], "template": ""}, "did you mean 'chat_template'"),
    ]
    for function, arguments, error in calls:
        with pytest.raises(TypeError, match=error):
            function(**arguments)
    assert replace(SamplingParams(max_tokens=3), top_k=2) == SamplingParams(max_tokens=3, top_k=2)
