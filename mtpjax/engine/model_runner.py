"""`ModelRunner`: one model and its programs, each compiled when it is first needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from mtpjax.decoding.acceptance import Acceptance, exact_match
from mtpjax.decoding.logprobs import PROMPT_LOGPROBS_DONATED, RAW, LogprobsSpec, prompt_logprobs
from mtpjax.decoding.output_rows import NO_ROWS, OutputRows
from mtpjax.decoding.sampling import BatchSamplingParams
from mtpjax.decoding.speculative import (
    DECODE_DONATED,
    INSERT_DONATED,
    DecodeResult,
    DecodeState,
    Drafter,
    decode,
    insert_requests,
    mtp_drafter,
)
from mtpjax.decoding.steps import FORWARD_HIDDEN_DONATED, PREFILL_DONATED, forward_hidden, prefill
from mtpjax.engine.batch_parts import BatchParts
from mtpjax.engine.program_cache import ProgramCache
from mtpjax.engine.programs import CompileFn, ProgramName, Programs, Step, compile_ahead
from mtpjax.engine.prompt_chunks import (
    PREFILL_BUCKETS,
    PastTokens,
    PromptChunk,
    join_rows,
    mtp_rows_of_chunks,
    split_prompts,
    usable_buckets,
)
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.open_model import compute_dtype_of
from mtpjax.model.cache import (
    KV_BLOCK,
    PUT_SEQUENCE_DONATED,
    Cache,
    new_cache,
    padded_kv_length,
    put_hidden,
    put_sequence,
    take_sequence,
)

MAX_STEPS_PER_CALL = 32  # of the decode loop, before the host looks at the tokens

# The argument whose memory the result of a step takes over.
_DONATED: dict[Callable[..., Any], tuple[str, ...]] = {
    prefill: PREFILL_DONATED,
    forward_hidden: FORWARD_HIDDEN_DONATED,
    decode: DECODE_DONATED,
    insert_requests: INSERT_DONATED,
    prompt_logprobs: PROMPT_LOGPROBS_DONATED,
    put_sequence: PUT_SEQUENCE_DONATED,
}


def jit_step(fn: Callable[..., Any], /, *args: Any, **static: Any) -> Any:
    """Jit one step of `mtpjax.decoding`, with its static arguments bound and the memory of its cache or state donated.

    The function is wrapped anew each time, because JAX keeps what it compiles for as long as the function lives: the
    programs of an engine go when the engine goes.
    """
    return jax.jit(partial(fn, *args, **static), donate_argnames=_DONATED.get(fn))


class ModelRunner:
    """Compiled programs for one model, one maximal length and one number of draft tokens.

    Args:
        model: weights; on a CPU they are brought into the layout that suits its matrix products.
        num_speculative_tokens: tokens drafted in a step; 0 turns the MTP head off.
        max_model_len: prompt and generated tokens of one sequence at most.
        vocab_size: ids below this exist; None: all of the model's. (The matrices of published checkpoints are padded.)
        cache_dtype: of keys, values and convolution inputs.
        prefill_buckets: lengths of prompt chunks; each gets a program when it is first needed.
        max_steps_per_call: steps of the decode loop before the host looks at the tokens.
        mtp_prompt_tokens: how many of the last prompt tokens the MTP head reads; None: all.
        drafter: makes the draft tokens.
        acceptance: decides which of them are accepted; any but `exact_match` changes the text.
        compile_fn: makes each program. One that runs programs elsewhere, as an emulator does, takes its place here.
        program_cache: keeps programs for other processes; None: nothing is kept. A `compile_fn` other than the default
            makes its programs anew each time.
        max_logprobs: most probable tokens of a row that a request can ask for.
        logprobs_mode: one of `mtpjax.decoding.logprobs.LOGPROBS_MODES`.
        auto_depths: depths that the engine chooses among in the middle of a text, ascending; None: it does not choose.

    Attributes:
        model: the weights in the layout of the device.
        compute_dtype: dtype of hidden states.
        kv_len: positions of keys and values in a cache.
        prefill_buckets: lengths of prompt chunks in use, ascending.
        programs: the compiled programs.
        batch_parts: by number of slots, the parts that programs of the loop have been made for.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_speculative_tokens: int,
        max_model_len: int,
        cache_dtype: Any,
        vocab_size: int | None = None,
        prefill_buckets: Sequence[int] = PREFILL_BUCKETS,
        max_steps_per_call: int = MAX_STEPS_PER_CALL,
        mtp_prompt_tokens: int | None = None,
        drafter: Drafter = mtp_drafter,
        acceptance: Acceptance = exact_match,
        compile_fn: CompileFn = compile_ahead,
        program_cache: ProgramCache | None = None,
        max_logprobs: int = 20,
        logprobs_mode: str = RAW,
        auto_depths: tuple[int, ...] | None = None,
    ):
        self.model = optimize_for_cpu(model)
        self.num_speculative_tokens, self.max_model_len = num_speculative_tokens, max_model_len
        self.vocab_size = model.cfg.vocab_size if vocab_size is None else vocab_size
        self.compute_dtype = compute_dtype_of(model)
        self.cache_dtype, self.kv_len = cache_dtype, padded_kv_length(max_model_len, num_speculative_tokens + 1)
        self.prefill_buckets = usable_buckets(prefill_buckets, max_model_len)
        self.max_steps_per_call, self.mtp_prompt_tokens = max_steps_per_call, mtp_prompt_tokens
        self.drafter, self.acceptance, self.auto_depths = drafter, acceptance, auto_depths
        self.programs = Programs(compile_fn, program_cache)
        self.batch_parts: dict[int, list[BatchParts]] = {}
        self.max_logprobs, self.logprobs_mode = min(max_logprobs, self.vocab_size), logprobs_mode

    @property
    def num_programs(self) -> int:
        """Programs so far: compiled, or kept by an earlier process."""
        return len(self.programs)

    @property
    def compile_seconds(self) -> float:
        """Seconds spent waiting for programs: tracing, compiling, or reading kept ones."""
        return self.programs.seconds

    @property
    def padded_vocab_size(self) -> int:
        """Number of logits of a row: rows of the model's embedding matrix, which may have more than `vocab_size`."""
        return self.model.cfg.vocab_size

    def seconds_without_compile(self) -> float:
        """Seconds of a clock that stands still while something compiles."""
        return time.perf_counter() - self.compile_seconds

    def new_cache(self, batch: int) -> Cache:
        """Make an empty cache for `batch` sequences."""
        step = partial(jit_step, new_cache, self.model.cfg, batch, self.kv_len, dtype=self.cache_dtype)
        return self._run(("new_cache", batch), step, ())

    def zero_hidden(self, batch: int) -> Array:
        """Return the hidden states `[B, D]` of sequences that nothing has been read of."""
        return jax.device_put(np.zeros((batch, self.model.cfg.hidden_size), self.compute_dtype))

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        rows: OutputRows = NO_ROWS,
        *,
        return_logits: bool = False,
        cache: Cache | None = None,
        mtp_prompt_tokens: int | None = None,
        past: Sequence[PastTokens] | None = None,
        next_tokens: Sequence[int] | None = None,
    ) -> tuple[Cache, Array, list[np.ndarray]]:
        """Read prompts of equal or unequal lengths as one batch, chunk by chunk.

        Args:
            prompts: token ids of B sequences; a sequence may be empty.
            rows: output rows of every chunk.
            return_logits: whether to collect the logits of each chunk on the host.
            cache: the cache to continue from, which is consumed; None: a new one.
            mtp_prompt_tokens: how many of the last rows leave keys and values for the MTP head; None: all. If fewer
                rows are read, the head keeps what it has of the rows before them.
            past: what the cache has of each sequence; None: nothing.
            next_tokens: the token after each prompt, for the MTP head; None: not known, as the head's first step writes
                the keys and values of that row anew.

        Returns:
            the cache, the hidden states of the last rows `[B, D]`, and the logits, float32 `[B, R, V]` of each chunk.
            Logits of all rows are one array, in which those of each prompt are the last ones; those before them mean
            nothing.
        """
        batch = len(prompts)
        cache = self.new_cache(batch) if cache is None else cache
        if mtp_prompt_tokens is not None:
            past = [PastTokens()] * batch if past is None else past
            start = [p.mtp_start_after(len(rows), mtp_prompt_tokens) for p, rows in zip(past, prompts, strict=True)]
            cache = cache.replace(mtp_start_pos=jax.device_put(np.array(start, np.int32)))
        hidden, all_logits = self.zero_hidden(batch), []

        def program(chunk: PromptChunk, mtp_rows: int | None) -> tuple[ProgramName, Step, tuple[Any, ...]]:
            length = chunk.tokens.shape[1]
            step = partial(jit_step, prefill, graph=self.model.graph, rows=rows, mtp_rows=mtp_rows)
            args = (self.model.params, chunk.tokens, chunk.next_tokens, chunk.pad, cache)
            return ("prefill", batch, length, rows, mtp_rows), step, args

        chunks = list(split_prompts(prompts, self.prefill_buckets, next_tokens))
        read = [None] * len(chunks) if mtp_prompt_tokens is None else mtp_rows_of_chunks(chunks, mtp_prompt_tokens)
        for chunk, mtp_rows in zip(chunks, read, strict=True):
            self.programs.begin(*program(chunk, mtp_rows))
        for chunk, mtp_rows in zip(chunks, read, strict=True):
            logits, hidden, cache = self._run(*program(chunk, mtp_rows))
            if return_logits:
                all_logits.append(np.asarray(logits))
        if rows == OutputRows.all() and len(all_logits) > 1:
            all_logits = [join_rows(chunks, all_logits)]
        return cache, hidden, all_logits

    def take_sequence(self, cache: Cache, index: int, num_tokens: int) -> Cache:
        """Copy what one sequence of `num_tokens` tokens remembers, with room for `prefix_kv_len` positions."""
        kv_len = self.prefix_kv_len(num_tokens)
        step = partial(jit_step, take_sequence, kv_len=kv_len)
        return self._run(("take_sequence", len(cache.length), kv_len), step, (cache, np.array(index, np.int32)))

    def put_sequence(self, cache: Cache, sequence: Cache, index: int) -> Cache:
        """Let sequence `index` of `cache`, which is consumed, remember what `take_sequence` copied."""
        name = ("put_sequence", len(cache.length), sequence.kv_len)
        return self._run(name, partial(jit_step, put_sequence), (cache, sequence, np.array(index, np.int32)))

    def put_hidden(self, hidden: Array, row: Array, index: int) -> Array:
        """Replace the hidden state of sequence `index`, `[B, D]`, by `row`, `[1, D]`."""
        step = partial(jit_step, put_hidden)
        return self._run(("put_hidden", len(hidden)), step, (hidden, row, np.array(index, np.int32)))

    def prefix_kv_len(self, num_tokens: int) -> int:
        """Return the room for positions of a copied sequence: a power of two of blocks, since each is a program."""
        blocks = -(-num_tokens // KV_BLOCK)
        return min(KV_BLOCK << (blocks - 1).bit_length(), self.kv_len)

    def hidden_states(self, prompt: Sequence[int]) -> np.ndarray:
        """Return the hidden states after the final norm of every row of one prompt, `[T, D]`."""
        cache, chunks = self.new_cache(1), []
        for chunk in split_prompts([prompt], self.prefill_buckets):
            step = partial(jit_step, forward_hidden, graph=self.model.graph)
            args = (self.model.params, chunk.tokens, chunk.pad, cache)
            hidden, cache = self._run(("hidden_states", chunk.tokens.shape[1]), step, args)
            chunks.append(np.asarray(hidden)[0, chunk.pad[0] :])
        return np.concatenate(chunks)

    def decode(
        self,
        state: DecodeState,
        params: BatchSamplingParams,
        return_when_finished: int,
        step_limit: int | None = None,
        logprobs: LogprobsSpec | None = None,
        depth: int | None = None,
    ) -> DecodeResult:
        """Run the decode loop until `return_when_finished` slots are done, for at most `max_steps_per_call` steps.

        Args:
            state: of B slots; consumed.
            params: settings of the requests in the slots.
            return_when_finished: number of slots that are done, free ones included, at which the loop returns.
            step_limit: fewer steps than `max_steps_per_call`, if given.
            logprobs: which log-probabilities are computed; None: none.
            depth: tokens drafted in a step; None: `num_speculative_tokens`.

        Returns:
            the state on the device; tokens, their numbers and their log-probabilities on the host.
        """
        result = self._run(*self._decode_program(state, params, return_when_finished, step_limit, logprobs, depth))
        return DecodeResult(result.state, *jax.tree.map(np.asarray, result[1:]))

    def insert(self, state: DecodeState, new: DecodeState, rows: Sequence[int], slots: Sequence[int]) -> DecodeState:
        """Start the first requests of `new` in slots of `state`, which is consumed.

        Args:
            state: of all slots.
            new: of the batch that prompts are read in; request w of it starts now.
            rows: for each request to start, the row of `new` that has the cache of its prompt.
            slots: for each request to start, its slot in `state`.
        """
        return self._run(*self._insert_program(state, new, rows, slots))

    def begin_decode(
        self,
        state: DecodeState,
        params: BatchSamplingParams,
        new: DecodeState | None = None,
        logprobs: LogprobsSpec | None = None,
        depth: int | None = None,
    ) -> None:
        """Make the programs of `decode` and, with `new`, of `insert` ready while something else runs.

        Args:
            state: arrays, or their shapes, of all slots.
            params: settings of the requests in the slots.
            new: arrays, or their shapes, of the batch that prompts are read in.
            logprobs, depth: as for `decode`.
        """
        if new is not None:
            self.programs.begin(*self._insert_program(state, new, (), ()))
        self.programs.begin(*self._decode_program(state, params, 0, None, logprobs, depth))

    def _decode_program(
        self,
        state: DecodeState,
        params: BatchSamplingParams,
        return_when_finished: int,
        step_limit: int | None = None,
        logprobs: LogprobsSpec | None = None,
        depth: int | None = None,
    ) -> tuple[ProgramName, Step, tuple[Any, ...]]:
        depth = self.num_speculative_tokens if depth is None else depth
        step = partial(
            jit_step,
            decode,
            graph=self.model.graph,
            num_speculative_tokens=depth,
            max_steps=self.max_steps_per_call,
            vocab_size=self.vocab_size,
            drafter=self.drafter,
            acceptance=self.acceptance,
            logprobs=logprobs,
            sync_without_drafts=depth == 0 and self.auto_depths is not None,
        )
        parts = (*state.text_state.parts, *params.parts, *(("logprobs", *logprobs) if logprobs else ()))
        name = ("decode", len(state.token), *parts)
        if depth != self.num_speculative_tokens:
            name += ("depth", depth)
        limits = (return_when_finished, self.max_steps_per_call if step_limit is None else step_limit)
        return name, step, (self.model.params, state, params, *(np.array(limit, np.int32) for limit in limits))

    def _insert_program(
        self, state: DecodeState, new: DecodeState, rows: Sequence[int], slots: Sequence[int]
    ) -> tuple[ProgramName, Step, tuple[Any, ...]]:
        rows_and_slots = np.zeros((2, len(new.token)), np.int32)
        rows_and_slots[:, : len(slots)] = rows, slots
        name = ("insert", len(state.token), len(new.token), *state.text_state.parts)
        return name, partial(jit_step, insert_requests), (state, new, *rows_and_slots, np.array(len(slots), np.int32))

    def _run(self, name: ProgramName, step: Step, args: tuple[Any, ...]) -> Any:
        """Call the program `name`; if there is none yet, it is that of `step`, a `jit_step` with its arguments."""
        return self.programs.get(name, step, args)(*args)
