"""`Request` and `Result`: what the engine is asked for and what it has made of it; and requests as arrays for the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax import Array

from mtpjax.decoding.penalties import Penalties, TokenCounts, round_to_bfloat16
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams, TruncationParams


@dataclass(frozen=True)
class Request:
    """One checked prompt: ids, limits and its own randomness."""

    index: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stops: tuple[int, ...]
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass
class Result:
    """What a request has produced.

    Seconds are wall-clock, synchronised with the device, without compilation: of reading the prompts that were read with its
    own, and of the loop while it had a slot there.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    stopped: bool = False
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rounds: int = 0
    accepted_per_position: list[int] = field(default_factory=list)


def as_host_array(value: np.ndarray) -> Array:
    """A host array as an argument of a compiled program, which takes it as it is: nothing is compiled to move it."""
    return value  # type: ignore[return-value]


def stack_requests(slots: Sequence[Request | None]) -> BatchSamplingParams:
    """The requests in B slots, some of them empty; penalties are None where nobody has any."""

    def column(of: Callable[[Request], float], dtype: Any, idle: float = 0) -> Array:
        return as_host_array(np.array([idle if r is None else of(r) for r in slots], dtype))

    stops = np.full((len(slots), MAX_STOP_TOKENS), -1, np.int32)
    for row, request in zip(stops, slots, strict=True):
        if request is not None:
            row[: len(request.stops)] = request.stops
    return BatchSamplingParams(
        max_tokens=column(lambda r: r.max_tokens, np.int32),
        temperature=column(lambda r: r.temperature, np.float32),
        seed=column(lambda r: r.seed & 0xFFFFFFFF, np.uint32),
        stops=as_host_array(stops),
        kept=TruncationParams(
            top_k=column(lambda r: r.top_k, np.int32),
            top_p=column(lambda r: r.top_p, np.float32, 1),
            min_p=column(lambda r: r.min_p, np.float32),
        ),
        penalties=Penalties(
            presence=column(lambda r: r.presence_penalty, np.float32),
            frequency=column(lambda r: round_to_bfloat16(r.frequency_penalty), np.float32),
            repetition=column(lambda r: r.repetition_penalty, np.float32, 1),
        )
        if any(r is not None and r.has_penalties for r in slots)
        else None,
    )


def prompts_seen(slots: Sequence[Request | None], vocab: int) -> TokenCounts:
    """What penalties count before the first token of each slot."""
    prompt = np.zeros((len(slots), vocab), bool)
    for row, request in zip(prompt, slots, strict=True):
        if request is not None:
            row[list(request.prompt)] = True
    return TokenCounts(prompt=as_host_array(prompt), counts=as_host_array(np.zeros(prompt.shape, np.int32)))
