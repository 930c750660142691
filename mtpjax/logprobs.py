"""`Logprob`: the log-probability of a token as users see it. Names and forms are vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mtpjax.decoding.logprobs import LOGPROBS_MODES, TokenLogprobs
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.request import Request, RequestState
from mtpjax.engine.request_logprobs import logprobs_of_prompts
from mtpjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one place.

    Attributes:
        logprob: natural logarithm of the probability; a float32 number.
        rank: 1 is the most probable token; of equally probable ones the lower id comes first.
        decoded_token: its text, special tokens included; None if the model has no tokenizer. Bytes that are no whole
            character are "\\ufffd".
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenAlternatives = dict[int, Logprob]
"""Token id -> `Logprob`: the chosen token first, then the most probable ones in the order of their ranks."""


def check_logprobs_mode(mode: object) -> None:
    """Raise ValueError unless `mode` is one of `LOGPROBS_MODES`."""
    if mode not in LOGPROBS_MODES:
        raise ValueError(f"logprobs_mode is {mode!r}; expected {' or '.join(map(repr, LOGPROBS_MODES))}")


def check_num_logprobs(name: str, request: Request, max_logprobs: int) -> None:
    """Raise ValueError if a request asks for more top tokens than there are. `name` is that of the prompt."""
    for field in ("logprobs", "prompt_logprobs"):
        number = getattr(request, field)
        if number is not None and number > max_logprobs:
            raise ValueError(
                f"{name}: {field} is {number}; at most max_logprobs = {max_logprobs}: ask for fewer, or raise "
                "LLM(max_logprobs=...), which ends at the size of the vocabulary"
            )


def completion_logprobs(state: RequestState, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the fields of a `CompletionOutput` that are about log-probabilities; empty if none were asked for."""
    if state.request.logprobs is None:
        return {}
    logprobs: list[TokenAlternatives] = []
    for part in state.logprobs:
        start = len(logprobs)
        logprobs += alternatives(state.tokens[start : start + len(part.chosen)], part, tokenizer)
    total = sum(each[token].logprob for each, token in zip(logprobs, state.tokens, strict=False))
    return {"logprobs": logprobs, "cumulative_logprob": float(total)}


def prompt_logprobs(
    request: Request, runner: ModelRunner, tokenizer: Tokenizer | None
) -> list[TokenAlternatives | None] | None:
    """Return the log-probabilities of the tokens of a prompt; None if the request asks for none.

    The prompt is read once more, by a program of its own. The first token, which has nothing before it, has None.
    """
    if request.prompt_logprobs is None:
        return None
    ids = request.prompt_token_ids
    (found,) = logprobs_of_prompts(runner, [ids], request.prompt_logprobs)
    return [None, *alternatives(ids[1:], found, tokenizer)]


def alternatives(
    tokens: Sequence[int], logprobs: TokenLogprobs, tokenizer: Tokenizer | None
) -> list[TokenAlternatives]:
    """Return for each token, or the first of them, what is known about it and its most probable alternatives."""
    decode = _decoder(tokenizer)
    chosen, ranks, top_ids, top = (np.asarray(x).tolist() for x in logprobs)
    result: list[TokenAlternatives] = []
    for token, logprob, rank, ids, values in zip(tokens, chosen, ranks, top_ids, top, strict=False):
        entry = {int(token): Logprob(logprob, rank, decode(int(token)))}
        for place, (other, value) in enumerate(zip(ids, values, strict=True), 1):
            entry.setdefault(other, Logprob(value, place, decode(other)))
        result.append(entry)
    return result


def _decoder(tokenizer: Tokenizer | None) -> Callable[[int], str | None]:
    if tokenizer is None:
        return lambda token: None
    return lru_cache(maxsize=None)(lambda token: tokenizer.decode_all([token]))
