"""Where the reference system lost its time: output rows none / last / all x MTP off / keys and values only / whole layer.

    python -m scripts.experiments.rows

Operations and bytes are of one prompt chunk (counted from the program; XLA's own estimate); seconds are measured with the
variants taking turns. The model is the random Mixture-of-Experts of bench_prefill.py (50 M active parameters).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.platform import compile_options
from mtpjax.loading.cpu_layout import optimize_for_cpu
from mtpjax.loading.random_init import random_model
from mtpjax.model.cache import new_cache, padded_kv_length
from scripts.benchmarks.bench_prefill import CONFIG
from scripts.benchmarks.count_flops import ROWS, VARIANTS, flops, whole_layer
from scripts.benchmarks.jitted_steps import prefill
from scripts.experiments import common


def experiment(smoke: bool) -> dict[str, Any]:
    """A row for each combination: operations, bytes that the compiled program moves, seconds of each run."""
    chunk, context, runs = (64, 128, 2) if smoke else (512, 2048, 7)
    slots = padded_kv_length(context, 1)
    configs = {True: CONFIG, False: CONFIG.without_mtp()}
    models = {mtp: optimize_for_cpu(random_model(cfg, dtype=jnp.float32)) for mtp, cfg in configs.items()}
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, context)).astype(np.int32)
    rows: list[dict[str, Any]] = []
    programs = []
    for name, which in ROWS.items():
        for variant in VARIANTS:
            model = models[variant != "off"]
            cache = new_cache(model.cfg, 1, slots, dtype=jnp.float32)
            step = whole_layer if variant == "layer" else prefill
            piece = ids[:, :chunk]
            lowered = step.lower(
                model.params, piece, piece, np.zeros(1, np.int32), cache, graph=model.graph, rows=which
            )
            program = lowered.compile(**compile_options())
            cost, memory = program.cost_analysis() or {}, program.memory_analysis()
            counted = flops(CONFIG, variant, which, chunk=chunk, context=context).total
            rows.append({
                "rows": name, "mtp": variant, "flops": counted, "bytes": cost.get("bytes accessed"),
                "temporary_bytes": memory.temp_size_in_bytes, "seconds": [],
            })  # fmt: skip
            programs.append((program, model))
    for run in range(runs + 1):
        caches = [new_cache(m.cfg, 1, slots, dtype=jnp.float32) for _, m in programs]
        spent = [0.0] * len(programs)
        for number, at in enumerate(range(0, context, chunk)):
            for turn in range(len(programs)):
                i = (turn + number + run) % len(programs)
                program, model = programs[i]
                start = time.perf_counter()
                piece = ids[:, at : at + chunk]
                out = jax.block_until_ready(program(model.params, piece, piece, np.zeros(1, np.int32), caches[i]))
                spent[i] += time.perf_counter() - start
                caches[i] = out[-1]
        if run:
            for row, seconds in zip(rows, spent, strict=True):
                row["seconds"].append(seconds)
    base = rows[0]["seconds"]
    for row in rows:
        row["seconds_ratio"] = statistics.median(a / b for a, b in zip(row["seconds"], base, strict=True))
        row["flops_ratio"] = row["flops"] / rows[0]["flops"]
        ratios = f"{row['flops_ratio']:.3f} x operations, {row['seconds_ratio']:.3f} x seconds"
        print(f"rows {row['rows']:5} MTP {row['mtp']:6} {ratios}")
    return {"chunk": chunk, "context": context, "table": rows}


def plot(result: dict[str, Any], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    width = 0.26
    for i, variant in enumerate(VARIANTS):
        mine = [r for r in result["table"] if r["mtp"] == variant]
        at = np.arange(len(mine)) + (i - 1) * width
        label = {"off": "MTP off", "sync": "keys and values only (mtpjax)", "layer": "whole MTP layer"}[variant]
        left.bar(at, [r["flops_ratio"] for r in mine], width, label=label)
        right.bar(at, [r["seconds_ratio"] for r in mine], width)
    for axis, what in ((left, "operations"), (right, "seconds (median)")):
        axis.set_xticks(range(len(ROWS)), ROWS)
        axis.set_xlabel("output rows of the prompt chunk")
        axis.set_ylabel(f"{what} ÷ MTP off, no rows")
        axis.axhline(1, color="grey", lw=0.8)
        axis.grid(axis="y", alpha=0.3)
    left.legend(fontsize=8, loc="upper left")
    figure.suptitle(
        f"Reading a prompt of {result['context']} tokens in chunks of {result['chunk']}, {result['device']}"
    )


if __name__ == "__main__":
    common.run("rows", __doc__, experiment, plot)
