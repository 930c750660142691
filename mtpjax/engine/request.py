"""`Request` and `RequestState`: what the engine is asked to generate, and what it has generated so far."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One checked prompt with its limits and its own randomness.

    Attributes:
        index: number of the prompt in the call; unique within a run of the engine.
        max_tokens: new tokens at most; 0 asks for none.
        temperature: 0 is greedy.
        seed: of the noise; its lowest 32 bits count.
        stop_token_ids: tokens that the request itself names as the end of its text.
        eos_token_ids: the checkpoint's own end-of-text tokens; empty if the request ignores them.
        top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty: as in `SamplingParams`.
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
        tokens: new tokens; a stop token is the last of them.
        finished: no more tokens follow.
        stopped: a stop token ended the text, not `max_tokens`.
        prefill_seconds: of the prefill that read its prompt, together with those of other requests.
        decode_seconds: of the decode loop while the request had a slot in it.
        num_steps: steps of the loop that gave it tokens.
        num_accepted_tokens_per_pos: steps in which the draft at each position was accepted; known at the end.
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
    num_cached_tokens: int = 0

    @property
    def stop_reason(self) -> int | None:
        """The stop token of the request that ended the text; None at the checkpoint's end of text and at the limit."""
        if not self.stopped or self.tokens[-1] in self.request.eos_token_ids:
            return None
        return self.tokens[-1]
