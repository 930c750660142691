"""The public names: the signatures of `LLM` and `SamplingParams`, outputs as in vLLM, and a help text that is true."""

import dataclasses
import doctest
import inspect
import re
from typing import Any

import pytest

import mtpjax
from mtpjax import LLM, CompletionOutput, Metrics, RequestOutput, SamplingParams
from tests.helpers.word_checkpoint import MODEL, SMALL

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def embedded() -> LLM:
    return LLM(max_model_len=256)


def test_the_package_exports_its_public_names() -> None:
    names = {"LLM", "CompletionOutput", "Metrics", "RequestOutput", "SamplingParams", "SimulatedAcceptance"}
    names |= {"StructuredOutputs"}
    assert set(mtpjax.__all__) == names and all(hasattr(mtpjax, name) for name in names)


def test_the_signatures_are_those_of_the_documentation() -> None:
    defaults = {name: p.default for name, p in inspect.signature(LLM).parameters.items()}
    expected: dict[str, Any] = {
        "model": None,
        "num_speculative_tokens": 3,
        "dtype": "auto",
        "quantization": None,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "max_prefill_seqs": None,
        "prefill_buckets": (16, 64, 256, 512),
        "mtp_prompt_tokens": None,
        "draft_vocab_size": None,
        "seed": 0,
        "tokenizer": None,
        "mtp": None,
        "hf_overrides": None,
        "acceptance": None,
        "program_cache": "auto",
    }
    assert {name: value for name, value in defaults.items() if name not in ("drafter", "compile_fn")} == expected
    chat = inspect.signature(LLM.chat).parameters
    assert list(chat) == [
        "self", "messages", "sampling_params", "tools", "chat_template", "chat_template_kwargs",
        "add_generation_prompt", "on_tokens",
    ]  # fmt: skip
    assert all(chat[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(chat)[3:])
    params = SamplingParams()
    assert (params.temperature, params.max_tokens) == (0.0, 128)


def test_outputs_have_the_fields_of_vllm_and_short_ways_to_them() -> None:
    llm = LLM(MODEL, num_speculative_tokens=2, **SMALL)
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
    (completion,) = output.outputs
    assert isinstance(output, RequestOutput) and isinstance(completion, CompletionOutput)
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert len(completion.token_ids) == 3 and completion.text is None
    assert (output.token_ids, output.text, output.finish_reason) == (completion.token_ids, None, "length")
    fields = {field.name for field in dataclasses.fields(Metrics)}
    assert fields >= {"num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos"}
    assert fields >= {"mean_acceptance_length", "num_prompt_tokens", "num_steps", "prefill_seconds", "decode_seconds"}


@pytest.mark.parametrize("argument", [{"temperature": 0.7}, {"enable_thinking": False}, {"max_tokens": 3}])
def test_chat_takes_no_other_arguments(embedded: LLM, argument: dict[str, Any]) -> None:
    """They would be lost in the template."""
    with pytest.raises(TypeError, match=f"LLM.chat has no argument '{next(iter(argument))}'"):
        embedded.chat(HELLO, **argument)
    with pytest.raises(TypeError, match="has no argument"):
        embedded.chat_prompt(HELLO, **argument)


def test_chat_is_generate_of_the_rendered_prompt(embedded: LLM) -> None:
    params = SamplingParams(max_tokens=12)
    streamed: list[int] = []
    (answer,) = embedded.chat(HELLO, params, on_tokens=lambda index, tokens: streamed.extend(tokens))
    assert answer.prompt == embedded.chat_prompt(HELLO)
    assert answer.token_ids == streamed == embedded.generate(answer.prompt, params)[0].token_ids
    (bare,) = embedded.chat(HELLO, SamplingParams(max_tokens=0), add_generation_prompt=False)
    assert bare.prompt is not None and answer.prompt.startswith(bare.prompt) and bare.prompt != answer.prompt


def test_the_example_of_the_help_text_runs() -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(LLM, "LLM")
    assert len(test.examples) >= 5
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert result.failed == 0, "".join(report)


def test_the_help_text_names_every_argument_and_attribute(embedded: LLM) -> None:
    text = inspect.getdoc(LLM) or ""
    for name in (*inspect.signature(LLM).parameters, *(name for name in vars(embedded) if not name.startswith("_"))):
        assert re.search(rf"^    (\w+, )*{name}(, \w+)*:", text, re.MULTILINE), name
    for counter in (name for name in vars(embedded.engine) if isinstance(getattr(embedded.engine, name), int | float)):
        assert f"`{counter}`" in text, counter
    for name, member in vars(LLM).items():
        if not name.startswith("_"):
            assert inspect.getdoc(member), name
    for name in inspect.signature(SamplingParams).parameters:
        assert re.search(rf"^    {name}: ", inspect.getdoc(SamplingParams) or "", re.MULTILINE), name


def test_a_compile_function_makes_the_programs_of_an_llm() -> None:
    names: list[str] = []

    def compile_fn(fn: Any, args: tuple[Any, ...]) -> Any:
        names.append(type(args[0]).__name__ if args else "none")
        return fn.lower(*args).compile()

    llm = LLM(MODEL, compile_fn=compile_fn, num_speculative_tokens=1, **SMALL)
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3 and len(names) == llm.engine.num_programs == 3
    assert names.count("none") == 1  # an empty cache is made of nothing
