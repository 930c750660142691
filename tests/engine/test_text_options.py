"""What a user sees of a text that was cut: thought, tool calls, special tokens; and parameters that are refused."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken

from checkpoints import TINY
from mtpjax import SamplingParams
from mtpjax.engine.request import Request, RequestState
from mtpjax.engine.stop_strings import TextOptions, TextReader
from mtpjax.outputs import make_output
from mtpjax.text.detokenizer import make_detokenizer
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.fast
IM_END = 4095


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY / "tokenizer.json")


def output(tokens: list[int], options: TextOptions, stopped: bool = False, one: Tokenizer | None = None) -> Any:
    """What a user sees of these tokens, and how many of them are left."""
    one = one or tokenizer()
    make = lambda: TextReader(  # noqa: E731
        make_detokenizer(one, options.skip_special_tokens).add, options, stop_token_ids=(IM_END,)
    )
    state = RequestState(Request(0, (1,), 99, 0.0, 0, (), (IM_END,), text_options=options, make_reader=make))
    state.add(tokens)
    state.finished, state.stopped = True, stopped and state.stop_string is None
    return make_output("<|im_start|>assistant\n<think>\n", state, one, "real")


@pytest.mark.parametrize("special", [False, True])
def test_thoughts_and_tool_calls_of_a_text_that_was_cut(special: bool) -> None:
    """Also where the marks are special tokens, which the text does not have and stop strings do not see."""
    one = Tokenizer(type(tokenizer().hf_tokenizer).from_str(tokenizer().hf_tokenizer.to_str()))
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    one.hf_tokenizer.add_tokens([AddedToken(mark, special=special) for mark in marks])
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    tokens = one.encode(f"Hm, END.\n</think>\n\nHi {call} and END, more")
    inside = output(tokens, TextOptions(("END",)), one=one)
    assert (inside.text, inside.reasoning, inside.content) == ("Hm, ", "Hm,", None)
    assert inside.outputs[0].unfinished_thought and inside.outputs[0].stop_reason == "END"
    after = output(tokens, TextOptions((" and",)), one=one)
    assert (after.reasoning, after.content, after.tool_calls[0].arguments) == ("Hm, END.", "Hi", {"a": 1})
    assert ("</think>" in after.text) != special and after.text.rstrip().endswith("}" if special else "</tool_call>")
    shown = output(tokens, TextOptions((" and",), skip_special_tokens=False), one=one)
    assert "</think>" in shown.text and (shown.reasoning, shown.content) == ("Hm, END.", "Hi")


def test_special_tokens_and_no_text() -> None:
    tokens = [*tokenizer().encode("So.</think>Yes"), IM_END]
    plain = output(tokens, TextOptions(), True)
    with_stop = output(tokens, TextOptions(include_stop_str_in_output=True, skip_special_tokens=False), True)
    assert with_stop.text == plain.text + "<|im_end|>" and plain.text == "So.</think>Yes"
    assert output(tokens, TextOptions(skip_special_tokens=False), True).text == plain.text
    none = output(tokens, TextOptions(detokenize=False), True)
    assert (none.text, none.content, none.reasoning, none.tool_calls, none.token_ids) == (None, None, None, (), tokens)
    string = output(tokens, TextOptions(("<|im_end|>",), True, skip_special_tokens=False), True)
    assert (string.text, string.outputs[0].stop_reason) == (with_stop.text, "<|im_end|>")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"stop": ""}, "stop has an empty string"),
        ({"stop": ["a", ""]}, "stop has an empty string"),
        ({"stop": 3}, "stop is 3; expected a string or a list of strings"),
        ({"stop": b"a"}, "stop is b'a'; expected a string"),
        ({"stop": ["a", 3]}, "stop has 3; expected strings. Tokens go into stop_token_ids"),
        ({"stop": "a" * 4097}, "stop has a string of 4097 characters, 'aaa.*at most 4096"),
        ({"stop": ["a"] * 257}, "stop has 257 strings; at most 256"),
        ({"stop": ["a"], "detokenize": False}, "set detokenize=True to use stop"),
        ({"detokenize": 1}, "detokenize is 1; expected True or False"),
        ({"skip_special_tokens": None}, "skip_special_tokens is None; expected True or False"),
        ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output is 'no'"),
        ({"output_kind": 7}, "7 is not a valid RequestOutputKind"),
    ],
)
def test_bad_parameters_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)


def test_good_parameters_are_kept() -> None:
    assert SamplingParams(stop=None).stop == () and SamplingParams(stop="\n").stop == ("\n",)
    one = SamplingParams(stop=["b", "a" * 4096])
    assert one.stop == ("b", "a" * 4096) and replace(one, top_k=2).stop == one.stop and hash(one)
