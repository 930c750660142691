"""What changes the logits of a row beside the model, the same in drafter and trunk.

A processor may look at the request, and at the tokens before the row: those that the text has, and the drafts in
between. The logits of a row then do not depend on how many tokens are drafted, nor on the other requests in the batch.
"""

from __future__ import annotations

from flax import struct
from jax import Array
from jaxtyping import Float, Int

from mtpjax.decoding.automaton import Automata, AutomatonState, mask_tokens
from mtpjax.decoding.constraints import RecentTokens, apply_constraints
from mtpjax.decoding.penalties import TokenCounts, apply_penalties
from mtpjax.decoding.sampling import BatchSamplingParams


class TextState(struct.PyTreeNode):
    """What the processors remember of B texts. A part is None if no request needs it."""

    token_counts: TokenCounts | None = None  # for penalties
    recent_tokens: RecentTokens | None = None  # for bad words and `min_tokens`
    automaton: AutomatonState | None = None  # for structured outputs

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that are there: a program is compiled for each combination in use."""
        return tuple(name for name, value in vars(self).items() if value is not None)

    def add(
        self, tokens: Int[Array, "B R"], num_tokens: Int[Array, " B"], automata: Automata | None = None
    ) -> TextState:
        """Return the state after the first `num_tokens` of `tokens`; `automata` are those of the requests."""
        counts, recent, automaton = self.token_counts, self.recent_tokens, self.automaton
        return self.replace(
            token_counts=None if counts is None else counts.add(tokens, num_tokens),
            recent_tokens=None if recent is None else recent.add(tokens, num_tokens),
            automaton=None if automaton is None else automaton.add(tokens, num_tokens, automata),
        )

    def take(self, token_ids: Int[Array, " N"]) -> TextState:
        """Return the state for logits of these ids only; from then on "tokens" are their places among `token_ids`."""
        counts, recent, automaton = self.token_counts, self.recent_tokens, self.automaton
        return self.replace(
            token_counts=None if counts is None else counts.take(token_ids),
            recent_tokens=None if recent is None else recent.take(token_ids),
            automaton=None if automaton is None else automaton.take(token_ids),
        )


NO_STATE = TextState()


def process_logits(
    logits: Float[Array, "B R V"],
    sampling_params: BatchSamplingParams,
    text_state: TextState,
    drafts: Int[Array, "B k"] | None = None,
) -> Float[Array, "B R V"]:
    """Return the logits that tokens are sampled from, float32.

    Args:
        logits: float32; row r follows the text in `text_state` and the first r of `drafts`.
        sampling_params: of the requests.
        text_state: prompt and text before the first row.
        drafts: tokens that the rows after the first have before them; None: none.
    """
    logits = mask_tokens(logits, sampling_params.automata, text_state.automaton, drafts)
    is_masked = sampling_params.automata is not None
    logits = apply_constraints(
        logits, sampling_params.constraints, text_state.recent_tokens, drafts, is_masked=is_masked
    )
    return apply_penalties(logits, sampling_params.penalties, text_state.token_counts, drafts)
