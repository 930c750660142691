"""Stop strings: found in a text that grows token by token, so that the place does not depend on how tokens arrive.

The engine knows no tokenizer. A request that needs its text while it runs, for stop strings or for a stream, brings a
function that makes a `TextReader`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextOptions:
    """How the text of a request is made of its tokens: the fields of `SamplingParams` of these names."""

    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True


class StopStrings:
    """Looks for strings in a text that grows. It keeps no more of the text than the longest string.

    Args:
        stop: not empty strings; of several that end in one piece of the text the first of the list counts, as in vLLM.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._num_kept = max(map(len, self._stop), default=1) - 1
        self._end = ""  # of the text so far, `_num_kept` characters
        self._num_before = 0  # characters of the text before `_end`

    def add(self, piece: str, looks: bool = True) -> tuple[str, int] | None:
        """Append a piece to the text. Returns a stop string that ends in it and where it begins in the text, or None.

        Args:
            piece: of one token.
            looks: whether stop strings that end in this piece count.
        """
        text = self._end + piece
        if looks:
            for stop in self._stop:
                if stop[-1] in piece:
                    start = text.find(stop, max(0, len(self._end) - len(stop) + 1))
                    if start >= 0:
                        return stop, self._num_before + start
        num_dropped = max(0, len(text) - self._num_kept)
        self._end, self._num_before = text[num_dropped:], self._num_before + num_dropped
        return None

    @property
    def num_open(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            start = max(0, len(self._end) - len(stop) + 1)
            while (start := self._end.find(stop[0], start)) >= 0:
                if stop.startswith(self._end[start:]):
                    longest = max(longest, len(self._end) - start)
                    break
                start += 1
        return longest


class TextReader:
    """Reads the tokens of one request as they come: finds stop strings, and hands out text that stays.

    Every token is looked at by itself, in order, so the result is the same however many come together.

    Args:
        decode_token: returns the characters that are whole with a token.
        options: of the request.
        min_tokens: tokens before the one that may complete a stop string.
        stop_token_ids: tokens that end the text; their own text counts only with `include_stop_str_in_output`.
        keeps_text: whether `take` is called; otherwise no text is kept.

    Attributes:
        stop_string: the one that was found, or None.
        num_characters: of the text up to the cut, if one was found.
    """

    def __init__(
        self,
        decode_token: Callable[[int], str],
        options: TextOptions,
        *,
        min_tokens: int = 0,
        stop_token_ids: Collection[int] = (),
        keeps_text: bool = False,
    ):
        self._decode_token, self._options, self._min_tokens = decode_token, options, min_tokens
        self._silent_tokens = () if options.include_stop_str_in_output else stop_token_ids
        self._stops, self._keeps_text = StopStrings(options.stop), keeps_text
        self._num_tokens = self._num_taken = 0
        self._pieces: list[str] = []
        self.stop_string: str | None = None
        self.num_characters: int | None = None

    @property
    def has_stop_strings(self) -> bool:
        """Whether this reader may end the text."""
        return bool(self._options.stop)

    def read(self, tokens: Sequence[int]) -> int:
        """Read the next tokens. Returns how many of them the text has: up to the one that completes a stop string."""
        for count, token in enumerate(tokens, 1):
            self._num_tokens += 1
            if token in self._silent_tokens:
                continue
            piece = self._decode_token(token)
            if self._keeps_text:
                self._pieces.append(piece)
            found = self._stops.add(piece, self._num_tokens > self._min_tokens)
            if found is not None:
                self.stop_string, start = found
                included = len(self.stop_string) if self._options.include_stop_str_in_output else 0
                self.num_characters = start + included
                return count
        return len(tokens)

    def take(self) -> str:
        """Return the text that is new since the last call and stays, whatever follows."""
        text = "".join(self._pieces)
        if self.num_characters is not None:
            text, rest = text[: self.num_characters - self._num_taken], ""
        else:
            num_open = 0 if self._options.include_stop_str_in_output else self._stops.num_open
            text, rest = text[: len(text) - num_open], text[len(text) - num_open :]
        self._pieces = [rest] if rest else []
        self._num_taken += len(text)
        return text
