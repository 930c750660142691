"""Conversations and OpenAI batch files in `mtpjax generate`: each line has an answer in its form, or its error."""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtpjax import LLM, CompletionOutput, Metrics, RequestOutput, SamplingParams
from mtpjax.cli.generate import main
from mtpjax.cli.openai_batch import CHAT, COMPLETIONS, response_row
from mtpjax.cli.report import JobTotals
from mtpjax.text.tool_calls import ToolCall, parse_tool_calls
from tests.helpers.batch_job import rows, watch_answers
from tests.helpers.conversations import MUL

TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if tools %}{% for t in tools %}w7 {% endfor %}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}w8 {% endif %}{% if reasoning_effort %}w9{% endif %}"
)
HELLO = [{"role": "user", "content": "w1 w2"}]


def batch_line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


def chat_line(custom_id: str, **body: Any) -> dict[str, Any]:
    return batch_line(custom_id, messages=HELLO, **body)


GOOD = [
    chat_line("a", max_tokens=3),
    batch_line("b", COMPLETIONS, prompt="w3", max_completion_tokens=4, temperature=5.0, seed=8),
    chat_line("c", n=1, stop=None, logprobs=False, stream=False, response_format={"type": "text"}, user="me"),
    chat_line("d", tools=[MUL], tool_choice="auto", chat_template_kwargs={"enable_thinking": False}),
    chat_line("e", tools=[MUL], tool_choice="none", enable_thinking=False, reasoning_effort="low", top_k=3),
    batch_line("f", COMPLETIONS, prompt=[5, 6], stop_token_ids=[94], ignore_eos=True),
    chat_line("g", stop=["w1 w2 w3 w4"], logit_bias={"5": -100, "7": 1.5}, min_tokens=2, num_speculative_tokens=1),
]
PROMPTS: list[str | list[int]] = ["w1 w2 ", "w3", "w1 w2 ", "w1 w2 w7 w8 ", "w1 w2 w8 w9", [5, 6], "w1 w2 "]
BAD = [
    (chat_line("n", n=0), "n is 0"),
    (chat_line("stop", stop=[""]), "stop"),
    (chat_line("best", best_of=2), "its body has 'best_of' = 2, which is not supported; only 1 or null is"),
    (chat_line("top", top_logprobs=2), "has 'top_logprobs' without \"logprobs\": true"),
    (chat_line("tops", logprobs=True, top_logprobs="2"), "has 'top_logprobs' of type str, expected a whole number"),
    (chat_line("bias", logit_bias={"w1": 1}), "has a 'logit_bias' whose keys are not token ids"),
    (chat_line("biases", logit_bias={"1": 1, "01": 2}), "has a 'logit_bias' that names a token id twice"),
    (chat_line("bad", bad_words="w1"), "has 'bad_words' of type str, expected a list"),
    (chat_line("format", response_format={"type": "xml"}), "has a 'response_format' of type 'xml', expected 'text',"),
    (chat_line("schema", response_format={"type": "json_schema"}), "without an object 'json_schema.schema'"),
    (
        chat_line("two", guided_regex="a", structured_outputs={"regex": "b"}),
        "has 'structured_outputs' and 'guided_regex', which both constrain the text; give one of them",
    ),
    (chat_line("kind", structured_outputs={"xml": "b"}), "xml"),
    (
        chat_line("must", tools=[MUL], tool_choice="required"),
        "has 'tool_choice' = \"required\", which is not supported",
    ),
    (chat_line("odd", max_token=3), "its body has an unknown key 'max_token'; did you mean 'max_tokens'?"),
    (batch_line("mixed", COMPLETIONS, messages=HELLO), "its body has an unknown key 'messages'"),
    (batch_line("none"), "its body has no 'messages'"),
    (batch_line("several", COMPLETIONS, prompt=["w1", "w2"]), "has several prompts; give each its own line"),
    (chat_line("url") | {"url": "/v1/embeddings"}, "has the url '/v1/embeddings', expected '/v1/chat/completions' or"),
    (chat_line("get") | {"method": "GET"}, "has the method 'GET', expected 'POST'"),
    (chat_line("outer") | {"colour": 1}, "has an unknown key 'colour'"),
    ({"custom_id": "empty", "url": CHAT}, "has a 'body' of type NoneType, expected an object"),
    (chat_line("t", temperature="hot"), "temperature is 'hot'"),
    (chat_line("role") | {"body": {"messages": [{"content": "x"}]}}, "message 0 is {'content': 'x'}"),
    (
        batch_line(
            "picture", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        ),
        "message 0, part 0 is an image ('image_url'), which a text model cannot read; leave it out",
    ),
    (chat_line("a"), "the id 'a' is already that of line 1; each line needs its own"),
    ({"url": CHAT, "body": {}}, "is a line of an OpenAI batch without a 'custom_id'"),
]


