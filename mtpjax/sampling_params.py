"""`SamplingParams`: how to generate for one prompt, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtpjax.argument_names import names_fields
from mtpjax.constraint_params import check_n, settle_constraints
from mtpjax.generation_config import PENALTIES, recommended_sampling
from mtpjax.text.structured_outputs import StructuredOutputs, check_structured_outputs
from mtpjax.text_params import RequestOutputKind, check_text_params

__all__ = ["PENALTIES", "SamplingParams", "check_int"]


@names_fields
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate for one prompt.

    Names and meanings are vLLM's. Two defaults differ: `temperature` is 0.0 here and 1.0 in vLLM, `max_tokens` is 128
    here and 16 in vLLM.

    Args:
        max_tokens: new tokens at most; None: as many as `max_model_len` leaves room for.
        temperature: 0 is greedy.
        top_k: sample from the `top_k` most probable tokens; 0 or -1: from all.
        top_p: sample from the fewest tokens that together have this probability, above 0; 1: from all.
        min_p: sample from the tokens whose probability is at least this fraction of the highest one; 0: from all.
        presence_penalty: subtracted from the logit of every token that has been generated, -2 to 2.
        frequency_penalty: subtracted from the logit of a token once for each time that it has been generated, -2 to 2;
            rounded to bfloat16.
        repetition_penalty: divides positive logits of tokens in prompt and text and multiplies negative ones; above 0,
            and 1 changes nothing. Penalties come before the temperature, and greedy choice has them too.
        seed: the text is a function of the prompt, the seed and the parameters above. None: the LLM's seed plus the
            index of the prompt in the call.
        stop_token_ids: tokens that end the text, beside the checkpoint's own end-of-text tokens.
        ignore_eos: generate past the checkpoint's own end-of-text tokens.
        n: samples of the prompt, which is read once; more than one needs a temperature above 0. See `sample_seed` in
            `mtpjax.samples` for their seeds.
        min_tokens: new tokens before which no stop token is generated, not even one that `ignore_eos` ignores.
        logit_bias: numbers that are added to the logits of token ids, limited to -100...100.
        allowed_token_ids: the only tokens that the text may have, stop tokens included; None: all.
        bad_words: texts that are not generated: the token that would end one is forbidden. As in vLLM they are looked
            for in the new tokens only, as the tokens of the word and of the word after a space.
        logprobs: k: the log-probability of each new token and those of the k most probable ones, at most
            `LLM(max_logprobs=...)`; 0: of the new token alone; None: none.
        prompt_logprobs: the same for the tokens of the prompt, which is read once more for it.
        structured_outputs: a JSON schema, a regular expression, choices or a grammar that the text follows from its
            first token on. It ends with an end-of-text token where it is complete, so it does not go with `ignore_eos`.
        stop: a string or strings that end the text, wherever in it they occur; at most 256 of at most 4,096 characters.
            The text is cut before the string. Of several that end with the same token the first of the list counts.
        include_stop_str_in_output: cut the text behind the string instead; also keep the text of a stop token.
        detokenize: make text of the tokens; without it there is no `text`, and no `stop`.
        skip_special_tokens: leave special tokens out of the text.
        output_kind: what `AsyncLLM.generate` yields; nothing else reads it.
        num_speculative_tokens: tokens that are drafted for this prompt in each step, at most the LLM's number; 0: none.
            None: the LLM's number. The text does not depend on it, unless the LLM has acceptance="rejection".

    Raises:
        ValueError: a value of another type or out of range.
        TypeError: a name that is not among these; it names the one that is alike.
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
    n: int = 1
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    stop: str | Sequence[str] | None = ()
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    num_speculative_tokens: int | None = None

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 0, optional=True)
        check_int("seed", self.seed, None, optional=True)
        check_int("logprobs", self.logprobs, 0, optional=True)
        check_int("prompt_logprobs", self.prompt_logprobs, 0, optional=True)
        check_int("top_k", self.top_k, -1)
        check_int("num_speculative_tokens", self.num_speculative_tokens, 0, optional=True)
        non_negative = "a finite number >= 0 (0 is greedy)"
        _check_number("temperature", self.temperature, lambda t: 0 <= t < float("inf"), non_negative)
        _check_number("top_p", self.top_p, lambda p: 0 < p <= 1, "a number above 0 and at most 1 (1 keeps all tokens)")
        _check_number("min_p", self.min_p, lambda p: 0 <= p <= 1, "a number from 0 to 1 (0 keeps all tokens)")
        for name in PENALTIES[:2]:
            _check_number(name, getattr(self, name), lambda p: -2 <= p <= 2, "a number from -2 to 2 (0 is none)")
        positive = "a finite number above 0 (1 is none)"
        _check_number("repetition_penalty", self.repetition_penalty, lambda p: 0 < p < float("inf"), positive)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            check_int("stop_token_ids", token, 0)
        check_n(self.n, self.temperature)
        for name, value in settle_constraints(self, self.max_tokens).items():
            object.__setattr__(self, name, value)
        check_structured_outputs(self.structured_outputs, self.ignore_eos, self.allowed_token_ids)
        stop = check_text_params(self.stop, self.detokenize, self.include_stop_str_in_output, self.skip_special_tokens)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "output_kind", RequestOutputKind(self.output_kind))

    @classmethod
    def from_generation_config(cls, generation_config: Mapping[str, Any], **overrides: Any) -> SamplingParams:
        """Return what a `generation_config.json` recommends, as far as `SamplingParams` has it; `overrides` go first.

        See `recommended_sampling` for what values mean.

        Raises:
            ValueError: a value that is out of range.
        """
        return cls(**recommended_sampling(generation_config, overrides) | overrides)


def check_int(name: str, value: object, low: int | None, high: int | None = None, *, optional: bool = False) -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high`, or None if it is `optional`."""
    if optional and value is None:
        return
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):  # type: ignore[operator]
        limits = "" if low is None else f" >= {low}" if high is None else f" from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; expected a whole number{limits}" + (" or None" if optional else ""))


def _check_number(name: str, value: object, in_range: Callable[[float], bool], expected: str) -> None:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not in_range(float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{name} is {value!r}; expected {expected}")
