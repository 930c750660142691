"""The thought and the answer in a model's text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"
_TURN = "<|im_start|>"
Place = Literal["inside", "after", "turn", "text"]
"""Inside a thought, after one, in a turn of a chat that has none so far, or in a text that is not a chat."""


@dataclass(frozen=True)
class Thought:
    """A text, taken apart.

    Attributes:
        reasoning: the thought without its marks and the white space around it; None if there is none.
        content: the rest, without the line breaks after `</think>`; None if the thought did not end.
        unfinished: whether the text ended inside the thought.
    """

    reasoning: str | None
    content: str | None
    unfinished: bool


def thought_state(prompt: str) -> Place:
    """Return where a text continues that follows a prompt."""
    if _TURN not in prompt:  # a text that mentions the marks is not a chat
        end = prompt.rstrip()
        return "inside" if end.endswith(OPEN) else "after" if end.endswith(CLOSE) else "text"
    turn = prompt[prompt.rfind(_TURN) :]
    opened, closed = turn.rfind(OPEN), turn.rfind(CLOSE)
    return "turn" if opened == closed else "inside" if opened > closed else "after"


def split_thought(text: str, place: Place) -> Thought:
    """Take a model's text apart.

    Args:
        text: with its marks.
        place: `thought_state` of the prompt. A text may also open its thought itself, or close one that neither it nor
            the prompt opened, as some models do in a turn of a chat.
    """
    begun = text.lstrip().startswith(OPEN)
    if not begun and place != "inside" and not (place == "turn" and CLOSE in text):
        return Thought(None, text, False)
    body = text.lstrip().removeprefix(OPEN) if begun else text
    reasoning, mark, content = body.partition(CLOSE)
    return Thought(reasoning.strip(), content.lstrip("\n") if mark else None, not mark)
