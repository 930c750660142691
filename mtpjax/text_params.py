"""The parameters of `SamplingParams` that are about text: their types and limits."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 4096  # of one string; a text that is looked at keeps as many in memory


class RequestOutputKind(Enum):
    """What `AsyncLLM.generate` yields; names and values are vLLM's."""

    CUMULATIVE = 0  # all text and tokens so far, each time
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # all of it, once


def check_text_params(stop: object, detokenize: object, *flags: object) -> tuple[str, ...]:
    """Return the stop strings as a tuple.

    Args:
        stop: of `SamplingParams`, as are all of these.
        detokenize: without it there may be no stop strings.
        flags: `include_stop_str_in_output` and `skip_special_tokens`.

    Raises:
        ValueError: a value of another type, an empty string, too many strings, or too long ones.
    """
    names = ("detokenize", "include_stop_str_in_output", "skip_special_tokens")
    for name, value in zip(names, (detokenize, *flags), strict=True):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; expected True or False")
    if stop is None:
        return ()
    if isinstance(stop, bytes) or not isinstance(stop, Sequence | set | frozenset):
        raise ValueError(f"stop is {_short(stop)}; expected a string or a list of strings")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str):
            raise ValueError(f"stop has {_short(string)}; expected strings. Tokens go into stop_token_ids")
        if not string:
            raise ValueError("stop has an empty string, which every text has; leave it out")
        if len(string) > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop has a string of {len(string)} characters, {_short(string)}; at most {MAX_STOP_CHARACTERS}"
            )
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop has {len(strings)} strings; at most {MAX_STOP_STRINGS}")
    if strings and not detokenize:
        raise ValueError("stop strings are looked for in the text; set detokenize=True to use stop")
    return strings


def _short(value: object) -> str:
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."
