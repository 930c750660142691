"""Structured outputs on the device: which tokens may follow, stepped in the loop for drafts as for verified rows.

An automaton has a class for each token and a table of the states that follow (`mtpjax.text.token_automaton`). Those of
all requests in a batch stand in one table. The state of a request is the place of its row in the table of its own
automaton, so it does not depend on the others that are there. A request without structured output has the automaton
that allows everything: one state, one class.

The logits of a row depend on the text before it, drafts included, and on the request, in drafter and trunk alike. So
the text is the same at every draft length and in any batch. A draft that the automaton forbids leads to the state -1.
The rows after it mean nothing, since such a draft is never accepted.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int


class Automata(struct.PyTreeNode):
    """The automata of B requests."""

    class_of_token: Int[Array, "A V"]  # int16; row 0 is the automaton that allows everything
    table: Int[Array, " T"]  # the state after a token: [states, classes] of each automaton; -1: not allowed; int32
    row: Int[Array, " B"]  # of `class_of_token`
    start: Int[Array, " B"]  # place of the automaton's table in `table`

    def next_state(self, state: Int[Array, " B"], token_ids: Int[Array, " B"]) -> Int[Array, " B"]:
        """Return the states after one token each; -1 stays -1."""
        found = self.table[self.start + jnp.maximum(state, 0) + self.class_of_token[self.row, token_ids]]
        return jnp.where(state < 0, -1, found)

    def allowed(self, states: Int[Array, "B R"], token_ids: Int[Array, " N"] | None = None) -> Bool[Array, "B R N"]:
        """Return whether each token may follow; in the state -1 each may.

        Args:
            token_ids: of the columns; None: all.
        """
        classes = self.class_of_token if token_ids is None else self.class_of_token[:, token_ids]
        places = self.start[:, None] + jnp.maximum(states, 0)
        found = self.table[places[:, :, None] + classes[self.row][:, None, :]]
        return (found >= 0) | (states < 0)[:, :, None]


class AutomatonState(struct.PyTreeNode):
    """Where B texts stand in their automata."""

    state: Int[Array, " B"]  # int32; 0 is the first, -1 that of a text that the automaton forbids
    token_ids: Int[Array, " N"] | None = None  # that "tokens" are places of; None: tokens are ids

    def add(self, tokens: Int[Array, "B R"], num_tokens: Int[Array, " B"], automata: Automata | None) -> AutomatonState:
        """Return the state after the first `num_tokens` of `tokens`."""
        assert automata is not None, "a state without automata"
        ids = tokens if self.token_ids is None else self.token_ids[tokens]
        state = self.state
        for j in range(tokens.shape[1]):
            state = jnp.where(j < num_tokens, automata.next_state(state, ids[:, j]), state)
        return self.replace(state=state)

    def take(self, token_ids: Int[Array, " N"]) -> AutomatonState:
        """Return the state for logits of these ids only; from then on "tokens" are their places among `token_ids`."""
        return self.replace(token_ids=token_ids)

    def before_rows(self, drafts: Int[Array, "B k"] | None, automata: Automata) -> Int[Array, "B R"]:
        """Return the state before each of R = k + 1 rows: that of the text, and after each of the drafts."""
        states = [self.state]
        for j in range(0 if drafts is None else drafts.shape[1]):
            states.append(automata.next_state(states[-1], drafts[:, j]))  # type: ignore[index]
        return jnp.stack(states, axis=1)


def mask_tokens(
    logits: Float[Array, "B R V"],
    automata: Automata | None,
    automaton_state: AutomatonState | None,
    drafts: Int[Array, "B k"] | None = None,
) -> Float[Array, "B R V"]:
    """Return the logits with -inf for tokens that must not follow; the logits themselves if there are no automata.

    Among a part of the vocabulary there may be none that may follow: such a row keeps its logits, and its draft is
    rejected.

    Args:
        logits: float32; row r follows the text of `automaton_state` and the first r of `drafts`.
        automata: of the requests; None: there are none.
        automaton_state: of the text before the first row.
        drafts: tokens that the rows after the first have before them; None: none.
    """
    if automata is None or automaton_state is None:
        return logits
    allowed = automata.allowed(automaton_state.before_rows(drafts, automata), automaton_state.token_ids)
    if automaton_state.token_ids is not None:
        allowed |= ~jnp.any(allowed, axis=-1, keepdims=True)
    return jnp.where(allowed, logits, -jnp.inf)


def automata_sizes(automata: Automata | None) -> tuple[str, ...]:
    """Return what the name of a program says of the automata: sizes of their arrays; nothing if there are none."""
    if automata is None:
        return ()
    return (f"{automata.class_of_token.shape[0]} automata", f"{automata.table.shape[0]} entries")
