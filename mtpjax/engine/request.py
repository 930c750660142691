"""`Request` and `RequestState`: what the engine is asked to generate, and what it has generated so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mtpjax.decoding.logprobs import TokenLogprobs
from mtpjax.engine.stop_strings import TextOptions, TextReader
from mtpjax.text.token_automaton import TokenAutomaton


@dataclass(frozen=True)
class Request:
    """One checked prompt with its limits and its own randomness.

    Attributes:
        index: number of the prompt in the call; with `sample` unique within a run of the engine.
        max_tokens: new tokens at most; 0 asks for none.
        temperature: 0 is greedy.
        seed: of the noise; its lowest 32 bits count.
        stop_token_ids: tokens that the request itself names as the end of its text.
        eos_token_ids: the checkpoint's own end-of-text tokens; empty if the request ignores them.
        top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty: as in `SamplingParams`.
        min_tokens: new tokens before which `early_stop_token_ids` are forbidden.
        early_stop_token_ids: `all_stop_token_ids`, and the checkpoint's own even if the request ignores them.
        logit_bias: pairs of a token id and what is added to its logit.
        allowed_token_ids: the only tokens of the text; empty: all.
        bad_words: token sequences that the text may not have.
        sample, n: number of this sample among the n of its prompt. Samples of a prompt come one after another.
        logprobs, prompt_logprobs: as in `SamplingParams`; at most `max_logprobs` of the `ModelRunner`.
        automaton: which tokens may follow, for a structured output; None: all.
        text_options: how its text is made of its tokens.
        make_reader: makes what reads its tokens as they come; None: its text is made when it is finished.
        num_speculative_tokens: drafts of a step at most; None: as many as the others.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    early_stop_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    sample: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    automaton: TokenAutomaton | None = None
    text_options: TextOptions = TextOptions()
    make_reader: Callable[[], TextReader] | None = field(default=None, compare=False, repr=False)
    num_speculative_tokens: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty changes the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def all_stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the text, each once: those of the request, then those of the checkpoint."""
        return tuple(dict.fromkeys(self.stop_token_ids + self.eos_token_ids))


@dataclass
class RequestState:
    """What a request has produced. Seconds are wall-clock, synchronised with the device, without compilation.

    Attributes:
        tokens: new tokens; a stop token, or the token that completes a stop string, is the last of them.
        finished: no more tokens follow.
        stopped: a stop token ended the text, not `max_tokens`.
        prefill_seconds: of the prefill that read its prompt, together with those of other requests.
        decode_seconds: of the decode loop while the request had a slot in it.
        num_steps: steps of the loop that gave it tokens; with a stop string also those of the same call after it.
        num_accepted_tokens_per_pos: steps in which the draft at each position was accepted; known at the end.
        logprobs: of the tokens, on the host, one part after the other; empty if the request asks for none.
        aborted: somebody ended it before its time.
        reader: of `Request.make_reader`.
        num_drafts: steps that drafted for it.
        num_draft_tokens: tokens that were drafted for it.
        num_cached_tokens: prompt tokens that came from a prefix which requests share.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    stopped: bool = False
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_steps: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    aborted: bool = False
    reader: TextReader | None = None
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_cached_tokens: int = 0

    def __post_init__(self) -> None:
        if self.reader is None and self.request.make_reader is not None:
            self.reader = self.request.make_reader()

    def add(self, tokens: list[int], logprobs: TokenLogprobs | None = None) -> list[int]:
        """Append the new tokens up to the one that completes a stop string. Returns those that were appended."""
        if self.reader is not None:
            tokens = tokens[: self.reader.read(tokens)]
        self.tokens += tokens
        if logprobs is not None:
            self.logprobs.append(TokenLogprobs(*(array[: len(tokens)] for array in logprobs)))
        return tokens

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, or None."""
        return None if self.reader is None else self.reader.stop_string

    @property
    def has_stop_strings(self) -> bool:
        """Whether a stop string may end the text."""
        return self.reader is not None and self.reader.has_stop_strings

    @property
    def ended_by_host(self) -> bool:
        """Whether the text is at its end although the device may not know it."""
        return self.aborted or self.stop_string is not None

    @property
    def finish_reason(self) -> str:
        """Of a finished request: "stop" (a stop token or string), "abort", or "length"."""
        return "stop" if self.stopped or self.stop_string is not None else "abort" if self.aborted else "length"

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or the stop token of the request that ended the text.

        None at the checkpoint's end of text and at the limit.
        """
        if self.stop_string is not None:
            return self.stop_string
        if not self.stopped or self.tokens[-1] in self.request.eos_token_ids:
            return None
        return self.tokens[-1]
