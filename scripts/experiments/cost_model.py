"""Draft, verify and commit time by draft length and batch, beside a model of the device; and the break-even line.

    python -m scripts.experiments.cost_model

The parts of a decoding round are compiled and timed one by one on a random Mixture-of-Experts with eight layers, after
512 tokens. The model of the device has two numbers, both measured: the bandwidth of a copy and the rate of a matmul. A
part takes the longer of bytes ÷ bandwidth and operations ÷ rate. A draft length pays if one of its rounds gives more
tokens than plain decoding gives in the same time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas.platform import compile_options
from mtpjax.decoding import steps
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.load import cache_dtype
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.random_init import random_model
from mtpjax.model import commit
from mtpjax.model.cache import new_cache, new_pending, padded_kv_length
from scripts.benchmarks.published import ACCEPTANCE_LENGTHS
from scripts.benchmarks.random_models import MOE_50M_ACTIVE
from scripts.benchmarks.roofline import measure_ceilings, round_work, weights_work
from scripts.experiments import experiment

CONTEXT = 512
PARTS = ("draft", "verify", "commit")


def round_parts(model: LoadedModel, k: int, batch: int) -> dict[str, Callable[[], float]]:
    """Return, by part, a function that runs it once and returns the seconds.

    Each function owns a cache, which it donates to the program and replaces by the result.
    """
    cfg, graph, params = model.cfg, model.graph, model.params
    requests = BatchSamplingParams(
        jnp.full(batch, 99, jnp.int32),
        jnp.zeros(batch, jnp.float32),
        jnp.zeros(batch, jnp.uint32),
        jnp.full((batch, MAX_STOP_TOKENS), -1, jnp.int32),
    )
    compute_dtype = nnx.merge(graph, params).compute_dtype
    dtype = cache_dtype(compute_dtype)
    inactive = jnp.zeros(batch, bool)
    rng = np.random.default_rng(k)
    token = jnp.asarray(rng.integers(0, cfg.vocab_size, batch), jnp.int32)
    window = jnp.asarray(rng.integers(0, cfg.vocab_size, (batch, k + 1)), jnp.int32)
    hidden = jax.random.normal(jax.random.key(0), (batch, k + 1, cfg.hidden_size), compute_dtype)

    def draft(params: Any, cache: Any) -> Any:
        model = nnx.merge(graph, params)
        return steps.draft(model, hidden[:, 0], token, inactive, cache, requests, k, cfg.vocab_size)

    def verify(params: Any, cache: Any) -> Any:
        logits, rows, cache, pending = steps.verify(nnx.merge(graph, params), window, inactive, cache)
        return (jnp.argmax(logits, -1), rows, pending), cache

    def sync_and_commit(params: Any, cache: Any) -> Any:
        model, pending = nnx.merge(graph, params), new_pending(cache, k + 1)
        cache = steps.sync_mtp_cache(model, hidden, window[:, 1:], inactive, cache) if k else cache
        return (), commit(cache, pending, jnp.zeros(batch, jnp.int32))

    def runner(fn: Callable[[Any, Any], Any]) -> Callable[[], float]:
        cache = new_cache(cfg, batch, padded_kv_length(CONTEXT, 16), dtype=dtype)
        cache = jax.device_put(cache.replace(length=jnp.full(batch, CONTEXT, jnp.int32)))
        lowered: Any = jax.jit(fn, donate_argnums=1).lower(params, cache)
        program = lowered.compile(**compile_options())

        def run() -> float:
            nonlocal cache
            start = time.perf_counter()
            _, cache = jax.block_until_ready(program(params, cache))
            return time.perf_counter() - start

        return run

    functions = zip(PARTS, (draft, verify, sync_and_commit), strict=True)
    return {name: runner(fn) for name, fn in functions if k or name != "draft"}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return a row for each batch and draft length: measured and modelled milliseconds of each part, and the
    break-even.
    """
    smoke = args.smoke
    drafts, batches, runs = ((0, 1), (1,), 2) if smoke else ((0, 1, 2, 4, 8), (1, 4, 16), 15)
    cfg = replace(MOE_50M_ACTIVE, num_layers=4 if smoke else 8)
    float32 = jnp.dtype(jnp.float32)
    model = random_model(cfg, dtype=float32)
    optimized = optimize_for_cpu(model)
    ceilings = measure_ceilings(float32, megabytes=64 if smoke else 256, size=512 if smoke else 2048)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        runners = {k: round_parts(optimized, k, batch) for k in drafts}
        times: dict[tuple[int, str], list[float]] = {(k, part): [] for k in drafts for part in runners[k]}
        for run in range(runs + 1):
            for (k, part), part_times in times.items():
                seconds = runners[k][part]()
                if run:  # the first run is slower
                    part_times.append(seconds)
        base: dict[str, float] = {}  # milliseconds of a round without drafts
        for k in drafts:
            works = round_work(cfg, model.params, k, batch, CONTEXT, 4)
            milliseconds = {
                "measured": {part: statistics.median(times.get((k, part), [0.0])) * 1e3 for part in PARTS},
                "modelled": {part: ceilings.floor(works[part].bytes, works[part].flops) * 1e3 for part in PARTS},
            }
            row: dict[str, Any] = {"batch": batch, "draft": k}
            row |= {f"{kind}_ms": parts for kind, parts in milliseconds.items()}
            for kind, parts in milliseconds.items():
                base.setdefault(kind, sum(parts.values()))
                row[f"break_even_{kind}"] = sum(parts.values()) / base[kind]
            row["limit"] = ceilings.limit(works["verify"].bytes, works["verify"].flops)
            rows.append(row)
            measured, modelled = milliseconds["measured"], milliseconds["modelled"]
            text = ", ".join(f"{part} {measured[part]:.2f} ms (model {modelled[part]:.2f})" for part in PARTS)
            break_even = row["break_even_measured"]
            print(f"batch {batch:2} draft {k}: {text}; pays from {break_even:.2f} tokens a round", flush=True)
    return {
        "context": CONTEXT,
        "active_millions": weights_work(cfg, model.params, 1, mtp=False, head_rows=1).flops / 2e6,
        "copy_gb_per_second": ceilings.bytes_per_second / 1e9,
        "matmul_gflop_per_second": ceilings.flops_per_second / 1e9,
        "published_lengths": ACCEPTANCE_LENGTHS,
        "table": rows,
    }


