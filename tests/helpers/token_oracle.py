"""The library's own automaton over tokens, as an oracle for the tables of `TokenAutomaton`."""

from __future__ import annotations

from collections import deque

import numpy as np
from outlines_core import Index, Vocabulary

from mtpjax.text.token_automaton import TokenAutomaton

VOCAB_SIZE, END, OUTSIDE = 700, 698, 699  # ids of the end of a text, and one that no token has


def some_tokens(seed: int, alphabet: str) -> dict[int, bytes]:
    """Return a vocabulary of all bytes and of short random texts, some of them cut inside a character."""
    rng = np.random.default_rng(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < END:
        text = "".join(rng.choice(list(alphabet), size=rng.integers(1, 7))).encode()
        start = int(rng.integers(0, 2)) * int(rng.integers(0, len(text)))
        tokens.append(text[start : len(text) - int(rng.integers(0, 2))] or text)
    return dict(enumerate(tokens))


def differences(automaton: TokenAutomaton, regex: str, tokens: dict[int, bytes], max_pairs: int = 200) -> list[str]:
    """Compare the tokens that may follow, state by state, with those of the library's index over the same tokens.

    The library gets the expression with a byte 0 behind it, so that the end of a text is a token as others: there its
    own search forgets alternatives of less priority.
    """
    by_bytes: dict[bytes, list[int]] = {}
    for i, token in tokens.items():
        if b"\0" not in token:
            by_bytes.setdefault(token, []).append(i)
    by_bytes[b"\0"] = [OUTSIDE]
    index = Index(f"(?:{regex})\\x00", Vocabulary(VOCAB_SIZE, by_bytes))
    transitions, final = index.get_transitions(), index.get_final_states()
    todo, seen, found = deque([(0, index.get_initial_state())]), {(0, index.get_initial_state())}, []
    while todo and len(seen) < max_pairs:
        ours, theirs = todo.popleft()
        row = dict(transitions[theirs])
        may_end = row.pop(OUTSIDE, None) in final
        allowed = np.flatnonzero(automaton.allowed(ours)).tolist()
        if allowed != sorted([*row, *([END] if may_end else [])]):
            found.append(f"state {ours}: allowed {allowed[:20]}, expected {sorted(row)[:20]}, end {may_end}")
        if may_end != bool(automaton.accepting[ours]):
            found.append(f"state {ours}: accepting {automaton.accepting[ours]}, expected {may_end}")
        for token, target in row.items():
            pair = (automaton.walk([token], ours), target)
            if pair not in seen and pair[0] >= 0:
                seen.add(pair)
                todo.append(pair)
    return found
