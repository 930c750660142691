"""`LLM.score`: how probable a continuation of a prompt is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np

from kernels_pallas.tiles import next_power_of_2
from mtpjax.argument_names import names_arguments
from mtpjax.engine.engine import Engine
from mtpjax.engine.request_logprobs import logprobs_of_prompts
from mtpjax.text.prompts import Prompt, encode_prompt
from mtpjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Score:
    """How probable a continuation is after its prompt, under the model's own distribution (temperature 1).

    Attributes:
        logprob: natural logarithm of the probability of the whole continuation: the sum of `token_logprobs`, in
            float64.
        token_logprobs: of each of its tokens after all tokens before it, float32 numbers.
        num_tokens: tokens of the continuation.
        is_greedy: whether each of its tokens is the most probable one at its place, so that greedy generation
            would write it.
    """

    logprob: float
    token_logprobs: list[float] = field(repr=False)
    num_tokens: int
    is_greedy: bool

    @property
    def perplexity(self) -> float:
        """Return exp(-logprob / num_tokens), the perplexity per token."""
        return math.exp(-self.logprob / self.num_tokens)


class _Pair(NamedTuple):
    ids: tuple[int, ...]  # of the whole
    num_prompt_tokens: int


class ScoreMethods:
    """The methods of `LLM` that score given texts."""

    tokenizer: Tokenizer | None
    engine: Engine
    max_num_seqs: int
    max_model_len: int
    cfg: Any
    _token_ids: Callable[[str, Prompt, int], tuple[int, ...]]

    @overload
    def score(self, prompt: Prompt, continuation: Prompt) -> Score: ...  # type: ignore[overload-overlap]

    @overload
    def score(self, prompt: Iterable[Prompt], continuation: Iterable[Prompt]) -> list[Score]: ...

    @names_arguments
    def score(self, prompt: Prompt | Iterable[Prompt], continuation: Prompt | Iterable[Prompt]) -> Score | list[Score]:
        """Return how probable a continuation is after a prompt; for lists of both, a list of scores.

        Nothing is generated. Up to `max_num_seqs` pairs are read together; chunks of prompts that hold no token
        before the continuation have no LM head. A score does not depend on the pairs beside it (in float32 on a CPU,
        up to 1e-5).

        Args:
            prompt: a text or token ids; or a list of them.
            continuation: a text or token ids; or a list of as many. Of two texts the tokens are split where the
                prompt's own tokens end, as lm-eval does: white space at the end of the prompt moves to the
                continuation, prompt + continuation is encoded as one text, and what follows after as many tokens as
                the prompt alone has is the continuation. Of a text and token ids each is encoded alone.

        Raises:
            ValueError: names the pair: an empty prompt or continuation, both together longer than `max_model_len`,
                ids outside the vocabulary, a text without a tokenizer, lists of unequal length.
        """
        if _is_one(prompt) and not isinstance(continuation, str) and not len(list(continuation)):  # type: ignore[arg-type]
            raise ValueError("continuation is empty; give at least one token")
        if _is_one(prompt) != _is_one(continuation):
            raise ValueError("score: one of prompt and continuation is a list; give two lists, or one of each")
        if _is_one(prompt):
            return self._scores([self._pair("", prompt, continuation)])[0]
        prompts, continuations = list(prompt), list(continuation)
        if len(prompts) != len(continuations):
            raise ValueError(f"score: {len(prompts)} prompts but {len(continuations)} continuations; give one for each")
        pairs = zip(prompts, continuations, strict=True)
        return self._scores([self._pair(f" {i}", p, c) for i, (p, c) in enumerate(pairs)])  # type: ignore[arg-type]

    def _pair(self, number: str, prompt: Any, continuation: Any) -> _Pair:
        vocab_size, tokenizer = self.cfg.vocab_size, self.tokenizer
        if isinstance(continuation, str) and not continuation:
            raise ValueError(f"continuation{number} is empty; give at least one token")
        if isinstance(prompt, str) and isinstance(continuation, str):
            stripped = prompt.rstrip()
            whole, prompt = prompt + continuation, stripped or prompt
            ids = encode_prompt(f"prompt{number} + continuation{number}", whole, tokenizer, vocab_size)
            num_prompt_tokens = len(encode_prompt(f"prompt{number}", prompt, tokenizer, vocab_size))
        else:
            first = encode_prompt(f"prompt{number}", prompt, tokenizer, vocab_size)
            ids = first + encode_prompt(f"continuation{number}", continuation, tokenizer, vocab_size)
            num_prompt_tokens = len(first)
        if num_prompt_tokens >= len(ids):
            raise ValueError(
                f"continuation{number} has no tokens of its own: prompt and continuation together have {len(ids)}, "
                f"the prompt alone {num_prompt_tokens}; give a continuation that adds one"
            )
        return _Pair(
            self._token_ids(f"prompt{number} + continuation{number}", ids, self.max_model_len), num_prompt_tokens
        )

    def _scores(self, pairs: Sequence[_Pair]) -> list[Score]:
        scores: dict[int, Score] = {}
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].ids))
        for start in range(0, len(order), self.max_num_seqs):
            group = order[start : start + self.max_num_seqs]
            batch = min(next_power_of_2(len(group)), self.max_num_seqs)
            ids: list[tuple[int, ...]] = [pairs[i].ids for i in group]
            firsts = [pairs[i].num_prompt_tokens for i in group]
            missing = batch - len(group)
            found = logprobs_of_prompts(self.engine.runner, ids + [()] * missing, 0, firsts + [1] * missing)
            for i, logprobs in zip(group, found, strict=False):
                values = logprobs.chosen.tolist()
                scores[i] = Score(
                    logprob=float(np.sum(logprobs.chosen.astype(np.float64))),
                    token_logprobs=values,
                    num_tokens=len(values),
                    is_greedy=bool(np.all(logprobs.rank == 1)),
                )
        return [scores[i] for i in range(len(pairs))]


def _is_one(prompt: Any) -> bool:
    """Return whether this is one text or one list of ids, not a collection of them."""
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, Sequence | np.ndarray) and len(prompt) > 0 and isinstance(prompt[0], int | np.integer)
