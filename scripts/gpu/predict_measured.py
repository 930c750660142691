"""What an H100 measured at commit 833b245, by groups of kernels: a round at draft 0 and 4, and a prompt chunk.

Kernel times are those of the profiler in `docs/benchmarks/h100_model.json` (a context of 1,024 tokens; a chunk of 512
rows) and the trials in `docs/benchmarks/h100_tiles.json`. At other contexts attention and its join follow the trials.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpu.kernel_counts import DRAFT, OTHER

FILES = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks"
TRIAL_CONTEXTS = (1024, 32768, 131072)
COMMIT = "DeltaNet commit"  # a fusion of XLA's that added accepted rows to all states
# Kernels of the traces by name; XLA numbers kernels of one name and other shapes. All others are small ones of XLA's.
TRACES: dict[str, dict[str, str]] = {
    "decode 0": {
        "experts_gate_up_codes4": "experts, gate and up",
        "matmul_codes4_plain": "DeltaNet, in",
        "matmul_codes4": "out, o",
        "attention_few": "attention",
        "experts_down_codes4": "experts, down",
        "delta_window": "DeltaNet window",
        "matmul_plain_codes4": "router and shared gate, up",
        "matmul_codes4__3": "LM head",
        "loop_add_fusion_3": COMMIT,
        "matmul_codes4__2": "q, k, v",
        "norm_add": "norms",
        "norm_add__1": "norms",
        "norm_add__2": "norms",
        "choose_experts": "choice of experts",
        "matmul_codes4__1": "shared down",
        "attention_join": "attention, join",
        "norm_gated": "gated norm",
        "attention_enter": "attention, cache update",
    },
    "decode 4": {
        "experts_gate_up_codes4__1": "experts, gate and up",
        "delta_window": "DeltaNet window",
        "experts_down_codes4__1": "experts, down",
        "matmul_codes4__3": DRAFT + "LM head",
        "matmul_codes4_plain": "DeltaNet, in",
        "loop_add_fusion_7": COMMIT,
        "matmul_codes4__4": "out, o",
        "attention_few__1": "attention",
        "matmul_plain_codes4__1": "router and shared gate, up",
        "matmul_codes4__9": "LM head",
        "norm_add__5": "norms",
        "matmul_codes4__6": "q, k, v",
        "choose_experts__1": "choice of experts",
        "matmul_codes4__5": "shared down",
        "attention_few": DRAFT + "attention",
        "norm_add__4": "norms",
        "experts_gate_up_codes4": DRAFT + "experts, gate and up",
        "matmul_codes4__1": DRAFT + "q, k, v",
        "matmul_codes4": DRAFT + "out, o",
        "attention_join__1": "attention, join",
        "norm_gated": "gated norm",
        "attention_enter__1": "attention, cache update",
        "experts_down_codes4": DRAFT + "experts, down",
        "matmul_plain_codes4": DRAFT + "router and shared gate, up",
        "attention_join": DRAFT + "attention, join",
        "norm_add": DRAFT + "norms",
        "norm_add__1": DRAFT + "norms",
        "norm_add__2": DRAFT + "norms",
        "choose_experts": DRAFT + "choice of experts",
        "matmul_codes4__2": DRAFT + "shared down",
        "attention_enter": DRAFT + "attention, cache update",
        "matmul_codes4__7": "out, o",
        "matmul_codes4__8": "MTP sync",
        "attention_enter__2": "attention, cache update",
    },
    "prefill 512": {
        "matmul_codes4_plain": "DeltaNet, in",
        "experts_gate_up_codes4": "experts, gate and up",
        "delta_scan": "DeltaNet chunk scan",
        "experts_down_codes4": "experts, down",
        "delta_matrices": "DeltaNet chunk matrices",
        "matmul_codes4": "out, o",
        "matmul_codes4__2": "q, k, v",
        "matmul_plain_codes4": "router and shared gate, up",
        "attention_many": "attention",
        "norm_add__1": "norms",
        "norm_add__2": "norms",
        "matmul_codes4__1": "shared down",
        "norm_gated": "gated norm",
        "choose_experts": "choice of experts",
        "attention_enter": "attention, cache update",
        "matmul_codes4__3": "out, o",
        "matmul_codes4__4": "router and shared gate, up",
    },
}


@dataclass(frozen=True)
class Times:
    """Kernels of one group: how many a round or chunk, and microseconds of one."""

    count: float
    us: float

    @property
    def total_us(self) -> float:
        return self.count * self.us


@cache
def read(name: str) -> dict[str, Any]:
    """Return one of the files with measured figures."""
    return json.loads((FILES / name).read_text(encoding="utf-8"))


def bandwidth() -> float:
    """Return the measured bytes a microsecond of a large copy, read and written."""
    return read("h100_model.json")["ceilings"]["copy_bytes_per_s"] / 1e6


def trial(case: str, kernel: str, context: int | None = None) -> float:
    """Return the microseconds of a trial; with a context, between those of the two measured contexts around it."""
    times = read("h100_tiles.json")["cases"][case]
    if context is None:
        return times[kernel]
    return float(np.interp(context, TRIAL_CONTEXTS, [times[f"{kernel} at {at}"] for at in TRIAL_CONTEXTS]))


def trace(program: str) -> dict[str, Times]:
    """Return the groups of a profiled program: "decode 0", "decode 4" (at 1,024) or "prefill 512" (at 512)."""
    found = read("h100_model.json")["traces"][program.replace(" ", "")]
    rounds, groups = found["rounds"], TRACES[program]
    sums: dict[str, list[float]] = {}
    for row in found["by_kernel"]:
        if row["kernel"] in groups:
            entry = sums.setdefault(groups[row["kernel"]], [0.0, 0.0])
            entry[0] += row["count"]
            entry[1] += row["total_ms"]
    missing = set(groups.values()) - set(sums)
    assert not missing, missing
    count, busy = (found[key] - sum(s[i] for s in sums.values()) for i, key in enumerate(("kernels", "busy_ms")))
    sums[OTHER] = [count, busy]
    return {group: Times(n / rounds, 1e3 * ms / n) for group, (n, ms) in sums.items()}


def round_before(draft: int, context: int) -> dict[str, Times]:
    """Return the groups of a round at a context: measured at 1,024, attention beyond it by the trials."""
    groups = trace(f"decode {draft}")
    for group, times in groups.items():
        name = group.removeprefix(DRAFT)
        if name in ("attention", "attention, join"):
            kernel = "attention_few" if name == "attention" else "attention_join"
            case = f"attention M{1 if group.startswith(DRAFT) else draft + 1} piece512 slots32"
            more = trial(case, kernel, context) - trial(case, kernel, TRIAL_CONTEXTS[0])
            groups[group] = Times(times.count, times.us + more)
    return groups


def chunk_before(rows: int, context: int) -> dict[str, Times]:
    """Return the groups of a prompt chunk that ends at a context.

    At 512 rows they are measured, and attention grows with the context as whole chunks did. At 2,048 rows products of
    which there are trials are measured; the others are four times those of 512 rows.
    """
    groups = trace("prefill 512")
    short, long = (
        statistics.median(r["seconds"])
        for r in read("h100_model.json")["prefill"]
        if r["mtp"] and r["context"] in TRIAL_CONTEXTS[1:]
    )
    attention = groups["attention"]
    per_position = 1e6 * (long - short) / (TRIAL_CONTEXTS[2] - TRIAL_CONTEXTS[1]) / attention.count
    groups["attention"] = Times(attention.count, attention.us + per_position * max(context - rows, 0))
    if rows == 512:
        return groups
    scaled = {
        group: Times(t.count, t.us * (1 if group in (OTHER, "choice of experts") else rows / 512))
        for group, t in groups.items()
    }
    for group, (case, kernel) in PROMPT_TRIALS.items():
        scaled[group] = Times(scaled[group].count, trial(case.format(rows), kernel))
    return scaled


PROMPT_TRIALS = {
    "DeltaNet, in": ("in M{} rows64 stages3", "matmul_codes4_plain"),
    "out, o": ("out M{} rows64 stages3", "matmul_codes4"),
    "experts, gate and up": ("experts M{} rows64 stages3", "experts_gate_up_codes4"),
    "experts, down": ("experts M{} rows64 stages3", "experts_down_codes4"),
}


def whole_round_ms(draft: int, context: int) -> float | None:
    """Return the measured milliseconds of a round, whatever is between kernels included; None if not measured."""
    rows = read("h100_model.json")["decode"]
    return next((r["ms_round"] for r in rows if (r["draft"], r["context"]) == (draft, context)), None)


def least_ms(draft: int, context: int) -> float | None:
    """Return the milliseconds that the bytes of a round take at the copy bandwidth; None if it was not measured."""
    rows = read("h100_model.json")["decode"]
    found = (r["roofline"] * r["ms_round"] for r in rows if (r["draft"], r["context"]) == (draft, context))
    return next(found, None)


def whole_chunk_ms(rows: int, context: int) -> float | None:
    """Return the measured milliseconds of a chunk with MTP; None if not measured."""
    found = (r for r in read("h100_model.json")["prefill"] if r["mtp"])
    times = (1e3 * statistics.median(r["seconds"]) for r in found if (r["chunk"], r["context"]) == (rows, context))
    return next(times, None)