def plot(result: dict[str, Any], figure: Any) -> None:
    batches = list(dict.fromkeys(r["batch"] for r in result["table"]))
    axes = figure.subplots(1, len(batches) + 1)
    for axis, batch in zip(axes, batches, strict=False):
        rows = [r for r in result["table"] if r["batch"] == batch]
        at, bottom = np.arange(len(rows)), np.zeros(len(rows))
        for part in PARTS:
            height = np.array([r["measured_ms"][part] for r in rows])
            axis.bar(at, height, bottom=bottom, label=f"{part}, measured")
            bottom += height
        modelled = [sum(r["modelled_ms"].values()) for r in rows]
        axis.plot(at, modelled, "k_--", ms=16, lw=0.8, label="device model, whole round")
        axis.set_xticks(at, [str(r["draft"]) for r in rows])
        axis.set_xlabel("draft length (tokens)")
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("a round (ms)")
    axes[0].legend(fontsize=7, loc="upper left")
    last = axes[-1]
    for batch in batches:
        rows = [r for r in result["table"] if r["batch"] == batch]
        drafts = [r["draft"] for r in rows]
        line = last.plot(drafts, [r["break_even_measured"] for r in rows], "o-", label=f"batch {batch}")
        last.plot(drafts, [r["break_even_modelled"] for r in rows], ":", color=line[0].get_color())
    lengths = {int(k): v for k, v in result["published_lengths"].items()}
    last.plot(list(lengths), list(lengths.values()), "k--", lw=0.8, label="published lengths (397B)")
    last.set_xlabel("draft length (tokens)")
    last.set_ylabel("break-even tokens a round (dotted: model)")
    last.set_ylim(bottom=0)
    last.grid(alpha=0.3)
    last.legend(fontsize=7)
    about = f"random MoE, {result['active_millions']:.0f} M active, {result['context']} tokens of context"
    figure.suptitle(f"Cost of a decoding round on {result['device']}, {about}")


if __name__ == "__main__":
    experiment.run("cost_model", __doc__, measure, plot)
