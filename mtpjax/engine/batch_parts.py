"""`BatchParts`: what the program of a batch has beside plain sampling. Few programs serve requests of all kinds.

A program is compiled for each combination of parts. Its results do not depend on parts that a request does not use, so
a batch may run a program that has more than it needs. `choose_parts` takes one that is there already, if it can.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mtpjax.decoding.constraints import BAD_WORD_CAPACITIES
from mtpjax.decoding.logprobs import RAW, LogprobsSpec
from mtpjax.engine.request import Request
from mtpjax.text.token_automaton import TokenAutomaton

NUM_TOP_SIZES = (0, 5, 20)  # most probable tokens of a row, and `max_logprobs`
# Sizes of stacked automata: powers of the steps, at least the first numbers.
_ROWS, _ENTRIES = 8, 4096
_ROWS_STEP, _ENTRIES_STEP = 8, 4


class AutomataSize(NamedTuple):
    """Sizes of the arrays that hold the automata of a batch.

    Attributes:
        rows: automata, with the one that allows everything.
        entries: of the table of next states.
    """

    rows: int
    entries: int


@dataclass(frozen=True)
class BatchParts:
    """The parts of a program; each is absent by default.

    Attributes:
        penalties: presence, frequency and repetition penalties.
        bias: logit biases and allowed tokens.
        bad_words: bad words and `min_tokens`, with room for so many words of so many tokens.
        automata: structured outputs.
        logprobs: log-probabilities of new tokens.
    """

    penalties: bool = False
    bias: bool = False
    bad_words: tuple[int, int] | None = None
    automata: AutomataSize | None = None
    logprobs: LogprobsSpec | None = None

    def union(self, other: BatchParts) -> BatchParts:
        """Return the smallest parts that cover both."""
        bad_words = [parts.bad_words for parts in (self, other) if parts.bad_words is not None]
        automata = [parts.automata for parts in (self, other) if parts.automata is not None]
        logprobs = [parts.logprobs for parts in (self, other) if parts.logprobs is not None]
        return BatchParts(
            penalties=self.penalties or other.penalties,
            bias=self.bias or other.bias,
            bad_words=max(bad_words, default=None),
            automata=AutomataSize(*map(max, zip(*automata, strict=True))) if automata else None,
            logprobs=max(logprobs, default=None),
        )

    def covers(self, other: BatchParts) -> bool:
        """Return whether a program with these parts can run requests that need the others."""
        return self.union(other) == self


PLAIN = BatchParts()


def parts_of(
    requests: Iterable[Request | None], waiting: Iterable[Request] = (), max_logprobs: int = 20, mode: str = RAW
) -> BatchParts:
    """Return the parts that requests need.

    Args:
        requests: those that have a slot.
        waiting: those that come after them. They count too, so that one program serves all of them; but room is made
            for automata only when they are there.
        max_logprobs, mode: of the model runner.
    """
    running = [r for r in requests if r is not None]
    known = [*running, *waiting]
    words = [word for r in known for word in r.bad_words]
    num_words = max((len(r.bad_words) for r in known), default=0)
    longest = max(map(len, words), default=0)
    asked = [r.logprobs for r in known if r.logprobs is not None]
    automata = None
    if any(r.automaton is not None for r in known):
        automata = automata_size({r.automaton for r in running if r.automaton is not None})
    return BatchParts(
        penalties=any(r.has_penalties for r in known),
        bias=any(r.logit_bias or r.allowed_token_ids for r in known),
        bad_words=next(c for c in BAD_WORD_CAPACITIES if num_words <= c[0] and longest <= c[1])
        if any(r.bad_words or r.min_tokens for r in known)
        else None,
        automata=automata,
        logprobs=LogprobsSpec(num_top_size(max(asked), max_logprobs), mode) if asked else None,
    )


def choose_parts(needed: BatchParts, current: BatchParts | None, made: Collection[BatchParts]) -> BatchParts:
    """Return the parts of the program that runs a batch.

    A run keeps its program as long as it has what is needed. A batch of plain requests begins with a plain program,
    which is the fastest. Otherwise a program that is there already is taken before another one is made.

    Args:
        needed: by the requests.
        current: of the program that the run uses; None: it has not begun.
        made: of the programs that are there.
    """
    if current is None:
        current = PLAIN
        if needed == PLAIN:
            return PLAIN
    if current.covers(needed):
        return current
    wanted = needed.union(current)
    return min((parts for parts in made if parts.covers(wanted)), key=_cost, default=wanted)


def num_top_size(num_top: int, max_logprobs: int) -> int:
    """Return the number of most probable tokens that a program computes where `num_top` of them are asked for."""
    return min(size for size in (*NUM_TOP_SIZES, max_logprobs) if num_top <= size <= max_logprobs)


def automata_size(automata: Collection[TokenAutomaton]) -> AutomataSize:
    """Return the room that some different automata get.

    The number of automata is rounded up to 2, 8, 64, 512, ..., and that of entries in the table to a power of 4.
    """
    num_rows = 2 if len(automata) <= 1 else _at_least(len(automata) + 1, _ROWS, _ROWS_STEP)
    return AutomataSize(num_rows, _at_least(1 + sum(a.next_state.size for a in automata), _ENTRIES, _ENTRIES_STEP))


def _at_least(number: int, smallest: int, step: int) -> int:
    """Return the first of smallest, smallest * step, smallest * step**2, ... that is not below `number`."""
    while smallest < number:
        smallest *= step
    return smallest


def _cost(parts: BatchParts) -> tuple[int, int, int]:
    present = (parts.penalties, parts.bias, parts.bad_words, parts.automata, parts.logprobs)
    size = parts.automata.entries if parts.automata else 0
    return sum(map(bool, present)), size, parts.logprobs.num_top if parts.logprobs else 0
