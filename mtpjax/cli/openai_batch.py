"""Lines of OpenAI's batch files: requests in, responses out.

A request is `{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}`, or has
the url /v1/completions and a "prompt" in its body.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from mtpjax import CompletionOutput, Logprob, RequestOutput
from mtpjax.cli.line_keys import CHAT_KEYS, HARMLESS, SAMPLING_KEYS, check_keys

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LINE_KEYS = ("custom_id", "method", "url", "body")


def is_batch_line(row: Mapping[str, Any]) -> bool:
    """Return whether an object is meant as a line of an OpenAI batch file."""
    return row.get("custom_id") is not None or row.get("body") is not None


def read_body(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the url and the body of a request.

    Raises:
        ValueError: a key is missing, unknown or not supported, or has another type.
    """
    check_keys(row, LINE_KEYS)
    url, body = row.get("url"), row.get("body")
    if not isinstance(row.get("custom_id"), str):
        raise ValueError("is a line of an OpenAI batch without a 'custom_id', which is a text")
    if row.get("method", "POST") != "POST":
        raise ValueError(f"has the method {row['method']!r}, expected 'POST'")
    if url not in (CHAT, COMPLETIONS):
        raise ValueError(f"has the url {url!r}, expected {CHAT!r} or {COMPLETIONS!r}")
    if not isinstance(body, dict):
        raise ValueError(f"has a 'body' of type {type(body).__name__}, expected an object")
    try:
        check_keys(body, (*(CHAT_KEYS if url == CHAT else ("prompt",)), *SAMPLING_KEYS), HARMLESS)
    except ValueError as error:
        raise ValueError(f"its body {error}") from None
    return url, body


def request_id(row: Mapping[str, Any]) -> str:
    """Return the id of a request, a function of all that its line says."""
    text = json.dumps(row, sort_keys=True, ensure_ascii=True, default=repr)
    return f"batch_req_{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def response_row(
    identity: str, custom_id: str | int, url: str, model: str, output: RequestOutput, num_logprobs: int = 0
) -> dict[str, Any]:
    """Return the line of an answered request.

    Args:
        identity: `request_id` of the request.
        custom_id, url: of the request.
        model: the name that the request gives, or else that of the checkpoint.
        output: the answer.
        num_logprobs: how many of the most probable tokens the request asked for.
    """
    choices = [_choice(one, url, num_logprobs) for one in output.outputs]
    digest = identity.removeprefix("batch_req_")
    num_prompt, num_new = len(output.prompt_token_ids), sum(len(one.token_ids) for one in output.outputs)
    body = {
        "id": f"{'chatcmpl' if url == CHAT else 'cmpl'}-{digest}",
        "object": "chat.completion" if url == CHAT else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new},
    }
    response = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
    return {"id": identity, "custom_id": custom_id, "response": response, "error": None}


def _choice(completion: CompletionOutput, url: str, num_logprobs: int) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        pairs = list(zip(completion.token_ids, completion.logprobs, strict=True))
        logprobs = _chat_logprobs(pairs, num_logprobs) if url == CHAT else _text_logprobs(pairs)
    choice: dict[str, Any] = {
        "index": completion.index,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }
    if url == CHAT:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": completion.content,
            "reasoning": completion.reasoning,
        }
        if completion.tool_calls:
            message["tool_calls"] = [call.to_openai() for call in completion.tool_calls]
            if completion.finish_reason == "stop":
                choice["finish_reason"] = "tool_calls"
        choice["message"] = message
    else:
        choice["text"] = completion.text
    return choice | {"stop_reason": completion.stop_reason}


TokenLogprobs = Sequence[tuple[int, Mapping[int, Logprob]]]
"""Each token of a text with its log-probability and those of the most probable tokens, by id."""


def _chat_logprobs(tokens: TokenLogprobs, num_logprobs: int) -> dict[str, Any]:
    def entry(token: int, logprob: Logprob) -> dict[str, Any]:
        text = _name(token, logprob)
        return {"token": text, "logprob": logprob.logprob, "bytes": list(text.encode(errors="replace"))}

    content = []
    for token, found in tokens:
        ranked = sorted(found.items(), key=lambda pair: pair[1].rank or 0)
        top = [entry(*pair) for pair in ranked[:num_logprobs]]
        content.append({**entry(token, found[token]), "top_logprobs": top})
    return {"content": content}


def _text_logprobs(tokens: TokenLogprobs) -> dict[str, Any]:
    names = [_name(token, found[token]) for token, found in tokens]
    return {
        "tokens": names,
        "token_logprobs": [found[token].logprob for token, found in tokens],
        "top_logprobs": [{_name(i, one): one.logprob for i, one in found.items()} for _, found in tokens],
        "text_offset": [0, *accumulate(map(len, names))][:-1],
    }


def _name(token: int, logprob: Logprob) -> str:
    return logprob.decoded_token if logprob.decoded_token is not None else f"token_id:{token}"


def error_row(identity: str, custom_id: str | int | None, message: str) -> dict[str, Any]:
    """Return the line of a request that could not be answered; both places in which programs look name the error."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": 400}
    response = {
        "status_code": 400,
        "request_id": f"req_{identity.removeprefix('batch_req_')}",
        "body": {"error": error},
    }
    return {
        "id": identity,
        "custom_id": custom_id,
        "response": response,
        "error": {"code": "invalid_request", "message": message},
    }
