"""Automata on the device: masks and states of rows against a walk on the host, in one batch with requests without."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtpjax.decoding.automaton import Automata, AutomatonState, automata_sizes, mask_tokens
from mtpjax.engine.batch_parts import automata_size
from mtpjax.engine.stack_automata import initial_automaton_state, stack_automata
from mtpjax.text.token_automaton import TokenAutomaton

VOCAB = 24


def random_automaton(seed: int, states: int = 5, classes: int = 4) -> TokenAutomaton:
    rng = np.random.default_rng(seed)
    next_state = rng.integers(0, states, (states, classes)).astype(np.int32)
    next_state[:, 1:][rng.random((states, classes - 1)) < 0.5] = -1
    class_of_token = rng.integers(0, classes, VOCAB).astype(np.int16)
    return TokenAutomaton(class_of_token, next_state, np.ones(states, bool))


AUTOMATA = [random_automaton(0), None, random_automaton(1, 7, 3), random_automaton(2, 2, 5)]


def expected_mask(automaton: TokenAutomaton | None, before: Sequence[int]) -> np.ndarray:
    if automaton is None or (state := automaton.walk(before)) < 0:
        return np.ones(VOCAB, bool)
    return automaton.allowed(state)


def random_walk(automaton: TokenAutomaton | None, length: int, rng: np.random.Generator) -> list[int]:
    tokens: list[int] = []
    for _ in range(length):
        tokens.append(int(rng.choice(np.flatnonzero(expected_mask(automaton, tokens)))))
    return tokens


def stacked(automata: Sequence[TokenAutomaton | None]) -> Automata | None:
    """Stack automata into arrays with just the room that they need."""
    different = {automaton for automaton in automata if automaton is not None}
    vocab_size = max((len(automaton.class_of_token) for automaton in different), default=0)
    return stack_automata(automata, automata_size(different) if different else None, vocab_size)


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_those_of_a_walk(seed: int) -> None:
    """Allowed and forbidden drafts, beside a request that has no automaton."""
    rng = np.random.default_rng(seed)
    automata = stacked(AUTOMATA)
    texts = [random_walk(automaton, 6, rng) for automaton in AUTOMATA]
    drafts = rng.integers(0, VOCAB, (4, 2)).tolist()
    state = initial_automaton_state(4).add(jnp.array(texts), jnp.array([6, 6, 4, 0]), automata)
    kept = [text[:n] for text, n in zip(texts, (6, 6, 4, 0), strict=True)]
    drafts[2] = texts[2][4:] if seed % 2 else drafts[2]  # drafts that are allowed
    logits = jnp.asarray(rng.normal(size=(4, 3, VOCAB)), jnp.float32)
    masked = np.asarray(jax.jit(mask_tokens)(logits, automata, state, jnp.array(drafts)))
    for b, automaton in enumerate(AUTOMATA):
        for r in range(3):
            allowed = expected_mask(automaton, [*kept[b], *drafts[b][:r]])
            np.testing.assert_array_equal(masked[b, r], np.where(allowed, logits[b, r], -np.inf), err_msg=f"{b} {r}")


def test_a_forbidden_draft_ends_the_automaton() -> None:
    automaton = TokenAutomaton(np.array([0, 1], np.int16), np.array([[0, -1]], np.int32), np.ones(1, bool))
    automata = stacked([automaton])
    assert automata is not None
    state = initial_automaton_state(1).before_rows(jnp.array([[0, 1, 0]]), automata)
    assert state.tolist() == [[0, 0, -1, -1]]


def test_a_part_of_the_vocabulary() -> None:
    """Columns are some ids only; where none of them may follow, a draft may be any of them."""
    automata, ids = stacked(AUTOMATA), jnp.array([1, 4, 5, 9, 20])
    logits = jnp.zeros((4, 1, 5), jnp.float32)
    state = initial_automaton_state(4).take(ids)
    rows: list[list[int]] = [[] for _ in AUTOMATA]
    for column in (2, 0, 4):
        found = np.isfinite(np.asarray(mask_tokens(logits, automata, state)))[:, 0]
        for b, automaton in enumerate(AUTOMATA):
            allowed = expected_mask(automaton, rows[b])[np.asarray(ids)]
            np.testing.assert_array_equal(found[b], allowed if allowed.any() else True)
        state = state.add(jnp.full((4, 1), column), jnp.ones(4, jnp.int32), automata)
        rows = [[*row, int(ids[column])] for row in rows]
    none = TokenAutomaton(np.array([1, 1, 0], np.int16), np.array([[0, -1]], np.int32), np.ones(1, bool))
    state = initial_automaton_state(1).take(jnp.array([0, 1]))
    assert np.isfinite(mask_tokens(jnp.zeros((1, 1, 2)), stacked([none]), state)).all()


def test_the_place_in_the_batch_does_not_matter() -> None:
    """A state stays what it is when other automata come and go: requests are refilled in the middle of a text."""
    logits = jnp.zeros((1, 1, VOCAB), jnp.float32)
    state = initial_automaton_state(1).add(jnp.array([[0, 1]]), jnp.array([2]), stacked(AUTOMATA[:1]))
    alone = mask_tokens(logits, stacked(AUTOMATA[:1]), state)
    for others in ([AUTOMATA[2]], [AUTOMATA[3], None, AUTOMATA[2]]):
        automata = stacked([AUTOMATA[0], *others])
        wide = AutomatonState(jnp.concatenate([state.state, jnp.zeros(len(others), jnp.int32)]))
        masked = mask_tokens(jnp.zeros((1 + len(others), 1, VOCAB)), automata, wide)
        np.testing.assert_array_equal(masked[0], alone[0])


def test_there_are_few_sizes() -> None:
    assert stacked([None, None]) is None and automata_sizes(None) == ()
    sizes = {automata_sizes(stacked([random_automaton(s) for s in range(n)])) for n in range(1, 40)}
    assert sizes == {(f"{n} automata", "4096 entries") for n in (2, 8, 64)}
    large = stacked([random_automaton(0, 1000, 6)])
    assert automata_sizes(large) == ("2 automata", "16384 entries")
