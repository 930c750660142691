"""A deterministic automaton over the tokens of a vocabulary, as tables for the device.

An automaton over bytes becomes one over tokens: a token is a function from states to states, the composition of those
of its bytes. Tokens with the same function are one class, and tables have a column for a class instead of one for a
token: vocabularies have hundreds of thousands of tokens, but few functions. The functions are found byte by byte, for
all tokens together: after i bytes there are few different functions, and each is extended by few different bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtpjax.text.regex_dfa import ByteDfa

MAX_CLASSES = 32_000  # of tokens; their numbers are int16
MAX_TABLE_ENTRIES = 1 << 24  # states times classes of one automaton, 64 MiB as int32
_ENTRIES_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """Which tokens may follow, as tables. Two of them are equal if they are the same object.

    Attributes:
        class_of_token: the class of each token id, int16 `[V]`.
        next_state: the state after a token of each class, -1 where it must not follow, int32 `[S, C]`. State 0 is the
            first. In every state some token is allowed.
        accepting: whether the text may end in a state, bool `[S]`.
    """

    class_of_token: np.ndarray
    next_state: np.ndarray
    accepting: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of the tables on the device."""
        return self.class_of_token.nbytes + self.next_state.nbytes

    @property
    def nbytes_as_bit_masks(self) -> int:
        """Bytes that a mask of one bit for each state and token would take, without the states that follow."""
        return len(self.next_state) * -(-len(self.class_of_token) // 8)

    def allowed(self, state: int) -> np.ndarray:
        """Return whether each token id may follow in `state`, bool `[V]`."""
        return self.next_state[state][self.class_of_token] >= 0

    def walk(self, token_ids: Sequence[int], state: int = 0) -> int:
        """Return the state after some tokens, -1 if one of them is not allowed."""
        for token in token_ids:
            if state >= 0:
                state = int(self.next_state[state, self.class_of_token[token]])
        return state


class TokenBytes:
    """The bytes of the tokens that may stand in a text.

    Args:
        tokens: the bytes of some token ids, none of them empty.
        vocab_size: number of logits V of a row, ids above all of `tokens` included.
    """

    def __init__(self, tokens: dict[int, bytes], vocab_size: int):
        self.ids, self.vocab_size = np.array(list(tokens), np.int64), vocab_size
        self.lengths = np.array([len(token) for token in tokens.values()], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        self.data = np.frombuffer(b"".join(tokens.values()), np.uint8)


def build_token_automaton(dfa: ByteDfa, tokens: TokenBytes, end_token_ids: Sequence[int]) -> TokenAutomaton:
    """Return the automaton of the token sequences whose bytes `dfa` accepts, each followed by an end-of-text token.

    The end-of-text tokens are allowed exactly where the text may end. A token that leads to where no further token is
    allowed is not allowed either.

    Raises:
        ValueError: nothing matches, the tokens cannot spell what matches, or the automaton is too large.
    """
    num_states = len(dfa.next_state)
    table = np.concatenate([dfa.next_state, np.full((1, 256), -1, np.int32)])
    table = np.where(table < 0, num_states, table)  # the row behind the last is that of texts that do not match
    accepting = np.append(dfa.accepting, False)
    live = _states_that_reach(table, accepting)
    if not live[0]:
        raise ValueError("no text satisfies it")
    table[~live[table]] = num_states
    classes, functions = _functions_of_tokens(table, tokens)

    end = np.where(accepting, np.arange(num_states + 1), num_states).astype(np.int32)
    never = np.full(num_states + 1, num_states, np.int32)
    next_state = np.stack([*functions, end, never], axis=1)
    class_of_token = np.full(tokens.vocab_size, len(functions) + 1, np.int32)
    class_of_token[tokens.ids] = classes
    class_of_token[list(end_token_ids)] = len(functions)

    live = _states_that_reach(next_state, accepting)
    if not live[0]:
        raise ValueError(_unspelled(table, tokens))
    next_state[~live[next_state]] = num_states
    return _compact(next_state, accepting, class_of_token)


def _functions_of_tokens(table: np.ndarray, tokens: TokenBytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each token's function, and the functions `[C, S + 1]`."""
    num_states = len(table) - 1
    columns, byte_class = np.unique(table, axis=1, return_inverse=True)
    byte_class, num_byte_classes = byte_class.reshape(-1), columns.shape[1]
    functions = [np.arange(num_states + 1, dtype=np.int32), np.full(num_states + 1, num_states, np.int32)]
    number = {function.tobytes(): i for i, function in enumerate(functions)}
    nowhere = 1
    current = np.zeros(len(tokens.ids), np.int64)
    for position in range(int(tokens.lengths.max(initial=0))):
        active = np.flatnonzero((tokens.lengths > position) & (current != nowhere))
        if not len(active):
            break
        pairs = current[active] * num_byte_classes + byte_class[tokens.data[tokens.starts[active] + position]]
        different, which = np.unique(pairs, return_inverse=True)
        result = np.empty(len(different), np.int64)
        known = np.stack(functions)
        block = max(1, _ENTRIES_AT_ONCE // (num_states + 1))
        for start in range(0, len(different), block):
            part = different[start : start + block]
            extended = columns[known[part // num_byte_classes], (part % num_byte_classes)[:, None]].astype(np.int32)
            for i, function in enumerate(extended, start):
                new = number.setdefault(function.tobytes(), len(functions))
                if new == len(functions):
                    functions.append(function)
                result[i] = new
            if len(functions) > MAX_CLASSES or len(functions) * num_states > MAX_TABLE_ENTRIES:
                raise ValueError(_too_large(num_states, len(functions)))
        current[active] = result[which.reshape(-1)]
    used, classes = np.unique(current, return_inverse=True)
    return classes.reshape(-1), np.stack([functions[i] for i in used]) if len(used) else np.empty((0, num_states + 1))


def _states_that_reach(next_state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Return which states have a path to one of the states `goal`, bool `[S]`."""
    num_states, num_classes = next_state.shape
    order = np.argsort(next_state, axis=None, kind="stable")
    bounds = np.searchsorted(next_state.reshape(-1)[order], np.arange(num_states + 1))
    sources, found = order // num_classes, goal.copy()
    todo = list(np.flatnonzero(goal))
    while todo:
        state = todo.pop()
        before = np.unique(sources[bounds[state] : bounds[state + 1]])
        new = before[~found[before]]
        found[new] = True
        todo += list(new)
    return found


def _compact(next_state: np.ndarray, accepting: np.ndarray, class_of_token: np.ndarray) -> TokenAutomaton:
    """Keep the states that a text reaches, in the order of their discovery, and one column for equal ones."""
    nowhere = len(next_state) - 1
    number = np.full(len(next_state), -1, np.int32)
    number[0], order = 0, [0]
    for state in order:  # it grows
        following = np.unique(next_state[state])
        new = following[(number[following] < 0) & (following != nowhere)]
        number[new] = np.arange(len(order), len(order) + len(new))
        order += new.tolist()
    columns, which = np.unique(number[next_state[order]], axis=1, return_inverse=True)
    num_states, num_classes = columns.shape
    if num_classes > MAX_CLASSES or num_states * num_classes > MAX_TABLE_ENTRIES:
        raise ValueError(_too_large(num_states, num_classes))
    class_of_token = which.reshape(-1)[class_of_token].astype(np.int16)
    return TokenAutomaton(class_of_token, np.ascontiguousarray(columns, np.int32), accepting[order])


def _too_large(num_states: int, num_classes: int) -> str:
    return (
        f"its automaton has {num_states} states and at least {num_classes} classes of tokens; at most {MAX_CLASSES} "
        f"classes and a table of {MAX_TABLE_ENTRIES} entries ({MAX_TABLE_ENTRIES >> 18} MiB) are supported; simplify it"
    )


def _unspelled(table: np.ndarray, tokens: TokenBytes) -> str:
    """Name the bytes that texts may need and no token has."""
    needed = np.any(table[:-1] != len(table) - 1, axis=0)
    needed[np.unique(tokens.data)] = False
    missing = [repr(chr(byte)) if byte < 128 else f"byte 0x{byte:02x}" for byte in np.flatnonzero(needed)]
    what = f": no token has {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}" if missing else ""
    return f"the tokens of the vocabulary cannot spell any text that satisfies it{what}"
