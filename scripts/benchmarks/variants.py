"""The columns of bench_table.py: ways to read a prompt and to decode after it, compiled before anything is timed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.platform import compile_options
from mtpjax.decoding.acceptance import exact_match, simulated_acceptance
from mtpjax.decoding.output_rows import NO_ROWS, OutputRows
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams
from mtpjax.decoding.speculative import DecodeState
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model.cache import new_cache, padded_kv_length
from scripts.benchmarks.count_flops import whole_layer
from scripts.benchmarks.jitted_steps import decode, forward_hidden, prefill
from scripts.benchmarks.published import ACCEPTANCE_LENGTHS

MAX_STEPS_PER_CALL = 16
MTP_PROMPT_DRAFTS, MTP_PROMPT_TOKENS = 3, 64  # the draft length that is also measured with `mtp_prompt_tokens`
MTP_OFF_WHOLE = "draft 0, whole"  # the base of the prefill ratios


class Variant:
    """One way to read prompts. Its seconds add up chunk by chunk, so variants can take turns within a prompt.

    Attributes:
        cache: after the chunks read so far; None while other variants use the memory.
        hidden: hidden state of the last row, which drafting begins with.
        seconds: time spent reading since `begin`.
        temporary_mb: temporary memory of the compiled step; None if the backend does not say.
    """

    def __init__(
        self,
        name: str,
        model: LoadedModel,
        step: Any,
        chunk: int,
        kv_len: int,
        dtype: Any,
        same_program: Variant | None = None,
        mtp_prompt_tokens: int | None = None,
    ):
        """Compile the program of a chunk.

        Args:
            step: a `functools.partial` of a jitted prefill step.
            chunk: rows of a prompt chunk.
            kv_len: positions of the cache.
            dtype: of the cache.
            same_program: a variant whose program this one shares; prompts are read alike for all draft lengths.
            mtp_prompt_tokens: how many of the last prompt tokens the MTP head reads, at most `chunk`; None: all.
        """
        self.name, self.model, self.chunk, self.mtp_prompt_tokens = name, model, chunk, mtp_prompt_tokens
        self.cache: Any = None
        self.hidden: Any = None
        self.seconds = 0.0
        self.num_inputs = 1 if step.func is forward_hidden else 2  # the MTP head also needs the next tokens
        self.new_cache: Any
        self.last_step: Any
        self.inner_step: Any  # of every chunk but the last
        if same_program:
            self.new_cache, self.last_step = same_program.new_cache, same_program.last_step
            self.inner_step = same_program.inner_step
        else:
            self.new_cache = jax.jit(partial(new_cache, model.cfg, 1, kv_len, dtype=dtype))
            ids, pad, cache = np.zeros((1, chunk), np.int32), np.zeros(1, np.int32), jax.eval_shape(self.new_cache)

            def compiled(**options: Any) -> Any:
                lowered = step.func.lower(
                    model.params, *[ids] * self.num_inputs, pad, cache, **step.keywords, **options
                )
                return lowered.compile(**compile_options())

            self.last_step = compiled() if mtp_prompt_tokens is None else compiled(mtp_rows=mtp_prompt_tokens)
            self.inner_step = self.last_step if mtp_prompt_tokens is None else compiled(mtp_rows=0)
        memory = self.last_step.memory_analysis()
        self.temporary_mb = memory.temp_size_in_bytes / 2**20 if memory else None

    def begin(self, length: int = 0) -> None:
        """Make an empty cache for a prompt of `length` tokens."""
        cache = self.new_cache()
        if self.mtp_prompt_tokens is not None:
            start = np.full(1, length - self.mtp_prompt_tokens, np.int32)
            cache = cache.replace(mtp_start_pos=jax.device_put(start))
        self.cache, self.seconds = jax.block_until_ready(cache), 0.0

    def read(self, tokens: np.ndarray, next_tokens: np.ndarray, last: bool = True) -> None:
        """Read one chunk of tokens `[1, chunk]`; `last` says whether the prompt ends with it."""
        start = time.perf_counter()
        step = self.last_step if last else self.inner_step
        out = step(self.model.params, *(tokens, next_tokens)[: self.num_inputs], np.zeros(1, np.int32), self.cache)
        self.hidden, self.cache = jax.block_until_ready(out)[-2:]
        self.seconds += time.perf_counter() - start


def greedy_requests(batch: int, max_tokens: int) -> BatchSamplingParams:
    """Return `batch` greedy requests without stop tokens."""
    stops = jnp.full((batch, MAX_STOP_TOKENS), -1, jnp.int32)
    limit = jnp.full(batch, max_tokens, jnp.int32)
    return BatchSamplingParams(limit, jnp.zeros(batch, jnp.float32), jnp.zeros(batch, jnp.uint32), stops)


def start_state(cache: Any, hidden: Any, token: int, draft: int) -> DecodeState:
    """Return the state of sequences that decode from `token` on, with `draft` drafts.

    Every leaf is an array of its own: the loop takes over their memory.

    Args:
        cache: of B sequences.
        hidden: their last hidden states `[B, D]`.
    """
    batch = len(hidden)

    def ints(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    return DecodeState(
        cache,
        hidden,
        ints(batch) + token,
        ints(batch),
        jnp.zeros(batch, bool),
        jnp.zeros(batch, bool),
        ints(batch),
        ints(batch, draft),
    )


def compile_decode(
    model: LoadedModel, state: Any, requests: Any, draft: int, vocab_size: int, acceptance: Any, max_steps: int
) -> Any:
    """Compile the decoding loop for a state and requests like these; both may be shapes."""
    lowered: Any = decode.lower(
        model.params,
        state,
        requests,
        graph=model.graph,
        num_speculative_tokens=draft,
        max_steps=max_steps,
        vocab_size=vocab_size,
        acceptance=acceptance,
    )
    return lowered.compile(**compile_options())


class Decoder:
    """Decodes after a prompt that a variant has read."""

    def __init__(self, variant: Variant, draft: int, acceptance: Any, max_tokens: int, vocab_size: int):
        self.variant, self.draft, self.acceptance = variant, draft, acceptance
        self.max_tokens, self.vocab_size = max_tokens, vocab_size
        self.program: Any = None

    def __call__(self, token: int) -> dict[str, Any]:
        """Decode `max_tokens` tokens after `token`; compile the loop at the first call, outside the measured time."""
        variant, model = self.variant, self.variant.model
        requests = greedy_requests(1, self.max_tokens)
        hidden = variant.hidden if model.cfg.mtp_layers else jnp.zeros((1, model.cfg.hidden_size), self.dtype())
        state = start_state(variant.cache, hidden, token, self.draft)
        if self.program is None:
            options = self.draft, self.vocab_size, self.acceptance, MAX_STEPS_PER_CALL
            self.program = compile_decode(model, state, requests, *options)
        state = jax.block_until_ready(jax.device_put(state))
        start = time.perf_counter()
        while not bool(state.finished[0]):
            state, *_ = self.program(model.params, state, requests)
        seconds = time.perf_counter() - start
        rounds = int(state.num_steps[0])
        accepted = (np.asarray(state.num_accepted_per_pos[0]) / rounds).tolist()
        return {"seconds": seconds, "tokens_per_round": self.max_tokens / rounds, "accepted": accepted}

    def dtype(self) -> Any:
        """Return the dtype that the model computes in."""
        return nnx.merge(self.variant.model.graph, self.variant.model.params).compute_dtype


def without_mtp(model: LoadedModel) -> LoadedModel:
    """Return the trunk alone, with the same arrays."""
    merged = nnx.merge(model.graph, model.params)
    merged.mtp, merged.cfg = None, model.cfg.without_mtp()
    graph, params = nnx.split(merged)
    return LoadedModel(merged.cfg, graph, params)


def make_variants(
    model: LoadedModel, trunk: LoadedModel, args: argparse.Namespace, dtype: Any, vocab_size: int
) -> tuple[list[Variant], dict[str, Decoder]]:
    """Compile the variants for the options of bench_table.py.

    Args:
        model: with its MTP head.
        trunk: the same model without the head.
        dtype: of the cache.

    Returns:
        all variants, and by name the decoders of those that also decode.
    """
    kv_len = padded_kv_length(max(args.prompt_tokens) + args.max_tokens + 1, max(args.num_speculative_tokens) + 1)
    variants: list[Variant] = []
    decoders: dict[str, Decoder] = {}
    for k in args.num_speculative_tokens:
        reader = model if k else trunk
        same = next((v for v in variants if k and v.model is model), None)
        step = partial(prefill, graph=reader.graph, rows=NO_ROWS)
        variant = Variant(f"draft {k}", reader, step, args.chunk, kv_len, dtype, same)
        variants.append(variant)
        length = args.synthetic_acceptance_length or ACCEPTANCE_LENGTHS.get(k)
        rule = simulated_acceptance(length, args.acceptance, k) if args.simulate else None
        decoders[variant.name] = Decoder(variant, k, rule or exact_match, args.max_tokens, vocab_size)
        if k == MTP_PROMPT_DRAFTS:
            step, tokens = partial(prefill, graph=model.graph, rows=NO_ROWS), min(MTP_PROMPT_TOKENS, args.chunk)
            name = f"{variant.name}, last {tokens} tokens"
            variants.append(Variant(name, model, step, args.chunk, kv_len, dtype, mtp_prompt_tokens=tokens))
            decoders[name] = Decoder(variants[-1], k, rule or exact_match, args.max_tokens, vocab_size)
    step = partial(forward_hidden, graph=trunk.graph)
    variants.append(Variant(MTP_OFF_WHOLE, trunk, step, args.chunk, kv_len, dtype))
    if not args.no_ablations:
        none, every = OutputRows.none(), OutputRows.all()
        ablations = {
            "rows = all": partial(prefill, graph=model.graph, rows=every),
            "whole MTP layer": partial(whole_layer, graph=model.graph, rows=none),
            "whole MTP layer, rows = all": partial(whole_layer, graph=model.graph, rows=every),
        }
        variants += [Variant(name, model, step, args.chunk, kv_len, dtype) for name, step in ablations.items()]
    return variants, decoders


def measure(
    variants: Sequence[Variant],
    decoders: dict[str, Decoder],
    ids: np.ndarray,
    chunk: int,
    runs: int,
    interleave: str,
) -> dict[str, dict[str, Any]]:
    """Measure the prefill and decode seconds of each variant in each run over one prompt.

    Run 0 is a warm-up: it reads only the last two chunks, and its times are dropped.

    Args:
        ids: the prompt and the token after it, `[1, length + 1]`.
        interleave: "chunk": the variants take turns chunk by chunk; "prompt": one reads and decodes after the other,
            and only one cache is in memory at a time.
    """
    rows: dict[str, dict[str, Any]] = {v.name: {"prefill_seconds": [], "decode_seconds": []} for v in variants}
    length = ids.shape[1] - 1
    for run in range(runs + 1):
        rotated = [*variants[run % len(variants) :], *variants[: run % len(variants)]]
        for group in [rotated] if interleave == "chunk" else [[variant] for variant in rotated]:
            for variant in group:
                variant.begin(length)
            for number, at in enumerate(range(0, length, chunk)[0 if run else -2 :]):
                first = number % len(group)
                for variant in [*group[first:], *group[:first]]:
                    variant.read(ids[:, at : at + chunk], ids[:, at + 1 : at + chunk + 1], at + chunk == length)
            for variant in group:
                row = rows[variant.name]
                decoded = decoders[variant.name](int(ids[0, -1])) if variant.name in decoders else None
                if run:
                    row["prefill_seconds"].append(variant.seconds)
                    if decoded:
                        row["decode_seconds"].append(decoded["seconds"])
                        row |= {"tokens_per_round": decoded["tokens_per_round"], "accepted": decoded["accepted"]}
                variant.cache = variant.hidden = None
    return rows
