"""`LLM`: a checkpoint that is ready to generate. Names follow vLLM's offline API."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from jax.typing import DTypeLike

from mtpjax.argument_names import names_arguments
from mtpjax.chat import ChatMethods
from mtpjax.constraint_params import constraint_fields
from mtpjax.decoding.logprobs import RAW
from mtpjax.decoding.rules import AcceptanceArgument, acceptance_rule
from mtpjax.decoding.sampling import MAX_STOP_TOKENS
from mtpjax.decoding.speculative import Drafter, mtp_drafter
from mtpjax.engine.depth_arguments import DRAFTS_BY_DEFAULT, MAX_SPECULATIVE_TOKENS, check_limit, draft_depths
from mtpjax.engine.engine import Engine, TokenCallback
from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.program_cache import AUTO, open_program_cache
from mtpjax.engine.programs import CompileFn, compile_ahead
from mtpjax.engine.prompt_chunks import PREFILL_BUCKETS
from mtpjax.engine.request import Request, RequestState
from mtpjax.forward import ForwardMethods
from mtpjax.loading.draft_head import with_draft_vocab
from mtpjax.loading.load import cache_dtype
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.open_model import eos_token_ids, open_model
from mtpjax.logprobs import check_logprobs_mode, check_num_logprobs, prompt_logprobs
from mtpjax.outputs import RequestOutput, make_output
from mtpjax.prefix import Prefix, PrefixMethods, held_prefix, open_prefix_cache
from mtpjax.samples import SampleCollector, SampleIndex, join_samples, split_samples
from mtpjax.sampling_params import PENALTIES, SamplingParams, check_int
from mtpjax.score import ScoreMethods
from mtpjax.streaming import StreamMethods, text_settings
from mtpjax.text.prompts import Prompt, as_list, encode_prompt
from mtpjax.text.structured_outputs import AutomatonCache

__all__ = ["LLM", "MAX_SPECULATIVE_TOKENS"]


class LLM(ChatMethods, ScoreMethods, StreamMethods, PrefixMethods, ForwardMethods):
    """A checkpoint that is ready to generate.

    Example, with the embedded tiny model:

        >>> from mtpjax import LLM, SamplingParams
        >>> llm = LLM(max_model_len=256)
        >>> params = SamplingParams(max_tokens=30)
        >>> outputs = llm.generate(["Once upon a time", "The old man"], params)
        >>> [len(output.token_ids) for output in outputs]
        [30, 30]
        >>> (answer,) = llm.chat([{"role": "user", "content": "What is 2 plus 3?"}])
        >>> answer.text, answer.finish_reason
        ('2 plus 3 is 5.', 'stop')

    Args:
        model: a Hugging Face or Orbax folder, a GGUF file, a model that is already loaded, or None: the embedded tiny
            model.
        num_speculative_tokens: tokens that the MTP head drafts in each step, 0...8. The text does not depend on it,
            unless `acceptance` is "rejection". "auto": the fastest number, measured while it generates.
        dtype: of computing and of the cache: "float32", "bfloat16" (or jnp.float32, jnp.bfloat16), or "auto": bfloat16
            on a GPU and float32 on a CPU; for a loaded model the dtype that it was loaded in.
        quantization: "int4", "int8", "iq4nl" or "fp8" quantise matrices while they are read; "packed" keeps those of a
            GGUF file or a quantised folder as they are. None: such a file stays packed on a GPU, and becomes arrays of
            `dtype` on a CPU, which computes with these faster; other checkpoints become arrays of `dtype`.
        max_model_len: prompt and new tokens of a sequence at most; memory for the cache grows with it.
        max_num_seqs: sequences that are generated at the same time.
        max_prefill_seqs: if there are more prompts than that, how many are read together when sequences make room;
            None: a quarter of `max_num_seqs`. They need a cache of their own beside that of `max_num_seqs` sequences.
            If it is `max_num_seqs`, there is one cache, and the next prompts wait until all sequences have ended.
        prefill_buckets: lengths of prompt chunks; the text keeps every bit if one of them is a multiple of 64.
        mtp_prompt_tokens: how many of the last prompt tokens the MTP head reads, at least 1; None: all, as the head was
            trained. With a small number the chunks before these tokens cost exactly what they cost without MTP, and
            drafting reads fewer keys. Drafts that depend on distant tokens get worse; the text stays the same.
        draft_vocab_size: N: drafts come from the N most frequent tokens and the added and stop tokens, which makes the
            LM head of a draft step smaller; or a file of token ids. None: from all. See `loading/draft_head.py`.
        seed: base of the seeds of requests that have none.
        tokenizer: a `tokenizer.json` in place of the checkpoint's own.
        mtp: a GGUF file or folder whose MTP head is used in place of the checkpoint's own; it may hold nothing else.
        hf_overrides: merged over config.json before it is read, for example YaRN: `{"text_config": {"rope_parameters":
            {"rope_type": "yarn", "factor": 4.0}}}`. Of a GGUF file, over the config.json that its metadata amount to.
        drafter: a function that drafts in place of the MTP head (see `mtpjax.decoding.speculative.Drafter`).
        acceptance: which drafts are accepted. "coupled": those that the trunk samples itself with the same noise.
            "rejection": the classical rule, whose texts have the same distribution and depend on the number of drafts.
            A `SimulatedAcceptance` measures speed with untrained weights; the text is not the model's then.
        compile_fn: makes each program from a jitted function and its arguments (see
            `mtpjax.engine.programs.CompileFn`), for example to run it by emulation.
        program_cache: a folder that keeps compiled programs, so that the next process compiles nothing. "auto": that of
            the variable MTPJAX_PROGRAM_CACHE, else `mtpjax/programs` in your folder for caches (XDG_CACHE_HOME). None
            or "": none. Give only a folder that no one else can write to: reading a program runs code from it.
        max_logprobs: most probable tokens that `SamplingParams(logprobs=k, prompt_logprobs=k)` can ask for.
        logprobs_mode: of which distribution the `logprobs` of new tokens are: "raw_logprobs", the model's own, or
            "processed_logprobs", that after penalties, temperature, top-k, top-p and min-p.
        max_speculative_tokens: tokens that are drafted in a step at most if `num_speculative_tokens` is "auto".
        enable_prefix_caching: beginnings that waiting prompts share are read once, if that saves 256 tokens or more,
            and kept for later calls. The text stays the same. See docs/shared_prefixes.md.
        prefix_cache_gb: memory for them, in units of 2^30 bytes; 0 turns them off. None: a tenth of the memory of the
            device that is free then, or 1 where the device does not tell.
        prefix_cache_dir: a folder that keeps them for the next process; None: none.

    Attributes:
        cfg: the `ModelConfig` of the checkpoint.
        tokenizer: the `Tokenizer`, or None if the checkpoint has none; then prompts are token ids and outputs have no
            text.
        engine: the `Engine`. It has sums over all requests so far: `num_prompt_tokens`, `num_cached_tokens`,
            `prefill_seconds`, `decode_seconds`, `compile_seconds`, `slot_steps`, `num_programs`.
        stop_token_ids: the checkpoint's own end-of-text tokens; `SamplingParams(ignore_eos=True)` generates past them.
        num_speculative_tokens, max_model_len, max_num_seqs, seed: the arguments of these names.
            `num_speculative_tokens` is 0 if the checkpoint has no MTP head.

    Raises:
        checkpoints.CheckpointError: the checkpoint cannot be read; names the file and the tensor.
        mtpjax.config.ConfigError: its config.json describes another model.
        ValueError: an argument is out of range.
    """

    @names_arguments
    def __init__(
        self,
        model: str | PathLike[str] | LoadedModel | None = None,
        *,
        num_speculative_tokens: int | str = DRAFTS_BY_DEFAULT,
        dtype: str | DTypeLike = "auto",
        quantization: str | None = None,
        max_model_len: int = 2048,
        max_num_seqs: int = 8,
        max_prefill_seqs: int | None = None,
        prefill_buckets: Sequence[int] = PREFILL_BUCKETS,
        mtp_prompt_tokens: int | None = None,
        draft_vocab_size: int | str | PathLike[str] | None = None,
        seed: int = 0,
        tokenizer: str | PathLike[str] | None = None,
        mtp: str | PathLike[str] | None = None,
        hf_overrides: Mapping[str, Any] | None = None,
        drafter: Drafter = mtp_drafter,
        acceptance: AcceptanceArgument = None,
        compile_fn: CompileFn = compile_ahead,
        program_cache: str | PathLike[str] | None = AUTO,
        max_logprobs: int = 20,
        logprobs_mode: str = RAW,
        max_speculative_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        prefix_cache_gb: float | None = None,
        prefix_cache_dir: str | PathLike[str] | None = None,
    ):
        num_speculative_tokens, auto_depths = draft_depths(num_speculative_tokens, max_speculative_tokens, acceptance)
        check_int("max_model_len", max_model_len, 2)
        check_int("max_num_seqs", max_num_seqs, 1)
        check_int("max_prefill_seqs", max_prefill_seqs, 1, max_num_seqs, optional=True)
        check_int("mtp_prompt_tokens", mtp_prompt_tokens, 1, optional=True)
        check_int("seed", seed, None)
        check_int("max_logprobs", max_logprobs, 0)
        check_logprobs_mode(logprobs_mode)
        for rows in prefill_buckets:
            check_int("prefill_buckets", rows, 1)
        if not prefill_buckets:
            raise ValueError("prefill_buckets is empty; give at least one length")
        opened = open_model(
            model,
            dtype=dtype,
            quantization=quantization,
            mtp=num_speculative_tokens > 0,
            tokenizer=tokenizer,
            head=mtp,
            hf_overrides=hf_overrides,
        )
        self.cfg, self.tokenizer, self._generation_config = opened.model.cfg, opened.tokenizer, opened.generation_config
        if num_speculative_tokens and not self.cfg.mtp_layers and drafter is mtp_drafter:
            num_speculative_tokens, auto_depths = 0, None
            warnings.warn(
                f"{model}: the checkpoint has no MTP head; decoding goes on without drafts (num_speculative_tokens=0)",
                stacklevel=3,
            )
        if max_model_len > self.cfg.max_position:
            limit = f"this checkpoint was made for at most {self.cfg.max_position} positions"
            raise ValueError(f"max_model_len is {max_model_len}; {limit}")
        self.num_speculative_tokens, self.max_model_len = num_speculative_tokens, max_model_len
        self.max_num_seqs, self.seed = max_num_seqs, seed
        self.stop_token_ids = eos_token_ids(self.cfg, self._generation_config, opened.vocab_size, self.tokenizer)
        self._automata = AutomatonCache(self.tokenizer, self.cfg.vocab_size, self.stop_token_ids)
        rule, self._acceptance = acceptance_rule(acceptance, num_speculative_tokens, drafter is mtp_drafter)
        runner = ModelRunner(
            with_draft_vocab(opened, draft_vocab_size, self.stop_token_ids, num_speculative_tokens),
            num_speculative_tokens=num_speculative_tokens,
            max_model_len=max_model_len,
            cache_dtype=cache_dtype(opened.dtype),
            vocab_size=opened.vocab_size,
            prefill_buckets=prefill_buckets,
            mtp_prompt_tokens=mtp_prompt_tokens,
            drafter=drafter,
            acceptance=rule,
            compile_fn=compile_fn,
            program_cache=open_program_cache(program_cache),
            max_logprobs=max_logprobs,
            logprobs_mode=logprobs_mode,
            auto_depths=auto_depths,
        )
        self._prefixes = open_prefix_cache(runner, enable_prefix_caching, prefix_cache_gb, prefix_cache_dir)
        self._prefix_cache_dir = prefix_cache_dir
        self.engine = Engine(runner, max_prefill_seqs=max_prefill_seqs, prefix_cache=self._prefixes)

    def get_default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """Return the sampling parameters that the checkpoint's `generation_config.json` recommends.

        The file may have a temperature, top_k, top_p, min_p and penalties; `overrides` replace them. `generate` without
        parameters ignores the recommendation and is greedy.
        """
        return SamplingParams.from_generation_config(self._generation_config, **overrides)

    @names_arguments
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_tokens: Callable[[int, list[int]], None] | None = None,
        prefix: Prefix | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt, in batches. Returns the results in the order of the prompts.

        Args:
            prompts: texts or lists of token ids; one alone need not be in a list.
            sampling_params: one for all prompts, or one for each; None: `SamplingParams()`.
            on_tokens: called with the index of a prompt and its new token ids, whenever the device hands some over. The
                index is a number with an attribute `sample`: which of the prompt's `n` samples the tokens belong to.
            prefix: the beginning of all prompts, which `prompts` continue.

        Raises:
            ValueError: names the prompt by its index: empty, too long, ids outside the vocabulary, text without a
                tokenizer. Or the prefix is one of another model.
        """
        prompts = shown = as_list(prompts)
        if prefix is not None:
            prefix.check(self._shareable().settings)
            prompts, shown = prefix.extend(prompts, lambda name, p: self._token_ids(name, p, self.max_model_len - 1))
        params = SamplingParams() if sampling_params is None else sampling_params
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts but {len(params)} sampling parameters; give one, or one for each prompt"
            )
        requests = [
            sample
            for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
            for sample in split_samples(self._request(i, prompt, p, f"prompt {i}"), p.n)
        ]
        num_slots = min(self.max_num_seqs, max(len(requests), 1))
        with held_prefix(self._prefixes, prefix):
            states = iter(self.engine.run(requests, num_slots, _by_index(on_tokens)))
        self._save_prefixes()
        return [
            self._output(prompt, [next(states) for _ in range(p.n)]) for prompt, p in zip(shown, params, strict=True)
        ]

    def generate_iter(
        self,
        jobs: Iterable[tuple[Prompt, SamplingParams]],
        *,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Generate for any number of jobs. Yields the index of a job and its output when it is finished, in any order.

        Some batches of jobs are taken ahead and sorted by length; `max_num_seqs` sequences are generated at the same
        time.

        Args:
            jobs: pairs of a prompt and its parameters, taken as they are needed.
            on_tokens: as for `generate`.

        Raises:
            ValueError: as `generate`, when the prompt is taken.
        """
        prompts: dict[int, Prompt] = {}

        def requests() -> Iterator[Request]:
            for index, (prompt, params) in enumerate(jobs):
                prompts[index] = prompt
                yield from split_samples(self._request(index, prompt, params, f"prompt {index}"), params.n)

        collector = SampleCollector()
        for state in self.engine.stream(requests(), self.max_num_seqs, _by_index(on_tokens)):
            if samples := collector.add(state):
                index = state.request.index
                yield index, self._output(prompts.pop(index), samples)
        self._save_prefixes()

    def encode(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> list[int]:
        """Return the token ids of a prompt that `generate` accepts. Raises ValueError if `generate` would."""
        request = self._request(0, prompt, sampling_params or SamplingParams(), "the prompt")
        return list(request.prompt_token_ids)

    def _token_ids(self, name: str, prompt: Prompt, max_length: int) -> tuple[int, ...]:
        ids = encode_prompt(name, prompt, self.tokenizer, self.cfg.vocab_size)
        if len(ids) > max_length:
            raise ValueError(
                f"{name} has {len(ids)} tokens, more than the {max_length} that max_model_len = {self.max_model_len} "
                "allows; shorten it or raise max_model_len"
            )
        return ids

    def _request(self, index: int, prompt: Prompt, params: SamplingParams, name: str) -> Request:
        ids = self._token_ids(name, prompt, self.max_model_len - 1)
        max_new_tokens = self.max_model_len - len(ids)
        penalties: dict[str, Any] = {penalty: float(getattr(params, penalty)) for penalty in PENALTIES}
        runner, all_stops = self.engine.runner, params.stop_token_ids + tuple(self.stop_token_ids)
        request = Request(
            index=index,
            prompt_token_ids=ids,
            max_tokens=max_new_tokens if params.max_tokens is None else min(params.max_tokens, max_new_tokens),
            temperature=float(params.temperature),
            seed=self.seed + index if params.seed is None else params.seed,
            stop_token_ids=params.stop_token_ids,
            eos_token_ids=() if params.ignore_eos else self.stop_token_ids,
            top_k=max(params.top_k, 0),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            **penalties,
            **constraint_fields(params, name, self.tokenizer, runner.vocab_size, all_stops),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            automaton=self._automata.compile(params.structured_outputs, name),
            num_speculative_tokens=check_limit(name, params.num_speculative_tokens, self.num_speculative_tokens),
        )
        check_num_logprobs(name, request, runner.max_logprobs)
        request = text_settings(request, params, self.tokenizer, name)
        stops = request.all_stop_token_ids
        if len(stops) > MAX_STOP_TOKENS:
            raise ValueError(f"{name}: {len(stops)} stop tokens (the checkpoint's included); at most {MAX_STOP_TOKENS}")
        for token in stops:
            if token >= self.cfg.vocab_size:
                raise ValueError(f"{name}: stop token {token} is outside the vocabulary 0...{self.cfg.vocab_size - 1}")
        return request

    def _output(self, prompt: Prompt, samples: Sequence[RequestState]) -> RequestOutput:
        output = join_samples([make_output(prompt, state, self.tokenizer, self._acceptance) for state in samples])
        found = prompt_logprobs(samples[0].request, self.engine.runner, self.tokenizer)
        return output if found is None else replace(output, prompt_logprobs=found)


def _by_index(on_tokens: Callable[[int, list[int]], None] | None) -> TokenCallback | None:
    def report(state: RequestState, tokens: list[int]) -> None:
        assert on_tokens is not None
        on_tokens(SampleIndex(state.request.index, state.request.sample), tokens)

    return on_tokens and report
