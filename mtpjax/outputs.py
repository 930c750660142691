"""`RequestOutput`, `CompletionOutput` and `Metrics`: what a user gets for a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mtpjax.engine.request import RequestState
from mtpjax.logprobs import TokenAlternatives, completion_logprobs
from mtpjax.text.prompts import Prompt
from mtpjax.text.reasoning import split_thought, thought_state
from mtpjax.text.tokenizer import Tokenizer
from mtpjax.text.tool_calls import ToolCall, parse_tool_calls, type_arguments

_PROMPT_END = 256  # tokens of a prompt given as ids in which the opening of a thought is looked for


@dataclass(frozen=True)
class Metrics:
    """Figures of one request. Names that vLLM's metrics of speculative decoding have mean the same here.

    Seconds are synchronised with the device and exclude compilation. Requests that run together share them;
    `LLM.engine` has their sums. With several samples of a prompt, figures are sums over them, but tokens and seconds of
    the prompt count once.

    Attributes:
        num_prompt_tokens: tokens of the prompt.
        prefill_seconds: of the prefill that read the prompt, together with others.
        decode_seconds: of the decode loop while the request was in it.
        num_steps: steps of the loop; each gives one token of the trunk and the accepted drafts before it. A stop string
            is found after a call of the loop, so the steps of that call behind it count too, here and below.
        num_drafts: steps that drafted for the request: all of them, unless the depth is 0 or changes.
        num_draft_tokens: tokens that were drafted.
        num_accepted_tokens: draft tokens that were accepted. The last step may accept more than `max_tokens` lets
            through.
        num_accepted_tokens_per_pos: the same by position of the draft.
        mean_acceptance_length: `1 + num_accepted_tokens / num_drafts`; 1.0 without drafts.
        acceptance: "real"; "rejection" under that rule; or "simulated" if `LLM(acceptance=SimulatedAcceptance(...))`
            decided: then the text is not the model's.
    """

    num_prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    num_steps: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]
    mean_acceptance_length: float
    acceptance: str = "real"


@dataclass(frozen=True)
class CompletionOutput:
    """One generated text.

    Attributes:
        index: its number among the texts of the prompt, 0...n - 1.
        text: all of it, with thought and tool calls, without special tokens and without the stop token or string,
            unless `SamplingParams` ask for them; None if the model has no tokenizer, or with `detokenize=False`. A
            character that "length" cut in the middle of its bytes is left out; its tokens stay in `token_ids`.
        token_ids: the new tokens; a stop token, or the token that completes a stop string, is the last of them.
        finish_reason: "stop" (a stop token or string), "length" (`max_tokens`, or no room left) or "abort".
        stop_reason: the string out of `SamplingParams.stop`, or the id out of `stop_token_ids`, that ended the text.
            None if the checkpoint's own end-of-text token or the length did.
        reasoning: the thought, without `<think>`, `</think>` and the white space around it; also if the prompt opened
            it. None if there is none.
        content: the text without thought and tool calls; None if there is none: the thought did not end, or the
            text has nothing else than tool calls.
        tool_calls: in their order. `LLM.chat(tools=...)` gives their arguments the types of the tools' schemas. What
            is not a whole, well-formed call stays in `content`.
        unfinished_thought: whether the text ended inside its thought; more `max_tokens` may help.
        seed: the seed of this text; with `SamplingParams(seed=...)` it is generated alone.
        logprobs: for each of `token_ids` a dict of token id -> `Logprob`: first the token itself, then the most
            probable ones that `SamplingParams.logprobs` asks for. None if it asks for none.
        cumulative_logprob: the sum of the log-probabilities of `token_ids`; None without `logprobs`.
    """

    index: int
    text: str | None
    token_ids: list[int] = field(repr=False)
    finish_reason: str
    stop_reason: int | str | None = None
    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    unfinished_thought: bool = False
    seed: int | None = None
    logprobs: list[TokenAlternatives] | None = field(default=None, repr=False)
    cumulative_logprob: float | None = None

    def to_message(self) -> dict[str, Any]:
        """Return the assistant's message that continues the conversation, in the form that chat templates read.

        It has `content`, and `reasoning_content` and `tool_calls` (whose arguments are objects) if there are any. An
        unfinished thought becomes a finished one.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content or ""}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True)
