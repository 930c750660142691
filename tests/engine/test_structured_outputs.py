"""Structured outputs in the engine: every text is valid, and the same at every draft length and in any company."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jsonschema
import pytest

from mtpjax import LLM, RequestOutput, SamplingParams, StructuredOutputs
from mtpjax.decoding import steps
from mtpjax.decoding.automaton import AutomatonState
from tests.helpers.models import cpu_only
from tests.helpers.word_checkpoint import MODEL, SMALL

pytestmark = cpu_only

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["girl", "boy", "tree"]},
        "brave": {"type": "boolean"},
        "seen": {"type": "array", "items": {"type": "string", "format": "date"}, "maxItems": 2},
    },
    "required": ["name", "kind", "seen"],
}
REGEX, CHOICE = r"[A-Z][a-z]{2,8}( and [A-Z][a-zé]{1,5})?[.!]", ("yes", "no", "perhaps a little", "yes, yes")
GRAMMAR = 'root ::= "The " who " went " ("home" | "away") "."\nwho ::= [a-z]{3,6} (" and " [a-z]{3,6})?'
KINDS: dict[str, Any] = {"json": SCHEMA, "regex": REGEX, "choice": CHOICE, "grammar": GRAMMAR}
PROMPTS = ["Once upon a time", "The old man said:", "A list of names"]
MIXED: dict[str, Any] = {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "frequency_penalty": 0.5}


def is_valid(kind: str, text: str) -> bool:
    if kind == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    pattern = r"The [a-z]{3,6}( and [a-z]{3,6})? went (home|away)\." if kind == "grammar" else REGEX
    return text in CHOICE if kind == "choice" else re.fullmatch(pattern, text) is not None


def params(kind: str | None, **other: Any) -> SamplingParams:
    structured = None if kind is None else StructuredOutputs(**{kind: KINDS[kind]})
    return SamplingParams(max_tokens=80 if kind else 20, structured_outputs=structured, **other)


JOB = [
    (PROMPTS[i % 3], params(kind, seed=i, **other))
    for i, (kind, other) in enumerate(
        (kind, other) for other in ({}, {"temperature": 1.0}, MIXED) for kind in (*KINDS, None)
    )
]


def make_llm(drafts: int, slots: int, **other: Any) -> LLM:
    return LLM(dtype="float32", max_model_len=128, num_speculative_tokens=drafts, max_num_seqs=slots, **other)


def generate(llm: LLM, job: list[tuple[str, SamplingParams]] = JOB) -> list[RequestOutput]:
    return llm.generate([prompt for prompt, _ in job], [params for _, params in job])


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone() -> list[RequestOutput]:
    """Return each text of the job, generated without drafts and without company."""
    llm = make_llm(0, 1)
    return [output for one in JOB for output in generate(llm, [one])]


def test_texts_are_valid(alone: list[RequestOutput]) -> None:
    kinds = [None if p.structured_outputs is None else p.structured_outputs.kind for _, p in JOB]
    for kind, output in zip(kinds, alone, strict=True):
        if kind is not None:
            assert output.finish_reason == "stop" and output.outputs[0].stop_reason is None, (kind, output.text)
            assert is_valid(kind, str(output.text)), (kind, output.text)
    assert len({output.text for output in alone}) > 10


@pytest.mark.parametrize(
    ("drafts", "slots"),
    [(3, 4), pytest.param(8, 32, marks=pytest.mark.slow)],
)
def test_texts_are_the_same(drafts: int, slots: int, alone: list[RequestOutput]) -> None:
    """The batch is refilled, and has requests without structured output."""
    outputs = generate(make_llm(drafts, slots))
    assert tokens(outputs) == tokens(alone)
    structured = [o for o, (_, p) in zip(outputs, JOB, strict=True) if p.structured_outputs]
    assert sum(o.metrics.num_accepted_tokens for o in structured) > 20


@pytest.mark.slow
def test_texts_are_the_same_with_a_part_of_the_vocabulary(alone: list[RequestOutput]) -> None:
    outputs = generate(make_llm(3, 4, draft_vocab_size=512))
    assert tokens(outputs) == tokens(alone)
    assert sum(o.metrics.num_accepted_tokens for o in outputs) > 20


@pytest.mark.slow
def test_neighbours_keep_their_texts_and_their_program(alone: list[RequestOutput]) -> None:
    plain = [i for i, (_, sampling) in enumerate(JOB) if sampling.structured_outputs is None]
    llm = make_llm(3, 4)
    assert tokens(generate(llm, [JOB[i] for i in plain])) == [alone[i].token_ids for i in plain]
    assert not any("automaton" in str(name) for name in llm.engine.runner.programs.compiled)


@pytest.mark.slow
def test_programs_are_bounded() -> None:
    """Another schema needs no other program."""
    llm = make_llm(1, 2)
    llm.generate(PROMPTS[:1], params("choice"))
    before = llm.engine.num_programs
    for words in (["a"], ["b", "c"], ["longer words than these"]):
        choice = StructuredOutputs(choice=words)
        (output,) = llm.generate(PROMPTS[:1], SamplingParams(structured_outputs=choice))
        assert output.text in words
    assert llm.engine.num_programs == before


@pytest.fixture
def fresh_traces() -> Any:
    """Forget traces before and after a test that plants a bug."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
