"""The automata of the requests in B slots, side by side in arrays of few sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np
from jax import Array

from mtpjax.decoding.automaton import Automata, AutomatonState
from mtpjax.text.token_automaton import TokenAutomaton

# A program is compiled for each combination of sizes in use: powers of these, at least these.
_ROWS, _ENTRIES = 8, 4096
_ROWS_STEP, _ENTRIES_STEP = 8, 4


def stack_automata(automata: Sequence[TokenAutomaton | None]) -> Automata | None:
    """Put the automata of B slots side by side; None if no slot has one.

    The number of automata is rounded up to 2, 8, 64, 512, ..., and that of entries in the table to a power of 4.
    """
    different = tuple(sorted({a for a in automata if a is not None}, key=id))
    if not different:
        return None
    class_of_token, table = _tables(different)
    starts = np.cumsum([1] + [a.next_state.size for a in different])
    place = {a: (i + 1, starts[i]) for i, a in enumerate(different)}
    rows = [(0, 0) if a is None else place[a] for a in automata]
    row, start = jax.device_put(tuple(np.array(column, np.int32) for column in zip(*rows, strict=True)))
    return Automata(class_of_token=class_of_token, table=table, row=row, start=start)


def initial_automaton_state(batch: int) -> AutomatonState:
    """Return the state before the first new token of `batch` slots."""
    return AutomatonState(state=jax.device_put(np.zeros(batch, np.int32)))


@lru_cache(maxsize=2)
def _tables(automata: tuple[TokenAutomaton, ...]) -> tuple[Array, Array]:
    """Return the classes and the table of some automata on the device, behind those of one that allows everything.

    They are kept, because requests that follow one another mostly have the same automata.
    """
    num_rows = 2 if len(automata) == 1 else _at_least(len(automata) + 1, _ROWS, _ROWS_STEP)
    num_entries = _at_least(1 + sum(a.next_state.size for a in automata), _ENTRIES, _ENTRIES_STEP)
    classes = np.zeros((num_rows, len(automata[0].class_of_token)), np.int16)
    table, start = np.full(num_entries, -1, np.int32), 1
    table[0] = 0
    for row, automaton in zip(classes[1:], automata, strict=False):
        row[:] = automaton.class_of_token
        next_state = automaton.next_state
        size, num_classes = next_state.size, next_state.shape[1]
        table[start : start + size] = np.where(next_state < 0, -1, next_state * num_classes).reshape(-1)
        start += size
    return jax.device_put((classes, table))


def _at_least(number: int, smallest: int, step: int) -> int:
    """Return the first of smallest, smallest * step, smallest * step**2, ... that is not below `number`."""
    while smallest < number:
        smallest *= step
    return smallest
