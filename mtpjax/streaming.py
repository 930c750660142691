"""`LLM.stream`: text while it is generated. A stream gives the text of `LLM.generate`, character for character."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from mtpjax.argument_names import names_arguments
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request, RequestState
from mtpjax.engine.stop_strings import TextOptions, TextReader
from mtpjax.outputs import RequestOutput
from mtpjax.sampling_params import SamplingParams
from mtpjax.text.detokenizer import make_detokenizer
from mtpjax.text.prompts import Prompt, as_list
from mtpjax.text.tokenizer import Tokenizer

STEPS_PER_UPDATE = 4  # of the decode loop, between two outputs of a stream


@dataclass(frozen=True)
class StreamedText:
    """A part of one generated text.

    Attributes:
        index: its number among the texts of the prompt.
        text: the characters of this part; None if the stream has no text. It may be empty: a character whose bytes
            are not all there, and what may be the beginning of a stop string, come later or not at all.
        token_ids: the tokens of this part.
        finish_reason, stop_reason: as in `CompletionOutput`; None until the text is finished.
    """

    index: int
    text: str | None
    token_ids: list[int] = field(repr=False)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class StreamOutput:
    """One update of a stream, in the form of vLLM's `RequestOutput`.

    Attributes:
        request_id: of the request; in `LLM.stream` the number of the prompt.
        prompt, prompt_token_ids: as in `RequestOutput`.
        outputs: a list of one part of a text.
        finished: whether this is the last update of the request.
        result: with the last update what `LLM.generate` returns: thought, tool calls, metrics. Otherwise None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] = field(repr=False)
    outputs: list[StreamedText]
    finished: bool = False
    result: RequestOutput | None = field(default=None, repr=False)

    @property
    def text(self) -> str | None:
        """The same as `outputs[0].text`."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The same as `outputs[0].token_ids`."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """The same as `outputs[0].finish_reason`."""
        return self.outputs[0].finish_reason

    def then(self, later: StreamOutput) -> StreamOutput:
        """Return both updates as one."""
        first, second = self.outputs[0], later.outputs[0]
        text = None if first.text is None or second.text is None else first.text + second.text
        return replace(later, outputs=[replace(second, text=text, token_ids=first.token_ids + second.token_ids)])


class Updates:
    """Makes the updates of one request out of its state.

    Args:
        request_id: of the request.
        prompt: as the user gave it.
        make_output: turns the states of the samples of a finished request into what `LLM.generate` returns.
    """

    def __init__(
        self, request_id: str, prompt: Prompt, make_output: Callable[[Prompt, Sequence[RequestState]], RequestOutput]
    ):
        self.request_id, self._prompt, self._make_output = request_id, prompt, make_output
        self._num_tokens = self._num_characters = 0

    def next(self, state: RequestState) -> StreamOutput:
        """Return what is new since the last call."""
        result, finish_reason, stop_reason = None, None, None
        if not state.finished:
            text = None if state.reader is None else state.reader.take()
        else:
            result = self._make_output(self._prompt, [state])
            whole, finish_reason, stop_reason = result.text, state.finish_reason, state.stop_reason
            text = None if whole is None else whole[self._num_characters :]
        self._num_characters += len(text or "")
        tokens = state.tokens[self._num_tokens :]
        self._num_tokens += len(tokens)
        return StreamOutput(
            request_id=self.request_id,
            prompt=self._prompt if isinstance(self._prompt, str) else None,
            prompt_token_ids=list(state.request.prompt_token_ids),
            outputs=[StreamedText(0, text, tokens, finish_reason, stop_reason)],
            finished=state.finished,
            result=result,
        )


class StreamMethods:
    """The method of `LLM` for streams."""

    tokenizer: Tokenizer | None
    engine: Engine
    max_num_seqs: int
    _request: Callable[[int, Prompt, SamplingParams, str], Request]
    _output: Callable[[Prompt, Sequence[RequestState]], RequestOutput]

    @names_arguments
    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamOutput]:
        """Generate for every prompt, and yield new text and tokens of each as they come.

        The texts are those of `generate` with the same arguments. Leaving the iterator early (`close`, or the end of
        its life) ends the generation.

        Args:
            prompts, sampling_params: as for `generate`.

        Raises:
            ValueError: as `generate`, before anything is generated.
        """
        prompts = as_list(prompts)
        one = SamplingParams() if sampling_params is None else sampling_params
        params = [one] * len(prompts) if isinstance(one, SamplingParams) else list(one)
        if len(params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts but {len(params)} sampling parameters; give one, or one for each prompt"
            )
        requests = [
            self.stream_request(i, prompt, p, f"prompt {i}")
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
        ]
        return self._stream(prompts, requests)

    def _stream(self, prompts: list[Prompt], requests: list[Request]) -> Iterator[StreamOutput]:
        updates = [Updates(str(i), prompt, self._output) for i, prompt in enumerate(prompts)]
        states = self.engine.stream(
            requests,
            min(self.max_num_seqs, max(len(requests), 1)),
            lookahead=len(requests),
            yields_progress=True,
            steps_per_call=STEPS_PER_UPDATE,
        )
        with closing(states):  # type: ignore[type-var]
            for state in states:
                yield updates[state.request.index].next(state)

    def stream_request(self, index: int, prompt: Prompt, params: SamplingParams, name: str) -> Request:
        """Return the checked request of a prompt, whose reader keeps text for `Updates`."""
        if params.n != 1:
            raise ValueError(f"{name}: n is {params.n}; a stream has one text for each prompt")
        request = self._request(index, prompt, params, name)
        if self.tokenizer is not None and params.detokenize:
            request = replace(request, make_reader=partial(_make_reader, self.tokenizer, request, True))
        return request


def text_settings(request: Request, params: SamplingParams, tokenizer: Tokenizer | None, name: str) -> Request:
    """Return a request with what `params` say about its text.

    Raises:
        ValueError: there are stop strings, and no tokenizer.
    """
    stop = tuple(params.stop or ())
    request = replace(
        request,
        text_options=TextOptions(
            stop, params.include_stop_str_in_output, params.detokenize, params.skip_special_tokens
        ),
    )
    if not stop:
        return request
    if tokenizer is None:
        raise ValueError(f"{name} has stop strings, but the checkpoint has no tokenizer.json; give tokenizer=")
    return replace(request, make_reader=partial(_make_reader, tokenizer, request, False))


def _make_reader(tokenizer: Tokenizer, request: Request, keeps_text: bool) -> TextReader:
    return TextReader(
        make_detokenizer(tokenizer, request.text_options.skip_special_tokens).add,
        request.text_options,
        min_tokens=request.min_tokens,
        stop_token_ids=request.all_stop_token_ids,
        keeps_text=keeps_text,
    )