def test_a_state_that_is_not_rolled_back_is_found(
    alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, fresh_traces: None
) -> None:
    """All rows of a window step the automaton, whether they are accepted or not."""
    add: Callable[..., AutomatonState] = AutomatonState.add
    monkeypatch.setattr(AutomatonState, "add", lambda self, rows, n, automata: add(self, rows, n * 0 + 9, automata))
    assert tokens(generate(make_llm(3, 4, program_cache=None), JOB[:4])) != tokens(alone[:4])


@pytest.mark.slow
def test_a_mask_in_the_trunk_alone_is_found_by_its_acceptance(
    alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, fresh_traces: None
) -> None:
    """The text is the same, and fewer drafts are accepted."""
    job = [JOB[i] for i in range(len(JOB)) if JOB[i][1].structured_outputs]
    masked = generate(make_llm(3, 4, program_cache=None), job)
    unmasked = steps.process_logits

    def without_mask(logits: Any, p: Any, *rest: Any) -> Any:
        return unmasked(logits, p.replace(automata=None), *rest)

    monkeypatch.setattr(steps, "process_logits", without_mask)
    jax.clear_caches()
    found = generate(make_llm(3, 4, program_cache=None), job)
    assert tokens(found) == tokens(masked)

    def acceptance(outputs: list[RequestOutput]) -> float:
        accepted = sum(o.metrics.num_accepted_tokens for o in outputs)
        return accepted / sum(o.metrics.num_draft_tokens for o in outputs)

    assert acceptance(found) < 0.9 * acceptance(masked)


def test_stop_tokens_of_the_request_are_tokens_as_others() -> None:
    """They end the text where the automaton allows them, complete or not."""
    llm = make_llm(1, 2)
    assert llm.tokenizer is not None
    (a,) = llm.tokenizer.encode("a")
    structured = StructuredOutputs(regex="[b-z]aaa")
    (output,) = llm.generate(PROMPTS[:1], SamplingParams(structured_outputs=structured, stop_token_ids=(a,)))
    assert output.finish_reason == "stop" and (output.outputs[0].stop_reason == a or len(str(output.text)) == 4)


def test_bad_input() -> None:
    choice = StructuredOutputs(choice=["a"])
    with pytest.raises(ValueError, match="ignore_eos=True does not go with"):
        SamplingParams(structured_outputs=choice, ignore_eos=True)
    with pytest.raises(ValueError, match="expected StructuredOutputs"):
        SamplingParams(structured_outputs={"choice": ["a"]})  # type: ignore[arg-type]
    llm = LLM(MODEL, num_speculative_tokens=0, **SMALL)
    with pytest.raises(ValueError, match="prompt 0: structured outputs need a tokenizer"):
        llm.generate([[1, 2]], SamplingParams(structured_outputs=choice))
