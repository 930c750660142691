"""`RequestOutput`, `CompletionOutput` and `Metrics`: what a user gets for a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtpjax.engine.request import RequestState
from mtpjax.text.prompts import Prompt
from mtpjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Metrics:
    """Figures of one request. Names that vLLM's metrics of speculative decoding have mean the same here.

    Seconds are synchronised with the device and exclude compilation. Requests that run together share them;
    `LLM.engine` has their sums.

    Attributes:
        num_prompt_tokens: tokens of the prompt.
        prefill_seconds: of the prefill that read the prompt, together with others.
        decode_seconds: of the decode loop while the request was in it.
        num_steps: steps of the loop; each gives one token of the trunk and the accepted drafts before it.
        num_drafts: steps that drafted: all of them, or 0 without drafts.
        num_draft_tokens: tokens that were drafted.
        num_accepted_tokens: draft tokens that were accepted. The last step may accept more than `max_tokens` lets
            through.
        num_accepted_tokens_per_pos: the same by position of the draft.
        mean_acceptance_length: `1 + num_accepted_tokens / num_drafts`; 1.0 without drafts.
        acceptance: "real", or "simulated" if `LLM(acceptance=...)` decided: then the text is not the model's.
    """

    num_prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    num_steps: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]
    mean_acceptance_length: float
    acceptance: str = "real"


@dataclass(frozen=True)
class CompletionOutput:
    """One generated text.

    Attributes:
        index: its number among the texts of the prompt; always 0, because each prompt gets one.
        text: without special tokens and without the stop token; None if the model has no tokenizer.
        token_ids: the new tokens; a stop token is the last of them.
        finish_reason: "stop" (a stop token) or "length" (`max_tokens`, or no room left).
        stop_reason: the id out of `SamplingParams.stop_token_ids` that ended the text. None if the checkpoint's own
            end-of-text token or the length did.
    """

    index: int
    text: str | None
    token_ids: list[int] = field(repr=False)
    finish_reason: str
    stop_reason: int | None = None


@dataclass(frozen=True)
class RequestOutput:
    """One answered prompt.

    Attributes:
        prompt: its text; None if it was given as token ids.
        prompt_token_ids: its token ids.
        outputs: the generated texts: a list of one.
        seed: the seed that was used.
        metrics: figures of the request.
    """

    prompt: str | None
    prompt_token_ids: list[int] = field(repr=False)
    outputs: list[CompletionOutput]
    seed: int
    metrics: Metrics

    @property
    def text(self) -> str | None:
        """The same as `outputs[0].text`."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The same as `outputs[0].token_ids`."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        """The same as `outputs[0].finish_reason`."""
        return self.outputs[0].finish_reason


def make_output(prompt: Prompt, state: RequestState, tokenizer: Tokenizer | None, acceptance: str) -> RequestOutput:
    """Turn the state of a finished request into what its user sees.

    Args:
        prompt: as the user gave it.
        state: of the request.
        tokenizer: None if the model has none.
        acceptance: see `Metrics`.
    """
    text_token_ids = state.tokens[:-1] if state.stopped else state.tokens
    completion = CompletionOutput(
        index=0,
        text=tokenizer.decode(text_token_ids) if tokenizer else None,
        token_ids=state.tokens,
        finish_reason="stop" if state.stopped else "length",
        stop_reason=state.stop_reason,
    )
    return RequestOutput(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=list(state.request.prompt_token_ids),
        outputs=[completion],
        seed=state.request.seed,
        metrics=_metrics(state, acceptance),
    )


def _metrics(state: RequestState, acceptance: str) -> Metrics:
    accepted = tuple(state.num_accepted_tokens_per_pos)
    num_drafts = state.num_steps if accepted else 0
    return Metrics(
        num_prompt_tokens=len(state.request.prompt_token_ids),
        prefill_seconds=state.prefill_seconds,
        decode_seconds=state.decode_seconds,
        num_steps=state.num_steps,
        num_drafts=num_drafts,
        num_draft_tokens=num_drafts * len(accepted),
        num_accepted_tokens=sum(accepted),
        num_accepted_tokens_per_pos=accepted,
        mean_acceptance_length=1 + sum(accepted) / num_drafts if num_drafts else 1.0,
        acceptance=acceptance,
    )
