"""`LLM`: what users import. Names follow vLLM's offline API."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import jax.numpy as jnp
import numpy as np

from checkpoints import TINY, GgufFile, open_checkpoint
from mtpjax.config import DEFAULT_STOP_TOKEN_IDS
from mtpjax.decoding.acceptance import SimulatedAcceptance, exact_match
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.sampling import MAX_STOP_TOKENS
from mtpjax.decoding.speculative import Drafter, mtp_drafter
from mtpjax.engine.engine import Engine
from mtpjax.engine.model_runner import BUCKETS
from mtpjax.engine.request import Request, Result
from mtpjax.engine.scheduler import TokenCallback
from mtpjax.loading.load import cache_dtype, load_checkpoint
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.outputs import Prompt, RequestOutput, output_of
from mtpjax.sampling_params import PENALTIES, SamplingParams, recommended, whole
from mtpjax.text.chat_template import Message
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_gguf

MAX_DRAFT = 8
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class LLM:
    """A checkpoint, ready to generate.

    Args:
        model: folder of a Hugging Face or Orbax checkpoint, a GGUF file, an already loaded model, or None for the
            embedded tiny model.
        draft: tokens the MTP head drafts a round, 0...8; the text does not depend on it.
        dtype: compute and cache dtype, "float32" or "bfloat16".
        weights: "int4", "int8", "iq4nl" or "fp8" quantise matrices as they are read, "packed" keeps those of a GGUF file
            as they are; None: see `mtpjax.loading.load.load_checkpoint`.
        max_len: prompt and new tokens of a sequence at most; memory for the cache grows with it.
        max_batch: sequences generated side by side.
        admit: when there are more prompts, how many are read together as sequences end and make room; None: a quarter of
            `max_batch`. They need cache of their own beside that of `max_batch` sequences. With `max_batch` itself there is one
            cache, and the next prompts wait until all sequences have ended.
        seed: base of the requests' seeds.
        prefill_chunks: lengths of prompt chunks, each compiled once when first needed.
        mtp_prompt: how many of the last prompt tokens the MTP head reads, at least 1; None: all, as the head was trained. With a
            small number the chunks before cost exactly what they cost without MTP, and drafting reads fewer keys; drafts that
            look far back get worse, the text stays the same.
        acceptance: a `SimulatedAcceptance` instead of the real rule, to measure speed with weights that were not trained.

    Raises:
        checkpoints.CheckpointError: the checkpoint cannot be read; says which file and tensor.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        model: str | PathLike[str] | LoadedModel | None = None,
        *,
        draft: int = 3,
        dtype: str = "float32",
        weights: str | None = None,
        max_len: int = 2048,
        max_batch: int = 8,
        admit: int | None = None,
        seed: int = 0,
        tokenizer: str | PathLike[str] | None = None,
        prefill_chunks: Sequence[int] = BUCKETS,
        mtp_prompt: int | None = None,
        drafter: Drafter = mtp_drafter,
        acceptance: SimulatedAcceptance | None = None,
    ):
        whole("draft", draft, 0, MAX_DRAFT)
        whole("mtp_prompt", mtp_prompt, 1, none=True)
        whole("max_len", max_len, 2)
        whole("max_batch", max_batch, 1)
        whole("admit", admit, 1, max_batch, none=True)
        whole("seed", seed, None)
        for rows in prefill_chunks:
            whole("prefill_chunks", rows, 1)
        if not prefill_chunks:
            raise ValueError("prefill_chunks is empty; give at least one length")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(map(repr, DTYPES))}")
        self.draft, self.max_len, self.max_batch, self.seed = draft, max_len, max_batch, seed
        stops: set[int] = set()
        self._generation_config: Mapping[str, Any] = {}
        self.tokenizer: Tokenizer | None = load_tokenizer(tokenizer) if tokenizer else None
        if isinstance(model, LoadedModel):
            loaded = model
        else:
            source = open_checkpoint(TINY if model is None else model)
            loaded = load_checkpoint(source, dtype=DTYPES[dtype], mtp=draft > 0, quantization=weights)
            self._generation_config = source.generation_config
            stops |= _stop_ids(source.generation_config.get("eos_token_id"))
            if self.tokenizer is None and source.tokenizer_file is not None:
                self.tokenizer = load_tokenizer(source.tokenizer_file)
            elif self.tokenizer is None and isinstance(source, GgufFile):
                self.tokenizer = tokenizer_from_gguf(source.metadata, str(source.path))
        self.cfg = loaded.cfg
        if draft and not self.cfg.mtp_layers:
            if drafter is mtp_drafter:
                warnings.warn(
                    f"{model}: the checkpoint has no MTP head; decoding goes on without drafts (draft=0)", stacklevel=2
                )
                self.draft = 0
        vocab = min(self.cfg.vocab_size, self.tokenizer.size) if self.tokenizer else self.cfg.vocab_size
        stops |= set(self.cfg.stop_token_ids) | {t for t in DEFAULT_STOP_TOKEN_IDS if t < vocab}
        self.stop_token_ids = tuple(sorted(t for t in stops if 0 <= t < self.cfg.vocab_size))
        if max_len > self.cfg.max_position:
            raise ValueError(
                f"max_len is {max_len}; this checkpoint was made for at most {self.cfg.max_position} positions"
            )
        self.engine = Engine(
            loaded, draft=self.draft, max_len=max_len, vocab=vocab, cache_dtype=cache_dtype(DTYPES[dtype]),
            buckets=prefill_chunks, mtp_prompt=mtp_prompt, admit=admit, drafter=drafter,
            accept=acceptance.first(self.draft) if acceptance and self.draft else exact_match,
        )  # fmt: skip

    def get_default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What the checkpoint's `generation_config.json` advises (temperature, top_k, top_p, min_p, penalties), with `changes`.

        Advice only: `generate` without parameters is greedy.
        """
        return recommended(self._generation_config, **changes)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt (texts or lists of token ids), in batches; results in the order of the prompts.

        Args:
            sampling_params: one for all prompts or one each.
            on_tokens: called with (index of the prompt, its new token ids) as the device hands them over.

        Raises:
            ValueError: names the prompt by its index: empty, too long, ids outside the vocabulary, text without a tokenizer.
        """
        many = _as_list(prompts)
        params = SamplingParams() if sampling_params is None else sampling_params
        each = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(many):
            raise ValueError(
                f"{len(many)} prompts but {len(each)} sampling parameters; give one, or one for each prompt"
            )
        requests = [self._request(i, p, s, f"prompt {i}") for i, (p, s) in enumerate(zip(many, each, strict=True))]
        results = self.engine.run(requests, min(self.max_batch, max(len(requests), 1)), _by_index(on_tokens))
        return [self._output(p, r) for p, r in zip(many, results, strict=True)]

    def as_completed(
        self,
        jobs: Iterable[tuple[Prompt, SamplingParams]],
        *,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Generate for any number of (prompt, parameters), read as they are needed: (index, output) as each is done.

        Some batches are read ahead and sorted by length; `max_batch` sequences are generated side by side.

        Raises:
            ValueError: as `generate`, when the prompt is read.
        """
        prompts: dict[int, Prompt] = {}

        def requests() -> Iterator[Request]:
            for index, (prompt, params) in enumerate(jobs):
                prompts[index] = prompt
                yield self._request(index, prompt, params, f"prompt {index}")

        for result in self.engine.stream(requests(), self.max_batch, _by_index(on_tokens)):
            yield result.request.index, self._output(prompts.pop(result.request.index), result)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, a list of messages `{"role": "user", "content": "..."}`, or each of several.

        Args:
            template: handed to the checkpoint's chat template, as `enable_thinking=False` or `tools=[...]`.

        Raises:
            ValueError: as `generate`; or the checkpoint has no chat template, or the template refuses a conversation.
        """
        many: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self.chat_prompt(one, **template) for one in many], sampling_params)

    def chat_prompt(self, messages: Sequence[Message], **template: Any) -> str:
        """The prompt that `chat` makes of one conversation. Raises ValueError where it would."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError(
                "the checkpoint has no chat template (chat_template.jinja, or in tokenizer_config.json); use generate"
            )
        return self.tokenizer.chat_template.render(messages, **template)

    def check(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> list[int]:
        """Token ids of a prompt that `generate` would accept. Raises ValueError where it would."""
        return list(self._request(0, prompt, sampling_params or SamplingParams(), "the prompt").prompt)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits of every position of one sequence, float32 `[T, V]` (all rows are output rows)."""
        ids = self._ids("token_ids", token_ids, self.max_len)
        _, _, kept = self.engine.read([ids], OutputRows.all(), keep=True)
        return np.concatenate(kept, axis=1)[0, -len(ids) :]

    def hidden(self, token_ids: Sequence[int]) -> np.ndarray:
        """Hidden states after the final norm, in the compute dtype, `[T, D]`: what the LM head and the MTP head read."""
        return self.engine.hidden(self._ids("token_ids", token_ids, self.max_len))

    def _ids(self, what: str, prompt: Prompt, longest: int) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{what} is a text, but the checkpoint has no tokenizer.json; give token ids or tokenizer="
                )
            ids: tuple[int, ...] = tuple(self.tokenizer.encode(prompt))
        else:
            try:
                ids = tuple(
                    int(t) if isinstance(t, int | np.integer) and not isinstance(t, bool) else _not_id(t)
                    for t in prompt
                )
            except TypeError as error:
                raise ValueError(f"{what} must be a text or a list of token ids: {error}") from None
        if not ids:
            raise ValueError(f"{what} is empty; give at least one token")
        for at, token in enumerate(ids):
            if not 0 <= token < self.cfg.vocab_size:
                raise ValueError(
                    f"{what}: id {token} at position {at} is outside the vocabulary 0...{self.cfg.vocab_size - 1}"
                )
        if len(ids) > longest:
            raise ValueError(
                f"{what} has {len(ids)} tokens, more than the {longest} that max_len = {self.max_len} allows; "
                "shorten it or raise max_len"
            )
        return ids

    def _request(self, index: int, prompt: Prompt, params: SamplingParams, what: str) -> Request:
        ids = self._ids(what, prompt, self.max_len - 1)
        room = self.max_len - len(ids)
        stops = tuple(dict.fromkeys(params.stop_token_ids + (() if params.ignore_eos else self.stop_token_ids)))
        if len(stops) > MAX_STOP_TOKENS:
            raise ValueError(f"{what}: {len(stops)} stop tokens (the checkpoint's included); at most {MAX_STOP_TOKENS}")
        for token in stops:
            if token >= self.cfg.vocab_size:
                raise ValueError(f"{what}: stop token {token} is outside the vocabulary 0...{self.cfg.vocab_size - 1}")
        return Request(
            index=index,
            prompt=ids,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            temperature=float(params.temperature),
            seed=self.seed + index if params.seed is None else params.seed,
            stops=stops,
            top_k=max(params.top_k, 0),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            **{name: float(getattr(params, name)) for name in PENALTIES},
        )

    def _output(self, prompt: Prompt, result: Result) -> RequestOutput:
        acceptance = "real" if self.engine.accept is exact_match else "simulated"
        return output_of(prompt, result, self.tokenizer, acceptance)


def _by_index(on_tokens: Callable[[int, list[int]], None] | None) -> TokenCallback | None:
    return on_tokens and (lambda result, new: on_tokens(result.request.index, new))


def _not_id(value: object) -> int:
    raise TypeError(f"{value!r} is not a token id")


def _stop_ids(raw: Any) -> set[int]:
    return set() if raw is None else {raw} if isinstance(raw, int) else set(raw)


def _as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One text or one list of ids is one prompt; anything else is a collection of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    many: list[Any] = list(prompts)
    if many and all(isinstance(p, int | np.integer) for p in many):
        return [many]
    return many
