"""Chat templates: found, rendered as transformers renders them, and refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import TINY, CheckpointError
from mtpjax import LLM, SamplingParams
from mtpjax.cli.generate import main
from mtpjax.text.chat_template import ChatTemplate, find_chat_template

HELLO = [{"role": "user", "content": "Hello!"}]
# Published templates use white space control, namespace, loop controls, tojson, strings, options, nested access.
RICH = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
    {%- if message.role == "skip" %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '</tools>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = message.content[0].text %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content.strip() + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{{- ns.last }} {{ eos_token }}
"""


def rich() -> ChatTemplate:
    return ChatTemplate(RICH, "there", {"eos_token": "<|im_end|>"})


def test_a_template_may_use_whatever_published_ones_use() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": " Be <brief>. "},
        {"role": "user", "content": [{"type": "text", "text": "Hé"}]},
    ]
    text = rich().render(messages, tools=[{"name": "é<"}], chat_template_kwargs={"enable_thinking": False})
    assert text == (
        '<tools>\n{"name": "é<"}</tools>\n<|im_start|>system\nBe <brief>.<|im_end|>\n<|im_start|>user\nHé<|im_end|>\n'
        "<|im_start|>assistant\n<think>\n\n</think>\n\n1 <|im_end|>"
    )
    assert "assistant" not in rich().render(messages, add_generation_prompt=False)
    assert "think" not in rich().render(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a list of messages"),
        ("Hello", "a list of messages"),
        ({"role": "user", "content": "Hello"}, "a list of messages"),
        ([{"content": "Hello"}], "message 0 is"),
        ([*HELLO, {"role": "assistant"}], "message 1 has no 'content'"),
        ([{"role": "user", "content": 3}], "message 0 has a 'content' of type int"),
    ],
)
def test_messages_of_another_form_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rich().render(messages)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_a_variable_that_is_an_argument_is_given_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"chat_template_kwargs has '{name}', which is an argument of its own"):
        rich().render(HELLO, chat_template_kwargs={name: None})


def test_a_template_may_refuse_and_may_not_reach_out() -> None:
    with pytest.raises(ValueError, match="there: the chat template refuses the conversation: no jokes"):
        ChatTemplate("{{ raise_exception('no jokes') }}", "there", {}).render(HELLO)
    for bad in (
        "{{ 1 // 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% if %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 + 'a' }}",
    ):
        with pytest.raises(ValueError, match="there: the chat template"):
            ChatTemplate(bad, "there", {}).render(HELLO)


def find(folder: Path) -> ChatTemplate:
    template = find_chat_template(folder)
    assert template is not None
    return template


def test_templates_are_found_in_a_file_or_in_the_tokenizer_config(tmp_path: Path) -> None:
    """A file of its own goes before tokenizer_config.json, whose template may be a text or a list by name."""
    assert find_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    assert find_chat_template(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old {{ eos_token }}"}))
    assert find(tmp_path).render(HELLO) == "old <end>"
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert find(tmp_path).render(HELLO) == "plain"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": several, "eos_token": {"content": "<end>"}}))
    assert find(tmp_path).render(HELLO) == "<end>"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert find(tmp_path).render(HELLO) == "file <end>"
    config.write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: is not valid JSON"):
        find_chat_template(tmp_path)


def test_the_embedded_model_answers() -> None:
    """It answers one conversation or several. An answer ends with <|im_end|>, which its text does not show."""
    llm = LLM(max_model_len=256)
    prompt = llm.chat_prompt(HELLO)
    assert prompt == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    one = llm.chat(HELLO, SamplingParams(max_tokens=40))
    assert len(one) == 1 and one[0].prompt == prompt and one[0].finish_reason == "stop"
    assert "story" in str(one[0].text) and "<|im_end|>" not in str(one[0].text)
    sums = [{"role": "user", "content": "What is 2 plus 3?"}]
    two = llm.chat([HELLO, sums], SamplingParams(max_tokens=40))
    assert [o.token_ids for o in two] == [one[0].token_ids, llm.chat(sums, SamplingParams(max_tokens=40))[0].token_ids]
    assert one[0].content == one[0].text and one[0].reasoning is None and one[0].tool_calls == ()
    past = [*HELLO, one[0].to_message(), *sums]
    assert llm.chat_prompt(past).count(str(one[0].text)) == 1
    other = "{{ messages[0].content }}{{ tools[0].name }}{{ eos_token }}"
    assert llm.chat_prompt(HELLO, tools=[{"name": "f"}], chat_template=other) == "Hello!f<|im_end|>"
    (mine,) = llm.chat(HELLO, SamplingParams(max_tokens=1), tools=[{"name": "f"}], chat_template=other)
    assert mine.prompt == "Hello!f<|im_end|>"
    with pytest.raises(ValueError, match="Unexpected role judge"):
        llm.chat([{"role": "judge", "content": "Guilty."}])


def test_a_checkpoint_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes((TINY / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="no chat template"):
        LLM(tokenizer=tokenizer).chat(HELLO)


@pytest.mark.slow
def test_conversations_in_a_file_of_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of messages gives the text that `chat` gives; one that has a prompt too, or an odd role, is named."""
    odd = [{"role": "wizard", "content": "x"}]
    rows = [{"messages": HELLO}, {"messages": HELLO, "prompt": "Hello!"}, {"messages": "Hello!"}, {"messages": odd}]
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(
            [
                "--input",
                str(lines),
                "--output",
                str(out),
                "--max-model-len",
                "256",
                "--max-tokens",
                "12",
                "--dtype",
                "float32",
            ]
        )
        == 1
    )
    row, *bad = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert [line["id"] for line in bad] == [2, 3, 4] and all(line["error"] for line in bad)
    (answer,) = LLM(max_model_len=256, dtype="float32").chat(HELLO, SamplingParams(max_tokens=12))
    assert row["text"] == row["content"] == answer.text
    errors = capsys.readouterr().err
    for said in ("has both 'prompt' and 'messages'", "has 'messages' of type str", "Unexpected role wizard"):
        assert said in errors
