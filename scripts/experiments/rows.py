"""Cost of a slow prefill: output rows none / last / all x MTP off / keys and values only / whole layer.

    python -m scripts.experiments.rows

These are the choices in which the reference system lost its time. Operations and bytes are those of one prompt chunk,
counted from the program and estimated by XLA. Seconds are measured, with the variants taking turns. The model is a
random Mixture-of-Experts with 50 M active parameters.
"""

from __future__ import annotations

import argparse
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
from scripts.benchmarks.count_flops import ROWS, VARIANTS, flops, whole_layer
from scripts.benchmarks.jitted_steps import prefill
from scripts.benchmarks.random_models import MOE_50M_ACTIVE
from scripts.experiments import experiment


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return a row for each combination: operations, bytes that the compiled program moves, and the seconds of each
    run.
    """
    chunk, context, runs = (64, 128, 2) if args.smoke else (512, 2048, 7)
    kv_len, float32 = padded_kv_length(context, 1), jnp.dtype(jnp.float32)
    configs = {True: MOE_50M_ACTIVE, False: MOE_50M_ACTIVE.without_mtp()}
    models = {mtp: optimize_for_cpu(random_model(cfg, dtype=float32)) for mtp, cfg in configs.items()}
    ids = np.random.default_rng(0).integers(0, MOE_50M_ACTIVE.vocab_size, (1, context)).astype(np.int32)
    pad = np.zeros(1, np.int32)
    rows: list[dict[str, Any]] = []
    programs = []
    for name, output_rows in ROWS.items():
        for variant in VARIANTS:
            model = models[variant != "off"]
            cache = new_cache(model.cfg, 1, kv_len, dtype=float32)
            step: Any = whole_layer if variant == "layer" else prefill
            tokens = ids[:, :chunk]
            lowered = step.lower(model.params, tokens, tokens, pad, cache, graph=model.graph, rows=output_rows)
            program = lowered.compile(**compile_options())
            cost, memory = program.cost_analysis() or {}, program.memory_analysis()
            row = {
                "rows": name,
                "mtp": variant,
                "flops": flops(MOE_50M_ACTIVE, variant, output_rows, chunk=chunk, context=context).total,
                "bytes": cost.get("bytes accessed"),
                "temporary_bytes": memory.temp_size_in_bytes,
                "seconds": [],
            }
            rows.append(row)
            programs.append((program, model))
    for run in range(runs + 1):
        caches = [new_cache(model.cfg, 1, kv_len, dtype=float32) for _, model in programs]
        run_seconds = [0.0] * len(programs)
        for number, at in enumerate(range(0, context, chunk)):
            for turn in range(len(programs)):
                i = (turn + number + run) % len(programs)
                program, model = programs[i]
                start = time.perf_counter()
                tokens = ids[:, at : at + chunk]
                out = jax.block_until_ready(program(model.params, tokens, tokens, pad, caches[i]))
                run_seconds[i] += time.perf_counter() - start
                caches[i] = out[-1]
        if run:  # the first is a warm-up
            for row, seconds in zip(rows, run_seconds, strict=True):
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
        rows = [r for r in result["table"] if r["mtp"] == variant]
        at = np.arange(len(rows)) + (i - 1) * width
        label = {"off": "MTP off", "sync": "keys and values only (mtpjax)", "layer": "whole MTP layer"}[variant]
        left.bar(at, [r["flops_ratio"] for r in rows], width, label=label)
        right.bar(at, [r["seconds_ratio"] for r in rows], width)
    for axis, what in ((left, "operations"), (right, "seconds (median)")):
        axis.set_xticks(range(len(ROWS)), ROWS)
        axis.set_xlabel("output rows of the prompt chunk")
        axis.set_ylabel(f"{what} ÷ MTP off, no rows")
        axis.axhline(1, color="grey", lw=0.8)
        axis.grid(axis="y", alpha=0.3)
    left.legend(fontsize=8, loc="upper left")
    about = f"a prompt of {result['context']} tokens in chunks of {result['chunk']}"
    figure.suptitle(f"Reading {about}, {result['device']}")


if __name__ == "__main__":
    experiment.run("rows", __doc__, measure, plot)
