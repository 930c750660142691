"""How many tokens are drafted: the arguments of `LLM` and of a request, checked."""

from __future__ import annotations

from mtpjax.decoding.acceptance import SimulatedAcceptance
from mtpjax.decoding.rules import REJECTION, AcceptanceArgument
from mtpjax.engine.depth import auto_depths
from mtpjax.sampling_params import check_int

MAX_SPECULATIVE_TOKENS = 8
DRAFTS_BY_DEFAULT = 3
AUTO_MAX_BY_DEFAULT = 6


def draft_depths(
    num_speculative_tokens: int | str, max_speculative_tokens: int | None, acceptance: AcceptanceArgument
) -> tuple[int, tuple[int, ...] | None]:
    """Return the tokens drafted in a step at most, and for "auto" the depths to choose among, else None.

    Raises:
        ValueError: out of range; a maximum without "auto"; "auto" with the rejection rule, under which the text depends
            on the depth and so would depend on measured times; "auto" with fewer simulated rates than drafts.
    """
    if not isinstance(num_speculative_tokens, str):
        check_int("num_speculative_tokens", num_speculative_tokens, 0, MAX_SPECULATIVE_TOKENS)
        if max_speculative_tokens is not None:
            raise ValueError(
                f"max_speculative_tokens is {max_speculative_tokens!r}, but num_speculative_tokens is "
                f'{num_speculative_tokens} and not "auto"; give one of them'
            )
        return num_speculative_tokens, None
    if num_speculative_tokens != "auto":
        raise ValueError(
            f"num_speculative_tokens is {num_speculative_tokens!r}; "
            f'expected "auto" or a whole number from 0 to {MAX_SPECULATIVE_TOKENS}'
        )
    if acceptance == REJECTION:
        raise ValueError(
            'num_speculative_tokens="auto" with acceptance="rejection": the text would depend on measured times; '
            "give a number of drafts"
        )
    check_int("max_speculative_tokens", max_speculative_tokens, 1, MAX_SPECULATIVE_TOKENS, optional=True)
    most = AUTO_MAX_BY_DEFAULT if max_speculative_tokens is None else max_speculative_tokens
    if isinstance(acceptance, SimulatedAcceptance):
        acceptance.truncate(most)
    return most, auto_depths(most)


def check_limit(name: str, limit: int | None, num_speculative_tokens: int) -> int | None:
    """Return the drafts that a request allows.

    Raises:
        ValueError: more than the LLM drafts.
    """
    if limit is not None and limit > num_speculative_tokens:
        raise ValueError(
            f"{name}: num_speculative_tokens is {limit}, and the LLM drafts at most {num_speculative_tokens} tokens in "
            "a step; ask for fewer or make an LLM with more"
        )
    return limit
