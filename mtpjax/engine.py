"""`Engine`: groups of requests through the compiled programs. The host sees tokens in chunks, never per step.

A job of any number of prompts uses one program per prompt-chunk bucket, one that makes the empty cache, and one loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from kernels_pallas.target import compile_options
from mtpjax.acceptance import Acceptance, real_acceptance
from mtpjax.cache import Cache, new_cache, slots_for
from mtpjax.penalties import Penalties, Seen, stepped
from mtpjax.rows import NO_ROWS, OutputRows
from mtpjax.sampling import STOPS, Kept, Requests
from mtpjax.speculative import Drafter, LoopState, decode, mtp_drafter
from mtpjax.steps import hidden_rows, prefill
from mtpjax.suited import suited
from mtpjax.weights import LoadedModel

BUCKETS = (16, 64, 256, 512)  # rows of a prompt chunk
ROUNDS = 32  # of the loop, before the host looks


@dataclass(frozen=True)
class Request:
    """One checked prompt: ids, limits and its own randomness."""

    index: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stops: tuple[int, ...]
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass
class Result:
    """What a request has produced. Seconds are wall-clock of its group, synchronised with the device, without compilation."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    stopped: bool = False
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rounds: int = 0
    accepted_per_position: list[int] = field(default_factory=list)


def plan_chunks(rows: int, buckets: Sequence[int]) -> list[int]:
    """Chunk lengths that cover `rows` prompt rows: whole largest chunks behind one bucket for the rest.

    The surplus of the first chunk is padding in front, so the last row of the last chunk is the last prompt row.
    """
    whole, rest = divmod(rows, max(buckets))
    first = [min(b for b in buckets if b >= rest)] if rest else []
    return first + [max(buckets)] * whole


def _host(value: np.ndarray) -> Array:
    """A host array as an argument of a compiled program, which takes it as it is: nothing is compiled to move it."""
    return value  # type: ignore[return-value]


@partial(jax.jit, static_argnames=("cfg", "batch", "slots", "dtype"))
def _empty(cfg: Any, batch: int, slots: int, dtype: Any) -> Cache:
    return new_cache(cfg, batch, slots, dtype=dtype)


