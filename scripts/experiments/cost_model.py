"""Draft, verify and commit time by draft length and batch, beside what bandwidth and arithmetic allow; the break-even line.

    python -m scripts.experiments.cost_model

The pieces of a decoding round are compiled and timed one by one on the random Mixture-of-Experts of bench_prefill.py, eight
layers deep, behind 512 tokens. The model of the device has two numbers, both measured: the bandwidth of a
copy and the rate of a matmul; a piece takes the longer of bytes and operations. A draft length pays when a round of it brings
more tokens than it takes rounds of plain decoding.
"""

from __future__ import annotations

import statistics
import time
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
from scripts.benchmarks.bench_prefill import CONFIG
from scripts.benchmarks.bench_table import GOLDEN_LENGTH
from scripts.benchmarks.roofline import measure_ceilings, round_work, weights_work
from scripts.experiments import common

CONTEXT = 512
PARTS = ("draft", "verify", "commit")


def pieces(model: LoadedModel, k: int, batch: int) -> dict[str, Any]:
    """Part -> a function that runs it once and waits. Each owns a cache, donated and given back."""
    cfg, graph, params = model.cfg, model.graph, model.params
    stops = np.full((batch, MAX_STOP_TOKENS), -1, np.int32)
    requests = BatchSamplingParams(
        np.full(batch, 99, np.int32), np.zeros(batch, np.float32), np.zeros(batch, np.uint32), stops
    )
    compute = nnx.merge(graph, params).compute_dtype
    stored = cache_dtype(compute)
    idle = np.zeros(batch, bool)
    rng = np.random.default_rng(k)
    token = rng.integers(0, cfg.vocab_size, batch).astype(np.int32)
    window = rng.integers(0, cfg.vocab_size, (batch, k + 1)).astype(np.int32)
    hidden = jax.random.normal(jax.random.key(0), (batch, k + 1, cfg.hidden_size), compute)

    def draft(params: Any, cache: Any) -> Any:
        return steps.draft(nnx.merge(graph, params), hidden[:, 0], token, idle, cache, requests, k, cfg.vocab_size)

    def verify(params: Any, cache: Any) -> Any:
        logits, rows, cache, pending = steps.verify(nnx.merge(graph, params), window, idle, cache)
        return (jnp.argmax(logits, -1), rows, pending), cache

    def end(params: Any, cache: Any) -> Any:
        model, pending = nnx.merge(graph, params), new_pending(cfg, batch, k + 1, dtype=stored)
        cache = steps.sync_mtp_cache(model, hidden, window[:, 1:], idle, cache) if k else cache
        return (), commit(cache, pending, jnp.zeros(batch, jnp.int32))

    def runner(fn: Any) -> Any:
        cache = new_cache(cfg, batch, padded_kv_length(CONTEXT, 16), dtype=stored)
        cache = jax.device_put(cache.replace(length=jnp.full(batch, CONTEXT, jnp.int32)))
        program = jax.jit(fn, donate_argnums=1).lower(params, cache).compile(**compile_options())

        def run() -> float:
            nonlocal cache
            start = time.perf_counter()
            _, cache = jax.block_until_ready(program(params, cache))
            return time.perf_counter() - start

        return run

    return {name: runner(fn) for name, fn in zip(PARTS, (draft, verify, end), strict=True) if k or name != "draft"}


def experiment(smoke: bool) -> dict[str, Any]:
    """A row for each batch and draft length: measured and modelled milliseconds of each part, break-even tokens a round."""
    drafts, batches, runs = ((0, 1), (1,), 2) if smoke else ((0, 1, 2, 4, 8), (1, 4, 16), 15)
    cfg = replace(CONFIG, num_layers=4 if smoke else 8)
    model = random_model(cfg, dtype=jnp.float32)
    quick = optimize_for_cpu(model)
    ceilings = measure_ceilings(jnp.float32, megabytes=64 if smoke else 256, size=512 if smoke else 2048)
    rows = []
    for batch in batches:
        timed = {k: pieces(quick, k, batch) for k in drafts}
        times: dict[tuple[int, str], list[float]] = {(k, part): [] for k in drafts for part in timed[k]}
        for run in range(runs + 1):
            for (k, part), found in times.items():
                seconds = timed[k][part]()
                if run:  # the first is slower
                    found.append(seconds)
        for k in drafts:
            measured = {part: statistics.median(times.get((k, part), [0.0])) * 1e3 for part in PARTS}
            works = round_work(cfg, model.params, k, batch, CONTEXT, 4)
            modelled = {part: ceilings.floor(works[part].bytes, works[part].flops) * 1e3 for part in PARTS}
            row = {"batch": batch, "draft": k, "measured_ms": measured, "modelled_ms": modelled}
            first = next((r for r in rows if r["batch"] == batch), row)
            for what in ("measured", "modelled"):
                row[f"break_even_{what}"] = sum(row[f"{what}_ms"].values()) / sum(first[f"{what}_ms"].values())
            row["limit"] = ceilings.limit(works["verify"].bytes, works["verify"].flops)
            rows.append(row)
            each = ", ".join(f"{part} {measured[part]:.2f} ms (model {modelled[part]:.2f})" for part in PARTS)
            print(
                f"batch {batch:2} draft {k}: {each}; pays from {row['break_even_measured']:.2f} tokens a round",
                flush=True,
            )
    active = weights_work(cfg, model.params, 1, mtp=False, head_rows=1).flops / 2e6
    return {
        "context": CONTEXT, "active_millions": active, "copy_gb_per_second": ceilings.bytes_per_second / 1e9,
        "matmul_gflop_per_second": ceilings.flops_per_second / 1e9, "published_lengths": GOLDEN_LENGTH, "table": rows,
    }  # fmt: skip


def plot(result: dict[str, Any], figure: Any) -> None:
    batches = list(dict.fromkeys(r["batch"] for r in result["table"]))
    axes = figure.subplots(1, len(batches) + 1)
    for axis, batch in zip(axes, batches, strict=False):
        mine = [r for r in result["table"] if r["batch"] == batch]
        at, bottom = np.arange(len(mine)), np.zeros(len(mine))
        for part in PARTS:
            height = np.array([r["measured_ms"][part] for r in mine])
            axis.bar(at, height, bottom=bottom, label=f"{part}, measured")
            bottom += height
        axis.plot(
            at, [sum(r["modelled_ms"].values()) for r in mine], "k_--", ms=16, lw=0.8, label="device model, whole round"
        )
        axis.set_xticks(at, [str(r["draft"]) for r in mine])
        axis.set_xlabel("draft length (tokens)")
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("a round (ms)")
    axes[0].legend(fontsize=7, loc="upper left")
    last = axes[-1]
    for batch in batches:
        mine = [r for r in result["table"] if r["batch"] == batch]
        line = last.plot(
            [r["draft"] for r in mine], [r["break_even_measured"] for r in mine], "o-", label=f"batch {batch}"
        )
        last.plot([r["draft"] for r in mine], [r["break_even_modelled"] for r in mine], ":", color=line[0].get_color())
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
    common.run("cost_model", __doc__, experiment, plot)