def test_lines_are_answered_as_openai_answers_them(job: Callable, llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every key that is given is read
        assert job([*GOOD, *(line for line, _ in BAD)], "--chat-template", str(tmp_path / "t.jinja")) == 1
    answers = rows(tmp_path / "out.jsonl")
    params = [
        SamplingParams(max_tokens=3),
        SamplingParams(max_tokens=4, temperature=5.0, seed=8),
        *(SamplingParams(max_tokens=6, top_k=k) for k in (0, 0, 3)),
        SamplingParams(max_tokens=6, stop_token_ids=(94,), ignore_eos=True),
        SamplingParams(max_tokens=6, stop="w1 w2 w3 w4", logit_bias={5: -100.0, 7: 1.5}, min_tokens=2),
    ]
    for line, answer, output in zip(GOOD, answers, llm.generate(PROMPTS, params), strict=False):
        assert answer.keys() == {"id", "custom_id", "response", "error"} and answer["error"] is None
        assert answer["custom_id"] == line["custom_id"] and answer["response"]["status_code"] == 200
        body = answer["response"]["body"]
        (choice,) = body["choices"]
        text = choice["text"] if line["url"] == COMPLETIONS else choice["message"]["content"]
        assert (text, choice["finish_reason"], body["model"]) == (output.text, output.finish_reason, "m")
        num_prompt, num_new = len(output.prompt_token_ids), len(output.token_ids)
        usage = {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
        assert body["usage"] == usage
        assert body["object"] == ("text_completion" if line["url"] == COMPLETIONS else "chat.completion")
    for (line, message), answer in zip(BAD, answers[len(GOOD) :], strict=True):
        assert answer["custom_id"] == line.get("custom_id", len(GOOD) + len(BAD))
        error = answer["response"]["body"]["error"]["message"]
        assert message in error and answer["error"]["message"] == error and answer["response"]["status_code"] == 400
    assert len({answer["id"] for answer in answers}) == len(answers)


def test_samples_and_log_probabilities_have_openais_form(job: Callable, llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    chat = chat_line("a", n=2, temperature=3.0, logprobs=True, top_logprobs=2, max_tokens=3)
    text = batch_line("b", COMPLETIONS, prompt="w3", logprobs=1, max_tokens=3)
    plain = chat_line("c", logprobs=True, max_tokens=3)
    assert job([chat, text, plain], "--ignore-eos", "--chat-template", str(tmp_path / "t.jinja")) == 0
    first, second, third = (row["response"]["body"] for row in rows(tmp_path / "out.jsonl"))
    params = SamplingParams(n=2, temperature=3.0, logprobs=2, max_tokens=3, seed=0, ignore_eos=True)
    (want,) = llm.generate("w1 w2 ", params)
    assert [choice["index"] for choice in first["choices"]] == [0, 1]
    assert first["usage"]["completion_tokens"] == 6
    for choice, one in zip(first["choices"], want.outputs, strict=True):
        assert choice["message"]["content"] == one.text and one.logprobs is not None
        for entry, token, logprobs in zip(choice["logprobs"]["content"], one.token_ids, one.logprobs, strict=True):
            assert (entry["token"], entry["logprob"]) == (logprobs[token].decoded_token, logprobs[token].logprob)
            assert entry["bytes"] == list(entry["token"].encode())
            best = sorted((one.logprob for one in logprobs.values()), reverse=True)[:2]
            assert [top["logprob"] for top in entry["top_logprobs"]] == best
    logprobs = second["choices"][0]["logprobs"]
    assert [len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [3] * 4
    for token, logprob, top in zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[token] == logprob
    assert [entry["top_logprobs"] for entry in third["choices"][0]["logprobs"]["content"]] == [[]] * 3


def test_a_resumed_batch_answers_what_is_missing_and_checks_errors_anew(
    job: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    options = ("--chat-template", str(tmp_path / "t.jinja"))
    lines = [GOOD[0], BAD[0][0], *GOOD[1:]]

    def stop(number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watch_answers(patch, stop)
        assert job(lines, *options) == 130
    assert "stopped; 3 answers are in" in capsys.readouterr().err
    changed = [chat_line("a", max_tokens=2), *lines[1:]]
    if any(row["custom_id"] == "a" for row in rows(tmp_path / "out.jsonl.part")):
        assert job(changed, "--resume", *options) == 2
        assert "answers another prompt under the id 'a'" in capsys.readouterr().err
    mended = [GOOD[0], chat_line("n"), *GOOD[1:]]  # the line of the error is right now
    calls: list[int] = []
    with monkeypatch.context() as patch:
        watch_answers(patch, calls.append)
        assert job(mended, "--resume", *options) == 0
    assert len(calls) == len(mended) - 3
    answers = rows(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in answers] == [line["custom_id"] for line in mended]
    assert all(row["error"] is None for row in answers)


def test_options_of_the_job_and_of_its_lines(job: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line's own tools and variables go before those of the job; a misspelled variable is named."""
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    (tmp_path / "tools.json").write_text(json.dumps([MUL, MUL]))
    lines = [
        {"messages": HELLO},
        {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": True}},
        {"messages": HELLO, "tools": [MUL], "enable_thinking": True, "reasoning_effort": "low"},
        {"messages": HELLO, "tool_choice": "none"},
        {"prompt": "w5"},
        {"messages": HELLO, "chat_template_kwargs": [1]},
        {"messages": HELLO, "tools": {"name": "f"}},
        {"messages": HELLO, "tools": [{"name": 1}]},
    ]
    options = ("--chat-template", str(tmp_path / "t.jinja"), "--tools", str(tmp_path / "tools.json"))
    more = ("--no-enable-thinking", "--chat-template-kwargs", '{"enable_thinkin": 1}')
    with pytest.warns(UserWarning, match=r"'enable_thinkin', which .* not read.*did you mean 'enable_thinking'"):
        assert job(lines, *options, *more) == 1
    answers = rows(tmp_path / "out.jsonl")
    prompts = ["w1 w2 w7 w7 w8 ", "w1 w2 w7 w7 ", "w1 w2 w7 w9", "w1 w2 w8 ", "w5"]
    assert [row["prompt"] for row in answers[:5]] == prompts
    assert [("content" in row, row.get("unfinished_thought")) for row in answers[3:5]] == [(True, False), (False, None)]
    assert answers[0]["content"] == answers[0]["text"] and answers[0]["tool_calls"] == []
    for row, message in zip(answers[5:], ("of type list, expected an object", "type dict", "tool 0 is"), strict=True):
        assert message in row["error"]
    for bad in (("--tools", "nowhere.json"), ("--chat-template-kwargs", "[1]"), ("--chat-template", "nowhere")):
        with pytest.raises(SystemExit):
            main([*bad])
        assert f"argument {bad[0]}" in capsys.readouterr().err


def test_arguments_of_calls_get_the_types_of_the_lines_tools(
    job: Callable, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of words writes no calls, so each answer gets one here."""
    generate_iter, one = llm.generate_iter, ToolCall("mul", {"a": "3"}, "call_1", is_xml=True)

    def with_a_call(jobs: Any, **options: Any) -> Iterator[tuple[int, RequestOutput]]:
        for index, output in generate_iter(jobs, **options):
            yield index, replace(output, outputs=[replace(output.outputs[0], tool_calls=(one,))])

    monkeypatch.setattr(llm, "generate_iter", with_a_call)
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    lines = [{"messages": HELLO, "tools": [MUL]}, {"messages": HELLO}, chat_line("c", tools=[MUL])]
    assert job(lines, "--chat-template", str(tmp_path / "t.jinja")) == 0
    typed, raw, last = rows(tmp_path / "out.jsonl")
    (message,) = (choice["message"] for choice in last["response"]["body"]["choices"])
    found = [row["tool_calls"][0]["function"]["arguments"] for row in (typed, raw, message)]
    assert found == ['{"a": 3}', '{"a": "3"}', '{"a": 3}']


def answered(text: str, reasoning: str | None = None, unfinished: bool = False, finish: str = "stop") -> RequestOutput:
    content, calls = parse_tool_calls(text)
    completion = CompletionOutput(
        0, text, [1, 2], finish, None, reasoning, None if unfinished else content or None, tuple(calls), unfinished
    )
    return RequestOutput("p", [1, 2, 3], [completion], 0, Metrics(3, 0.0, 0.0, 2, 2, 4, 0, (0, 0), 1.0))


def test_thoughts_and_tool_calls_in_an_answer() -> None:
    text = "<tool_call>\n<function=mul>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
    row = response_row("batch_req_1", "a", CHAT, "m", answered(text, "Hm.").with_tools([MUL]))
    (choice,) = row["response"]["body"]["choices"]
    (one,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "reasoning": "Hm."}
    assert choice["finish_reason"] == "tool_calls"
    assert one["function"] == {"name": "mul", "arguments": '{"a": 3}'} and one["id"].startswith("call_")
    row = response_row("batch_req_1", "a", CHAT, "m", answered("Hm", "Hm", True, "length"))
    (choice,) = row["response"]["body"]["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", None)


def test_unfinished_thoughts_are_counted() -> None:
    totals = JobTotals()
    for output in (answered("Hi"), answered("Hi", "Hm."), answered("Hm", "Hm", True, "length")):
        totals.add(output)
    assert (totals.num_prompts, totals.num_thoughts, totals.num_unfinished_thoughts) == (3, 2, 1)
