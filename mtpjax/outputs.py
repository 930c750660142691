"""`RequestOutput` and `Metrics`: what a user gets for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mtpjax.engine.request import Result
from mtpjax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Metrics:
    """Figures of one request.

    Seconds are synchronised with the device, compilation excluded: `prefill_seconds` of the prompts that were read together with
    its own, `decode_seconds` of the loop while the request was in it. Requests share them; `LLM.engine` has their sums.

    `acceptance` is "real", or "simulated" where `LLM(acceptance=...)` drew it: then the text is not the model's.
    """

    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    rounds: int
    drafted: int
    accepted: int
    accepted_per_position: tuple[int, ...]
    tokens_per_round: float
    acceptance: str = "real"


@dataclass(frozen=True)
class RequestOutput:
    """One answered prompt. `finish_reason` is "stop" (a stop token, which is the last of `token_ids`) or "length"."""

    prompt: str | None
    prompt_token_ids: list[int] = field(repr=False)
    text: str | None
    token_ids: list[int] = field(repr=False)
    finish_reason: str
    seed: int
    metrics: Metrics


def output_of(prompt: Prompt, result: Result, tokenizer: Tokenizer | None, acceptance: str) -> RequestOutput:
    """`result` as its user sees it; the stop token, if one ended it, is no part of the text."""
    tokens, request, accepted = result.tokens, result.request, tuple(result.accepted_per_position)
    shown = tokens[:-1] if result.stopped else tokens
    return RequestOutput(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=list(request.prompt),
        text=tokenizer.decode(shown) if tokenizer else None,
        token_ids=tokens,
        finish_reason="stop" if result.stopped else "length",
        seed=request.seed,
        metrics=Metrics(
            prompt_tokens=len(request.prompt),
            prefill_seconds=result.prefill_seconds,
            decode_seconds=result.decode_seconds,
            rounds=result.rounds,
            drafted=result.rounds * len(accepted),
            accepted=sum(accepted),
            accepted_per_position=accepted,
            tokens_per_round=len(tokens) / result.rounds if result.rounds else 0.0,
            acceptance=acceptance,
        ),
    )
