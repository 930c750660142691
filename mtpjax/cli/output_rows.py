"""Answers as lines of the output of `mtpjax generate`, in our own form; OpenAI's is in `openai_batch.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mtpjax import CompletionOutput, RequestOutput
from mtpjax.cli.jsonl import PromptLine
from mtpjax.cli.openai_batch import response_row


def output_row(line: PromptLine, output: RequestOutput, model: str, num_logprobs: int = 0) -> dict[str, object]:
    """Return an answer as a line of the output.

    A line that asked for several samples has all of them in "outputs"; the first one is also in the keys that an answer
    with one sample has.

    Args:
        line: that is answered.
        output: the answer.
        model: the name of the checkpoint.
        num_logprobs: how many of the most probable tokens the line asked for.
    """
    if line.url is not None:
        return response_row(line.request_id, line.id, line.url, line.model or model, output, num_logprobs)
    is_chat = line.messages is not None
    row: dict[str, object] = {"id": line.id, "prompt": line.prompt, **_sample(output.outputs[0], is_chat)}
    if len(output.outputs) > 1:
        row["outputs"] = [{"index": one.index, "seed": one.seed, **_sample(one, is_chat)} for one in output.outputs]
    if output.prompt_logprobs is not None:
        row["prompt_logprobs"] = _logprobs(output.prompt_logprobs)
    return row | {"metrics": asdict(output.metrics)}


def _sample(completion: CompletionOutput, is_chat: bool) -> dict[str, object]:
    parts: dict[str, object] = {"text": completion.text}
    if is_chat:
        parts |= {
            "reasoning": completion.reasoning,
            "content": completion.content,
            "tool_calls": [call.to_openai() for call in completion.tool_calls],
            "unfinished_thought": completion.unfinished_thought,
        }
    parts |= {
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        parts["logprobs"] = _logprobs(completion.logprobs)
        parts["cumulative_logprob"] = completion.cumulative_logprob
    return parts


def _logprobs(tokens: Sequence[Mapping[int, Any] | None]) -> list[dict[str, Any] | None]:
    """Log-probabilities in the form of vLLM's server: for each token an object by token id."""
    return [None if one is None else {str(i): asdict(logprob) for i, logprob in one.items()} for one in tokens]
