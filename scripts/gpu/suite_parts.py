"""The measured parts of the GPU suite that need the whole model: prompts, decoding, batches, profile, texts."""

from __future__ import annotations

import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from mtpjax.decoding.acceptance import SimulatedAcceptance, exact_match
from mtpjax.decoding.speculative import DecodeState
from mtpjax.loading.load import cache_dtype
from mtpjax.model.cache import new_cache, padded_kv_length
from scripts.benchmarks.published import ACCEPTANCE_LENGTHS
from scripts.benchmarks.roofline import Work, chunk_work, round_work
from scripts.benchmarks.trace_events import op_kind, read_op_times
from scripts.benchmarks.variants import compile_decode, greedy_requests, start_state
from scripts.gpu.suite_setup import Results, Setup

HOLDERS = ("while", "call", "conditional")  # their time is that of what they hold, which is counted itself
BATCH_DRAFTS = (0, 3)
ROUNDS = 16  # rounds of a call of the loop


def acceptance_length(draft: int) -> float:
    """Return the tokens a round that are simulated: as published, and for more drafts the longest published."""
    return ACCEPTANCE_LENGTHS.get(draft, max(ACCEPTANCE_LENGTHS.values())) if draft else 1.0


class Loop:
    """The compiled decoding loop for a batch of sequences of equal length, with simulated acceptance."""

    def __init__(self, setup: Setup, draft: int, batch: int, kv_len: int):
        self.setup, self.draft, self.batch, self.kv_len = setup, draft, batch, kv_len
        self.model = setup.models[draft > 0]
        self.requests = greedy_requests(batch, 1 << 20)  # none of them ends
        self.program: Any = None

    def state(self, length: int) -> DecodeState:
        """Return a state whose caches hold `length` tokens of zeros: the time does not depend on them."""
        cache = new_cache(self.model.cfg, self.batch, self.kv_len, dtype=cache_dtype(self.setup.dtype))
        hidden = jnp.ones((self.batch, self.model.cfg.hidden_size), self.setup.dtype)
        return start_state(cache.replace(length=cache.length + length), hidden, 0, self.draft)

    def compile(self) -> None:
        """Compile the loop, if it is not yet."""
        if self.program is None:
            draft, state = self.draft, jax.eval_shape(lambda: self.state(0))
            rule = SimulatedAcceptance.from_mean_length(acceptance_length(draft), draft) if draft else exact_match
            options = draft, self.model.cfg.vocab_size, rule, ROUNDS
            self.program = compile_decode(self.model, state, self.requests, *options)

    def seconds(self, length: int, calls: int) -> list[float]:
        """Return seconds a round of each of `calls` calls, after one that does not count."""
        self.compile()
        times = []
        for call in range(calls + 1):
            state = jax.block_until_ready(self.state(length))
            start = time.perf_counter()
            jax.block_until_ready(self.program(self.model.params, state, self.requests)[0])
            if call:
                times.append((time.perf_counter() - start) / ROUNDS)
            del state
        return times

    def floor(self, length: int) -> float:
        """Return the least seconds of a round that the measured ceilings allow."""
        model, setup = self.model, self.setup
        parts = round_work(model.cfg, model.params, self.draft, self.batch, length, setup.dtype.itemsize)
        return sum(setup.ceilings.floor(work.bytes, work.flops) for work in parts.values())

    def row(self, length: int, times: list[float]) -> dict[str, Any]:
        """Return the figures of a measurement."""
        middle = statistics.median(times)
        return {
            "kind": "decode",
            "batch": self.batch,
            "context": length,
            "draft": self.draft,
            "ms_a_round": middle * 1e3,
            "tokens_per_second": self.batch * acceptance_length(self.draft) / middle,
            "acceptance": "simulated" if self.draft else "real",
            "of_roofline": self.floor(length) / middle,
            "seconds": times,
        }


def model_programs(setup: Setup) -> Iterator[Callable[[], Any]]:
    """Yield what compiles each program of the part "model", the most telling first."""
    for draft in setup.drafts:
        yield Loop(setup, draft, 1, setup.kv_len).compile
    for chunk in setup.chunks:
        for mtp in (True, False):
            yield partial(setup.side, mtp, chunk)


def model(setup: Setup, results: Results) -> None:
    """Measure decoding rounds and prompt chunks of one sequence, with simulated acceptance."""
    loops = {draft: Loop(setup, draft, 1, setup.kv_len) for draft in setup.drafts}
    for context in setup.contexts:
        for draft, loop in loops.items():
            if setup.go_on(f"decode at {context}, {draft} drafts"):
                results.add(loop.row(context, loop.seconds(context, setup.runs)))
                print(_decode_line(results.content["rows"][-1]), flush=True)
        for chunk in setup.chunks:
            if context >= chunk and setup.go_on(f"chunk of {chunk} at {context}"):
                _measure_chunk(setup, results, chunk, context)
    results.finish()


def _decode_line(row: dict[str, Any]) -> str:
    return (
        f"batch {row['batch']:2} at {row['context']:7} draft {row['draft']}: {row['ms_a_round']:8.3f} ms a round, "
        f"{row['tokens_per_second']:8.1f} tok/s ({row['acceptance']} acceptance), "
        f"{row['of_roofline']:.2f} of the roofline"
    )


