"""Messages are brought into one form, or refused by number; nothing in them is lost in silence."""

import warnings
from typing import Any

import pytest

from mtpjax.text.chat_template import ChatTemplate
from mtpjax.text.messages import normalize_messages

pytestmark = pytest.mark.fast
HELLO = {"role": "user", "content": "Hello!"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def assistant(**keys: Any) -> list[dict[str, Any]]:
    return [HELLO, {"role": "assistant", **keys}]


REFUSED: list[tuple[Any, str]] = [
    (
        [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]}],
        r"message 0, part 0 is an image \('imag",
    ),
    (
        [HELLO, {"role": "user", "content": [{"text": "a"}, {"image": "x"}]}],
        r"message 1, part 1 is an image \('image'\)",
    ),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "message 0, part 0 is audio"),
    ([{"role": "user", "content": [{"video": "x", "type": "text", "text": "a"}]}], "message 0, part 0 is a video"),
    ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "message 0, part 0 is a file"),
    ([{"role": "tool", "content": [{"type": "image", "image": "x"}]}], "message 0, part 0 is an image"),
    (
        [{"role": "user", "content": [{"type": "widget"}]}],
        "message 0, part 0 is {'type': 'widget'}; expected an object",
    ),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "message 0, part 0 is"),
    ([{"role": "user", "content": ["a", 3]}], "message 0, part 1 is 3; expected an object"),
    ([{"role": "user", "content": {"text": "a"}}], "message 0 has a 'content' of type dict"),
    ([{"role": "user", "contents": "a"}], "message 0 has no 'content'; did you mean 'content' by 'contents'"),
    ([{"role": "tool", "content": {1, 2}}], "message 0 has a 'content' that cannot be written as JSON"),
    (assistant(), "message 1 has no 'content'"),
    (assistant(content="a", reasoning=3), "message 1 has 'reasoning' of type int; expected a text"),
    (assistant(content="a", reasoning="b", reasoning_content="c"), "'reasoning_content' and 'reasoning', which differ"),
    (
        assistant(content="a", function_call={"name": "f"}),
        "message 1 has the old key 'function_call'; give 'tool_calls'",
    ),
    (assistant(tool_calls={"name": "f"}), "message 1 has 'tool_calls' of type dict; expected a list of calls"),
    (assistant(tool_calls=[{"function": {"arguments": {}}}]), "message 1, tool call 0 is"),
    (
        assistant(tool_calls=[{"name": "f", "arguments": "{"}]),
        "message 1, tool call 0 has 'arguments' that are not JSON",
    ),
    (assistant(tool_calls=[{"name": "f", "arguments": "[1]"}]), "message 1, tool call 0 has 'arguments' of type list"),
    (assistant(tool_calls=[{"name": "f", "arguments": 3}]), "message 1, tool call 0 has 'arguments' of type int"),
]


@pytest.mark.parametrize(("messages", "error"), REFUSED)
def test_what_cannot_be_read_is_refused_by_number(messages: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        normalize_messages(messages)


def test_messages_of_all_kinds_become_one_form() -> None:
    """The given messages stay as they are."""
    call = {"name": "f", "arguments": '{"a": [1, null]}'}
    messages: list[Any] = [
        {
            "role": "user",
            "content": ["a", {"type": "text", "text": "b"}, {"type": "input_text", "text": "c"}],
            "name": None,
        },
        {
            "role": "assistant",
            "content": None,
            "thinking": "t",
            "tool_calls": [call, {"function": {"name": "g"}, "id": "x"}],
        },
        {"role": "tool", "content": {"é": None}, "tool_call_id": "x"},
        {"role": "tool", "content": [1, {"a": 2}]},
        {"role": "tool", "content": [{"type": "text", "text": "d"}]},
        {"role": "tool", "content": True},
        {"role": "assistant", "content": None, "tool_calls": [], "reasoning": "r", "reasoning_content": "r"},
        {"role": "assistant", "content": [], "refusal": None},
    ]
    before = repr(messages)
    assert normalize_messages(messages) == [
        {"role": "user", "content": "abc"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "t",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}},
                {"type": "function", "function": {"name": "g", "arguments": {}}, "id": "x"},
            ],
        },
        {"role": "tool", "content": '{"é": null}', "tool_call_id": "x"},
        {"role": "tool", "content": '[1, {"a": 2}]'},
        {"role": "tool", "content": "d"},
        {"role": "tool", "content": "true"},
        {"role": "assistant", "content": "", "reasoning_content": "r"},
        {"role": "assistant", "content": ""},
    ]
    assert repr(messages) == before


def render(text: str, message: dict[str, Any], **options: Any) -> str:
    return ChatTemplate(text, "there", {}).render([message], **options)


SIMPLE = "{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}{% endfor %}"


@pytest.mark.parametrize(
    ("more", "warning"),
    [
        ({"mood": "glad"}, "a key 'mood' that the chat template does not read; it has no effect"),
        ({"name": "Ann"}, "a key 'name'"),
        ({"reasoning": "Hm."}, "a key 'reasoning_content'"),
        ({"tool_calls": [{"name": "f"}]}, "a key 'tool_calls'"),
        ({"tool_call": [{"name": "f"}]}, r"a key 'tool_call' .*did you mean 'tool_calls'"),
        ({"refusal": "I cannot."}, "a key 'refusal'"),
    ],
)
def test_a_key_that_the_template_does_not_read_is_named(more: dict[str, Any], warning: str) -> None:
    with pytest.warns(UserWarning, match=warning):
        assert render(SIMPLE, {"role": "assistant", "content": " a "} | more) == "assistant: a"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        name = "reasoning_content" if "reasoning" in more else next(iter(more))
        assert render(SIMPLE + "{{ messages[0]." + name + " and '' }}", {"role": "assistant", "content": "a"} | more)
        assert render(SIMPLE, {"role": "tool", "content": "a", "tool_call_id": "x", "name": "f", "mood": None})


def test_content_none_is_no_text() -> None:
    """Jinja would write None."""
    assert render(SIMPLE, {"role": "assistant", "content": None}) == "assistant: "


def test_variables_and_tools_that_the_template_does_not_read() -> None:
    with pytest.warns(
        UserWarning, match=r"has 'enable_thinkng', which .* not read.* \(did you mean 'enable_thinking'\?"
    ):
        render(SIMPLE + "{{ enable_thinking }}", HELLO, chat_template_kwargs={"enable_thinkng": False})
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(
        ValueError, match="there: the chat template has no place for tools; the model would not see them"
    ):
        render(SIMPLE, HELLO, tools=[tool])
    assert render(SIMPLE, HELLO, tools=[]) == "user: Hello!"
    for bad, error in (("f", "tools are of type str"), ([{"name": 3}], "tool 0 is {'name': 3}; expected an object")):
        with pytest.raises(ValueError, match=error):
            render(SIMPLE + "{{ tools }}", HELLO, tools=bad)


def test_a_block_for_training_is_rendered() -> None:
    """A6: `{% generation %}`, with white space control and with what the template defines around it."""
    text = "{% set x = 'b' %}a{%- generation -%}\n {{ x }}{{ messages[0].content }} \n{%- endgeneration %}c"
    assert render(text, {"role": "user", "content": "!"}) == "ab!c"
    with pytest.raises(ValueError, match="there: the chat template is not Jinja"):
        render("{% generation %}a", HELLO)
