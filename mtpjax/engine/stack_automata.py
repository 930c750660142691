"""The automata of the requests in B slots, side by side in arrays of few sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np
from jax import Array

from mtpjax.decoding.automaton import Automata, AutomatonState
from mtpjax.engine.batch_parts import AutomataSize
from mtpjax.text.token_automaton import TokenAutomaton


def stack_automata(
    automata: Sequence[TokenAutomaton | None], size: AutomataSize | None, padded_vocab_size: int
) -> Automata | None:
    """Put the automata of B slots side by side.

    Args:
        automata: of the slots; None: the slot's request may have any token.
        size: of the arrays, with room for them; None: the program has no automata.
        padded_vocab_size: number of logits of a row.
    """
    if size is None:
        return None
    different = tuple(sorted({a for a in automata if a is not None}, key=id))
    class_of_token, table = _tables(different, size, padded_vocab_size)
    starts = np.cumsum([1] + [a.next_state.size for a in different])
    place = {a: (i + 1, starts[i]) for i, a in enumerate(different)}
    rows = [(0, 0) if a is None else place[a] for a in automata]
    row, start = jax.device_put(tuple(np.array(column, np.int32) for column in zip(*rows, strict=True)))
    return Automata(class_of_token=class_of_token, table=table, row=row, start=start)


def initial_automaton_state(batch: int) -> AutomatonState:
    """Return the state before the first new token of `batch` slots."""
    return AutomatonState(state=jax.device_put(np.zeros(batch, np.int32)))


@lru_cache(maxsize=2)
def _tables(automata: tuple[TokenAutomaton, ...], size: AutomataSize, vocab_size: int) -> tuple[Array, Array]:
    """Return the classes and the table of some automata on the device, behind those of one that allows everything.

    They are kept, because requests that follow one another mostly have the same automata.
    """
    classes = np.zeros((size.rows, vocab_size), np.int16)
    table, start = np.full(size.entries, -1, np.int32), 1
    table[0] = 0
    for row, automaton in zip(classes[1:], automata, strict=False):
        row[:] = automaton.class_of_token
        next_state = automaton.next_state
        end = start + next_state.size
        table[start:end] = np.where(next_state < 0, -1, next_state * next_state.shape[1]).reshape(-1)
        start = end
    return jax.device_put((classes, table))