class Engine:
    """Compiled programs for one model, `max_len` and draft length.

    Args:
        draft: tokens drafted a round; 0 turns the MTP head off.
        mtp_prompt: how many of the last prompt tokens the MTP head reads; all unless told.
        max_len: prompt and generated tokens of one sequence at most.
        vocab: ids below this exist.
        buckets: lengths of prompt chunks that get a program each.
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
        rounds: int = ROUNDS,
        mtp_prompt: int | None = None,
        drafter: Drafter = mtp_drafter,
        accept: Acceptance = real_acceptance,
    ):
        self.model, self.draft, self.max_len, self.vocab = suited(model), draft, max_len, vocab
        self.compute_dtype = nnx.merge(model.graph, model.params).compute_dtype
        self.slots, self.mtp_prompt = slots_for(max_len, draft + 1), mtp_prompt
        self.cache_dtype, self.rounds, self.drafter, self.accept = cache_dtype, rounds, drafter, accept
        fitting = sorted(b for b in set(buckets) if b < max_len)
        self.buckets = tuple(fitting) or (min(buckets),)
        self.compile_seconds = 0.0
        self._programs: dict[tuple, Any] = {}

    @property
    def programs(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def _run(self, key: tuple, fn: Any, *args: Any, static: dict[str, Any], donate: str | None = None) -> Any:
        """Call a jitted function through an ahead-of-time compiled program, so that compile time is known apart.

        `donate` repeats the donated argument: the function is wrapped anew, because JAX keeps what it compiles for as long
        as the function lives. Wrapped here, the programs go when the engine goes.
        """
        if key not in self._programs:
            start = time.perf_counter()
            own: Any = jax.jit(partial(fn.__wrapped__, **static), donate_argnames=donate)
            self._programs[key] = own.lower(*args).compile(**compile_options())
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
            cache = cache.replace(mtp_start=_host(np.array(skipped, np.int32)))
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
                key, hidden_rows, self.model.params, tokens, pad, cache, static={"graph": self.model.graph}, donate="cache"
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

    def run(
        self, requests: Sequence[Request], batch: int, on_tokens: Callable[[Result, list[int]], None] | None = None
    ) -> list[Result]:
        """Generate for all requests, `batch` at a time, longest prompts first. Results in the order given.

        Args:
            on_tokens: called with a result and its new tokens after each chunk of the loop.
        """
        order = sorted(requests, key=lambda r: -len(r.prompt))
        results: dict[int, Result] = {}
        for start in range(0, len(order), batch):
            for result in self._group(order[start : start + batch], batch, on_tokens):
                results[result.request.index] = result
        return [results[r.index] for r in requests]

    def _group(self, group: Sequence[Request], batch: int, on_tokens: Any) -> list[Result]:
        results = [Result(r, accepted_per_position=[0] * self.draft) for r in group]
        empty = [()] * (batch - len(group))
        # The last prompt token is the loop's first input: a prompt program never needs the LM head.
        prompts = [r.prompt[:-1] for r in group] + empty
        cache = jax.block_until_ready(self.empty_cache(batch))
        compiled, began = self.compile_seconds, time.perf_counter()
        cache, hidden, _ = self.read(prompts, cache=cache, mtp_prompt=self.mtp_prompt if self.draft else None)
        jax.block_until_ready((cache, hidden))
        prefill_seconds = time.perf_counter() - began - (self.compile_seconds - compiled)

        asked = self._requests(group, batch)
        state: Any = LoopState(
            cache=cache,
            hidden=hidden,
            token=_host(np.array([r.prompt[-1] for r in group] + [0] * len(empty), np.int32)),
            count=_host(np.zeros(batch, np.int32)),
            done=_host(np.array([r.max_tokens == 0 for r in group] + [True] * len(empty))),
            stopped=_host(np.zeros(batch, bool)),
            rounds=_host(np.zeros(batch, np.int32)),
            accepted=_host(np.zeros((batch, self.draft), np.int32)),
            seen=self._seen(group, batch) if asked.penalties else None,
        )
        static = {
            "graph": self.model.graph, "k": self.draft, "rounds": self.rounds, "vocab": self.vocab, "drafter": self.drafter,
            "accept": self.accept,
        }  # fmt: skip
        seconds = 0.0
        while not all(r.done for r in results):
            compiled, began = self.compile_seconds, time.perf_counter()
            state, out, used = self._run(
                ("decode", batch, state.seen is None), decode, self.model.params, state, asked, static=static, donate="state"
            )
            out, used, done = np.asarray(out), np.asarray(used), np.asarray(state.done)
            seconds += time.perf_counter() - began - (self.compile_seconds - compiled)
            for i, result in enumerate(results):
                if result.done:
                    continue
                new = out[i, : used[i]].tolist()
                result.tokens += new
                result.done, result.decode_seconds = bool(done[i]), seconds
                if on_tokens:
                    on_tokens(result, new)
        stopped, rounds, accepted = np.asarray(state.stopped), np.asarray(state.rounds), np.asarray(state.accepted)
        for i, result in enumerate(results):
            result.stopped, result.rounds, result.prefill_seconds = bool(stopped[i]), int(rounds[i]), prefill_seconds
            result.accepted_per_position = accepted[i].tolist()
        return results

    @staticmethod
    def _requests(group: Sequence[Request], batch: int) -> Requests:
        def column(of: Callable[[Request], float], dtype: Any, idle: float = 0) -> Array:
            return _host(np.array([of(r) for r in group] + [idle] * (batch - len(group)), dtype))

        stops = np.full((batch, STOPS), -1, np.int32)
        for row, request in zip(stops, group, strict=False):
            row[: len(request.stops)] = request.stops
        return Requests(
            max_tokens=column(lambda r: r.max_tokens, np.int32),
            temperature=column(lambda r: r.temperature, np.float32),
            seed=column(lambda r: r.seed & 0xFFFFFFFF, np.uint32),
            stops=_host(stops),
            kept=Kept(
                top_k=column(lambda r: r.top_k, np.int32),
                top_p=column(lambda r: r.top_p, np.float32, 1),
                min_p=column(lambda r: r.min_p, np.float32),
            ),
            penalties=Penalties(
                presence=column(lambda r: r.presence_penalty, np.float32),
                frequency=column(lambda r: stepped(r.frequency_penalty), np.float32),
                repetition=column(lambda r: r.repetition_penalty, np.float32, 1),
            )
            if any(r.penalised for r in group)
            else None,
        )

    def _seen(self, group: Sequence[Request], batch: int) -> Seen:
        prompt = np.zeros((batch, self.model.cfg.vocab_size), bool)
        for row, request in zip(prompt, group, strict=False):
            row[list(request.prompt)] = True
        return Seen(prompt=_host(prompt), counts=_host(np.zeros(prompt.shape, np.int32)))
