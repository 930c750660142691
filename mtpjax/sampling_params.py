"""`SamplingParams`: how to generate for one prompt, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate for one prompt.

    Args:
        max_tokens: new tokens at most; None: as many as `max_len` leaves room for.
        temperature: 0 is greedy.
        top_k: sample from the `top_k` most probable tokens; 0 or -1: from all.
        top_p: sample from the fewest tokens that have this probability together, above 0; 1: from all.
        min_p: sample from tokens at least this times as probable as the first; 0: from all.
        presence_penalty: taken off the logit of every token that was generated already, -2 to 2.
        frequency_penalty: the same once for each time it was generated, -2 to 2; rounded to bfloat16.
        repetition_penalty: positive logits of tokens in prompt and text are divided by it, negative ones multiplied;
            above 0, and 1 changes nothing. Penalties come before the temperature, and greedy choice has them too.
        seed: the text is a function of the prompt, the seed and the parameters above. None: the LLM's seed plus the
            prompt's place in the call.
        stop_token_ids: end the text, beside the checkpoint's own end-of-text tokens.
        ignore_eos: generate past the checkpoint's own end-of-text tokens.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        whole("max_tokens", self.max_tokens, 0, none=True)
        whole("seed", self.seed, None, none=True)
        whole("top_k", self.top_k, -1)
        _number("temperature", self.temperature, lambda t: 0 <= t < float("inf"), "a finite number >= 0 (0 is greedy)")
        _number("top_p", self.top_p, lambda p: 0 < p <= 1, "a number above 0 and at most 1 (1 keeps all tokens)")
        _number("min_p", self.min_p, lambda p: 0 <= p <= 1, "a number from 0 to 1 (0 keeps all tokens)")
        for name in PENALTIES[:2]:
            _number(name, getattr(self, name), lambda p: -2 <= p <= 2, "a number from -2 to 2 (0 is none)")
        positive = "a finite number above 0 (1 is none)"
        _number("repetition_penalty", self.repetition_penalty, lambda p: 0 < p < float("inf"), positive)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            whole("stop_token_ids", token, 0)


def recommended(generation_config: Mapping[str, Any], **changes: Any) -> SamplingParams:
    """What a `generation_config.json` advises, as far as `SamplingParams` has it; `changes` go before it.

    As in vLLM, a temperature counts without `do_sample`; `"do_sample": false` is greedy.

    Raises:
        ValueError: a value that is out of range.
    """
    names = PENALTIES + (("temperature", "top_k", "top_p", "min_p") if generation_config.get("do_sample", True) else ())
    advised = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    return SamplingParams(**advised | changes)


def whole(name: str, value: object, low: int | None, high: int | None = None, *, none: bool = False) -> None:
    """Raises ValueError unless `value` is a whole number within the limits, or None where `none`."""
    if none and value is None:
        return
    good = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not good or (low is not None and value < low) or (high is not None and value > high):  # type: ignore[operator]
        limits = "" if low is None else f" >= {low}" if high is None else f" from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; expected a whole number{limits}" + (" or None" if none else ""))


def _number(name: str, value: object, good: Callable[[float], bool], expected: str) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not good(float(value))
    ):
        raise ValueError(f"{name} is {value!r}; expected {expected}")