def _measure_chunk(setup: Setup, results: Results, chunk: int, context: int) -> None:
    """Measure the prompt chunk that ends at a context, MTP on and off in turn."""
    sides, ids = [setup.side(mtp, chunk) for mtp in (True, False)], setup.ids(chunk + 1)
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for run in range(setup.runs + 1):
        for side in sides[:: 1 if run % 2 else -1]:
            setup.start_at(side, context - chunk)
            side.read(ids[:, :-1], ids[:, 1:])
            side.cache = None
            if run:
                times[side.name].append(side.seconds)
    ratio = statistics.median(b / a for a, b in zip(times["MTP on"], times["MTP off"], strict=True))
    for side in sides:
        work: Work = chunk_work(side.model.cfg, side.model.params, chunk, context, setup.dtype.itemsize)
        middle = statistics.median(times[side.name])
        row = {"kind": "prompt", "chunk": chunk, "context": context, "side": side.name, "speed_on_off": ratio}
        row |= {"tokens_per_second": chunk / middle, "seconds": times[side.name]}
        row["of_roofline"] = setup.ceilings.floor(work.bytes, work.flops) / middle
        results.add(row)
        print(
            f"chunk {chunk:5} at {context:7} {side.name:7} {chunk / middle:9.1f} tok/s, on / off {ratio:.3f}, "
            f"{row['of_roofline']:.2f} of the roofline",
            flush=True,
        )


def _batch_kv_len(setup: Setup) -> int:
    return padded_kv_length(min(setup.contexts) + 64, 16)


def batch_programs(setup: Setup) -> Iterator[Callable[[], Any]]:
    """Yield what compiles each program of the part "batch"."""
    for batch in setup.batches:
        for draft in BATCH_DRAFTS:
            yield Loop(setup, draft, batch, _batch_kv_len(setup)).compile


def batch(setup: Setup, results: Results) -> None:
    """Measure decoding rounds of 1 to 64 sequences at the shortest context."""
    length = min(setup.contexts)
    for count in setup.batches:
        for draft in BATCH_DRAFTS:
            if setup.go_on(f"batch {count}, {draft} drafts"):
                loop = Loop(setup, draft, count, _batch_kv_len(setup))
                results.add(loop.row(length, loop.seconds(length, setup.runs)))
                print(_decode_line(results.content["rows"][-1]), flush=True)
    results.finish()


def profile(setup: Setup, results: Results) -> None:
    """Write a CSV of all kernels of a decoding round and of a prompt chunk, and print the longest."""
    context, chunk, draft = min(setup.contexts), min(setup.chunks), setup.drafts[1]
    loop, side, ids = Loop(setup, draft, 1, setup.kv_len), setup.side(True, chunk), setup.ids(chunk + 1)

    def read() -> None:
        setup.start_at(side, context - chunk)
        side.read(ids[:, :-1], ids[:, 1:])
        side.cache = None

    for name, program, run in (
        ("decode", "jit_decode", lambda: loop.seconds(context, 1)),
        ("prompt", "jit_prefill", read),
    ):
        if not setup.go_on(name):
            continue
        run()  # compiles
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run()
            seen = {k: v for k, v in read_op_times(Path(folder), program).items() if op_kind(k) not in HOLDERS}
        total = sum(spent for _, spent in seen.values())
        longest = sorted(seen.items(), key=lambda item: -item[1][1])
        with (setup.options.out / f"gpu_profile_{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["kernel", "count", "seconds"])
            table.writerows([kernel, count, f"{spent:.9f}"] for kernel, (count, spent) in longest)
        print(f"{name}: {sum(n for n, _ in seen.values())} kernels, {total * 1e3:.2f} ms")
        for kernel, (count, spent) in longest[:10]:
            print(f"  {spent * 1e3:9.3f} ms in {count:6} x {kernel}")
        rows = [{"kernel": k, "count": n, "seconds": t, "share": t / total} for k, (n, t) in longest[:10]]
        results.add({"program": name, "kernels": sum(n for n, _ in seen.values()), "seconds": total, "longest": rows})
    results.finish(context=context, chunk=chunk, draft=draft)


def text(setup: Setup, results: Results) -> None:
    """Generate with the embedded model, without drafts and with three, and compare the texts."""
    prompts = ["Once upon a time there was a king who", "The old man looked at the sea and", "Tell me"]
    new = 8 if setup.smoke else 64
    texts = {}
    for draft in (0, 3):
        if not setup.go_on(f"text with {draft} drafts"):
            continue
        llm = LLM(TINY, num_speculative_tokens=draft, max_model_len=128, prefill_buckets=(64,))
        outputs = llm.generate(prompts, SamplingParams(max_tokens=new))
        texts[draft] = [output.token_ids for output in outputs]
        for prompt, output in zip(prompts, outputs, strict=True):
            results.add({"draft": draft, "prompt": prompt, "text": output.text})
            print(f"draft {draft}: {prompt}|{output.text!r}", flush=True)
    failed = ["a text changed with drafts"] if len(texts) == 2 and texts[0] != texts[3] else []
    results.finish(failed)


def warm_up(setup: Setup, programs: Iterator[Callable[[], Any]]) -> None:
    """Compile programs into the persistent cache, several at once: XLA compiles outside of Python's lock."""
    with ThreadPoolExecutor(2 if setup.smoke else 6) as pool:
        for number, _ in enumerate(pool.map(lambda compile_one: compile_one(), list(programs)), 1):
            print(f"{number} programs compiled ahead after {time.perf_counter() - setup.began:.1f} s", flush=True)
