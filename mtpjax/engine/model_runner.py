"""`ModelRunner`: the programs of one model, compiled when first needed, and what they read and write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from kernels_pallas.platform import compile_options
from mtpjax.decoding.acceptance import Acceptance, exact_match
from mtpjax.decoding.output_rows import NO_ROWS, OutputRows
from mtpjax.decoding.sampling import BatchSamplingParams
from mtpjax.decoding.speculative import DecodeState, Drafter, decode, insert, mtp_drafter
from mtpjax.decoding.steps import forward_hidden, prefill
from mtpjax.engine.request import as_host_array
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.weight_map import LoadedModel
from mtpjax.model.cache import Cache, new_cache, padded_kv_length

BUCKETS = (16, 64, 256, 512)  # rows of a prompt chunk
MAX_STEPS_PER_CALL = 32  # of the loop, before the host looks


def plan_chunks(rows: int, buckets: Sequence[int]) -> list[int]:
    """Chunk lengths that cover `rows` prompt rows: whole largest chunks behind one bucket for the rest.

    The surplus of the first chunk is padding in front, so the last row of the last chunk is the last prompt row.
    """
    whole, rest = divmod(rows, max(buckets))
    first = [min(b for b in buckets if b >= rest)] if rest else []
    return first + [max(buckets)] * whole


@partial(jax.jit, static_argnames=("cfg", "batch", "slots", "dtype"))
def _empty(cfg: Any, batch: int, slots: int, dtype: Any) -> Cache:
    return new_cache(cfg, batch, slots, dtype=dtype)


def compiled(fn: Any, args: tuple[Any, ...]) -> Callable[..., Any]:
    """A jitted function, compiled ahead of time for arguments like these. The one place that makes programs of an engine."""
    return fn.lower(*args).compile(**compile_options())


class ModelRunner:
    """Compiled programs for one model, `max_len` and draft length, and sums over all that they did.

    Args:
        draft: tokens drafted a round; 0 turns the MTP head off.
        mtp_prompt: how many of the last prompt tokens the MTP head reads; all unless told.
        max_len: prompt and generated tokens of one sequence at most.
        vocab: ids below this exist.
        buckets: lengths of prompt chunks that get a program each.
        admit: prompts that are read together when slots fall free; None: a quarter of the slots.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        draft: int,
        max_len: int,
        vocab: int,
        cache_dtype: Any,
        buckets: Sequence[int] = BUCKETS,
        rounds: int = MAX_STEPS_PER_CALL,
        mtp_prompt: int | None = None,
        admit: int | None = None,
        drafter: Drafter = mtp_drafter,
        accept: Acceptance = exact_match,
    ):
        self.model, self.draft, self.max_len, self.vocab = optimize_for_cpu(model), draft, max_len, vocab
        self.compute_dtype = nnx.merge(model.graph, model.params).compute_dtype
        self.slots, self.mtp_prompt = padded_kv_length(max_len, draft + 1), mtp_prompt
        self.cache_dtype, self.rounds, self.drafter, self.accept = cache_dtype, rounds, drafter, accept
        fitting = sorted(b for b in set(buckets) if b < max_len)
        self.buckets = tuple(fitting) or (min(buckets),)
        self.admit = admit
        self.compile_seconds = self.prefill_seconds = self.decode_seconds = 0.0
        self.prompt_tokens = 0  # read, those of a prompt that requests share once
        self.slot_steps = 0  # rounds of the loop times its slots: those of requests, and those of idle slots
        self._programs: dict[tuple, Any] = {}

    @property
    def programs(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def clock(self) -> float:
        """Seconds by the clock, which stands still while something compiles."""
        return time.perf_counter() - self.compile_seconds

    def _run(self, key: tuple, fn: Any, *args: Any, static: dict[str, Any], donate: str | None = None) -> Any:
        """Call a jitted function through an ahead-of-time compiled program, so that compile time is known apart.

        `donate` repeats the donated argument: the function is wrapped anew, because JAX keeps what it compiles for as long
        as the function lives. Wrapped here, the programs go when the engine goes.
        """
        if key not in self._programs:
            start = time.perf_counter()
            own: Any = jax.jit(partial(fn.__wrapped__, **static), donate_argnames=donate)
            self._programs[key] = compiled(own, args)
            self.compile_seconds += time.perf_counter() - start
        return self._programs[key](*args)

    def empty_cache(self, batch: int) -> Cache:
        """A new cache for `batch` sequences."""
        static = {"cfg": self.model.cfg, "batch": batch, "slots": self.slots, "dtype": self.cache_dtype}
        return self._run(("empty", batch), _empty, static=static)

    def read(
        self,
        prompts: Sequence[Sequence[int]],
        rows: OutputRows = NO_ROWS,
        keep: bool = False,
        cache: Cache | None = None,
        mtp_prompt: int | None = None,
    ) -> tuple[Cache, Any, list[np.ndarray]]:
        """Prefill equal or unequal prompts as one batch.

        Args:
            rows: output rows of every chunk.
            keep: collect the logits of each chunk `[B, R, V]` on the host.
            cache: to continue from (it is consumed); a new one unless told.
            mtp_prompt: how many of the last rows leave keys and values for the MTP head; all unless told. Only into an empty
                cache: what the head reads has no gaps.

        Returns:
            cache, hidden state of the last rows `[B, D]`, collected logits.
        """
        batch, total = len(prompts), max((len(p) for p in prompts), default=0)
        cache = self.empty_cache(batch) if cache is None else cache
        hidden: Any = np.zeros((batch, self.model.cfg.hidden_size), self.compute_dtype)
        if mtp_prompt is not None:
            skipped = [max(0, len(p) - mtp_prompt) for p in prompts]
            cache = cache.replace(mtp_start_pos=as_host_array(np.array(skipped, np.int32)))
        kept = []
        for tokens, following, pad, behind in self._chunks(prompts, total):
            tapped = None if mtp_prompt is None else max(0, min(mtp_prompt - behind, tokens.shape[1]))
            static = {"graph": self.model.graph, "rows": rows, "mtp_rows": tapped}
            key = ("prefill", batch, tokens.shape[1], rows, tapped)
            logits, hidden, cache = self._run(
                key, prefill, self.model.params, tokens, following, pad, cache, static=static, donate="cache"
            )
            if keep:
                kept.append(np.asarray(logits))
        return cache, hidden, kept

    def hidden(self, prompt: Sequence[int]) -> np.ndarray:
        """Hidden states after the final norm of every row of one prompt, `[T, D]`."""
        cache, out = self.empty_cache(1), []
        for tokens, _, pad, _ in self._chunks([prompt], len(prompt)):
            key = ("hidden", tokens.shape[1])
            rows, cache = self._run(
                key,
                forward_hidden,
                self.model.params,
                tokens,
                pad,
                cache,
                static={"graph": self.model.graph},
                donate="cache",
            )
            out.append(np.asarray(rows[0]))
        return np.concatenate(out)[-len(prompt) :]

    def _chunks(
        self, prompts: Sequence[Sequence[int]], total: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
        """Of each chunk: ids, the ids that follow them, rows of padding, and how many rows of the prompts come behind it."""
        plan = plan_chunks(total, self.buckets)
        width = sum(plan)
        ids = np.zeros((len(prompts), width + 1), np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[width - len(prompt) : width] = prompt
        pads = np.array([width - len(p) for p in prompts], np.int32)
        start = 0
        for rows in plan:
            end = start + rows
            pad = np.clip(pads - start, 0, rows).astype(np.int32)
            yield ids[:, start:end], ids[:, start + 1 : end + 1], pad, width - end
            start = end

    def decode(
        self, state: DecodeState, requests: BatchSamplingParams, enough: int
    ) -> tuple[DecodeState, np.ndarray, np.ndarray]:
        """Rounds of the loop until `enough` slots are idle, `MAX_STEPS_PER_CALL` at most: the state, new tokens, how many there are."""
        static = {
            "graph": self.model.graph, "k": self.draft, "rounds": self.rounds, "vocab": self.vocab, "drafter": self.drafter,
            "accept": self.accept,
        }  # fmt: skip
        key = ("decode", len(state.token), state.seen is None)
        wanted = as_host_array(np.array(enough, np.int32))
        state, out, used = self._run(
            key, decode, self.model.params, state, requests, wanted, static=static, donate="state"
        )
        return state, np.asarray(out), np.asarray(used)

    def insert(self, state: DecodeState, fresh: DecodeState, rows: Sequence[int], places: Sequence[int]) -> DecodeState:
        """The first requests of `fresh`, whose prompts are in these rows, in these slots of `state`, which is consumed."""
        rows_slots = np.zeros((2, len(fresh.token)), np.int32)
        rows_slots[:, : len(places)] = rows, places
        args = (
            state,
            fresh,
            as_host_array(rows_slots[0]),
            as_host_array(rows_slots[1]),
            as_host_array(np.array(len(places), np.int32)),
        )
        key = ("insert", len(state.token), len(fresh.token), state.seen is None)
        return self._run(key, insert, *args, static={}, donate="state")