class RequestOutput:
    """One answered prompt.

    Attributes:
        prompt: its text; None if it was given as token ids.
        prompt_token_ids: its token ids.
        outputs: the generated texts, `SamplingParams.n` of them.
        seed: the seed that was used, by the first of them.
        metrics: figures of the request.
        prompt_logprobs: for each of `prompt_token_ids` a dict as in `CompletionOutput.logprobs`; the first has None.
            None if `SamplingParams.prompt_logprobs` asks for none.
        num_cached_tokens: prompt tokens that came from a prefix which requests share.
    """

    prompt: str | None
    prompt_token_ids: list[int] = field(repr=False)
    outputs: list[CompletionOutput]
    seed: int
    metrics: Metrics
    prompt_logprobs: list[TokenAlternatives | None] | None = field(default=None, repr=False)
    num_cached_tokens: int = 0

    @property
    def text(self) -> str | None:
        """The same as `outputs[0].text`."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The same as `outputs[0].token_ids`."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        """The same as `outputs[0].finish_reason`."""
        return self.outputs[0].finish_reason

    @property
    def reasoning(self) -> str | None:
        """The same as `outputs[0].reasoning`."""
        return self.outputs[0].reasoning

    @property
    def content(self) -> str | None:
        """The same as `outputs[0].content`."""
        return self.outputs[0].content

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The same as `outputs[0].tool_calls`."""
        return self.outputs[0].tool_calls

    def to_message(self) -> dict[str, Any]:
        """The same as `outputs[0].to_message()`."""
        return self.outputs[0].to_message()

    def with_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> RequestOutput:
        """Return the same with arguments of tool calls converted to the types of the tools' JSON schemas."""
        if not tools or not any(one.tool_calls for one in self.outputs):
            return self
        outputs = [replace(one, tool_calls=tuple(type_arguments(one.tool_calls, tools))) for one in self.outputs]
        return replace(self, outputs=outputs)


def make_output(prompt: Prompt, state: RequestState, tokenizer: Tokenizer | None, acceptance: str) -> RequestOutput:
    """Turn the state of a finished request into what its user sees.

    Args:
        prompt: as the user gave it.
        state: of the request.
        tokenizer: None if the model has none.
        acceptance: see `Metrics`.
    """
    completion = CompletionOutput(
        index=state.request.sample,
        text=None,
        token_ids=state.tokens,
        finish_reason=state.finish_reason,
        stop_reason=state.stop_reason,
        seed=state.request.seed,
        **completion_logprobs(state, tokenizer),
    )
    if tokenizer is not None and state.request.text_options.detokenize:
        completion = _with_text(completion, prompt, state, tokenizer)
    return RequestOutput(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=list(state.request.prompt_token_ids),
        outputs=[completion],
        seed=state.request.seed,
        metrics=_metrics(state, acceptance),
        num_cached_tokens=state.num_cached_tokens,
    )


def _with_text(
    completion: CompletionOutput, prompt: Prompt, state: RequestState, tokenizer: Tokenizer
) -> CompletionOutput:
    """Decode the tokens, and take thought, content and tool calls apart."""
    options, length = state.request.text_options, state.reader.num_characters if state.reader else None
    token_ids = state.tokens[:-1] if state.stopped and not options.include_stop_str_in_output else state.tokens
    if options.skip_special_tokens:
        text, marked = tokenizer.decode(token_ids)[:length], tokenizer.decode_with_marks(token_ids, length)
    else:
        text = marked = tokenizer.decode_all(token_ids)[:length]
    was_cut = length is None and not state.stopped
    if was_cut and text.endswith("\ufffd") and tokenizer.ends_inside_a_character(token_ids):
        text, marked = text[:-1], marked[:-1]
    ids = state.request.prompt_token_ids
    before = prompt if isinstance(prompt, str) else tokenizer.decode_all(ids[-_PROMPT_END:])
    thought = split_thought(marked, thought_state(before))
    content, calls = thought.content, list[ToolCall]()
    if content is not None:
        content, calls = parse_tool_calls(content, hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest())
    return replace(
        completion,
        text=text,
        reasoning=thought.reasoning,
        content=None if calls and not content else content,
        tool_calls=tuple(calls),
        unfinished_thought=thought.unfinished,
    )


def _metrics(state: RequestState, acceptance: str) -> Metrics:
    accepted = tuple(state.num_accepted_tokens_per_pos)
    num_drafts = state.num_drafts
    return Metrics(
        num_prompt_tokens=len(state.request.prompt_token_ids),
        prefill_seconds=state.prefill_seconds,
        decode_seconds=state.decode_seconds,
        num_steps=state.num_steps,
        num_drafts=num_drafts,
        num_draft_tokens=state.num_draft_tokens,
        num_accepted_tokens=sum(accepted),
        num_accepted_tokens_per_pos=accepted,
        mean_acceptance_length=1 + sum(accepted) / num_drafts if num_drafts else 1.0,
        acceptance=acceptance,
    )
