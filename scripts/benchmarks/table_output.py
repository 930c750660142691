"""Output of bench_table.py: CSV, Markdown and plots, with the ratios of a fork of llama.cpp beside ours."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

from scripts.benchmarks.published import LLAMA_CPP_FORK

HEADER = (
    "prompt tokens",
    "side",
    "prefill tok/s",
    "/ draft 0",
    "/ draft 0 whole",
    "decode tok/s",
    "/ draft 0",
    "tokens a round",
    "elapsed s",
    "spread",
    "prefill of roofline",
    "decode of roofline",
)


def table_rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return a row in the order of `HEADER` for each prompt length and variant.

    Figures are medians over the runs; ratios are medians of the ratios within each run.
    """
    lines = []
    measured = {(r["prompt_tokens"], r["side"]): r for r in result["rows"]}

    def ratio(context: int, variant: str, base: str, key: str) -> float | None:
        a, b = measured[context, variant][key], measured.get((context, base), {key: []})[key]
        return statistics.median(y / x for x, y in zip(a, b, strict=True)) if a and b else None

    for (context, variant), row in measured.items():
        prefill, decode = row["prefill_seconds"], row["decode_seconds"]
        prefill_seconds = statistics.median(prefill)
        decode_seconds = statistics.median(decode) if decode else None
        cells = (
            context,
            variant,
            context / prefill_seconds,
            ratio(context, variant, "draft 0", "prefill_seconds"),
            ratio(context, variant, "draft 0, whole", "prefill_seconds"),
            row["new_tokens"] / decode_seconds if decode_seconds else None,
            ratio(context, variant, "draft 0", "decode_seconds"),
            row.get("tokens_per_round"),
            statistics.median(map(sum, zip(prefill, decode, strict=True))) if decode else None,
            (max(prefill) - min(prefill)) / prefill_seconds,
            row["prefill_floor"] / prefill_seconds if "prefill_floor" in row else None,
            row["decode_floor"] / decode_seconds if decode_seconds and "decode_floor" in row else None,
        )
        lines.append(cells)
    return lines


def all_drafts(result: dict[str, Any]) -> str:
    """Describe the prefill of all drafts that read the whole prompt ÷ MTP off with whole layers: medians of runs."""
    seconds = {(r["prompt_tokens"], r["side"]): r["prefill_seconds"] for r in result["rows"]}
    ratios: dict[int, list[float]] = {}
    for (context, variant), runs in seconds.items():
        name, _, k = variant.partition(" ")
        if name == "draft" and k.isdigit() and k != "0":
            base = seconds[context, "draft 0, whole"]
            ratios.setdefault(context, []).extend(off / on for on, off in zip(runs, base, strict=True))
    medians = ", ".join(f"{statistics.median(values):.3f} at {context:,}" for context, values in ratios.items())
    return f"All drafts' runs together, prefill tok/s with MTP ÷ draft 0, whole: **{medians}** prompt tokens."


def markdown(result: dict[str, Any], reference: bool = True) -> str:
    """Return the table, and with `reference` also the ratios of the llama.cpp fork."""

    def cell(x: Any) -> str:
        if not isinstance(x, float):
            return "" if x is None else str(x)
        return f"{x:.3g}" if x < 100 else f"{x:.0f}"

    rows = table_rows(result)
    shown = [i for i in range(len(HEADER)) if any(row[i] is not None for row in rows)]
    lines = ["| " + " | ".join(HEADER[i] for i in shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(cell(row[i]) for i in shown) + " |" for row in rows]
    if not reference:
        return "\n".join(lines)
    lines += ["", "The reference, as ratios to its own run without MTP:", ""]
    lines += ["| build | prompt tokens | draft | prefill | decode |", "|---|---|---|---|---|"]
    for (build, context), drafts in LLAMA_CPP_FORK.items():
        for k in (2, 3, 4):
            prefill, decode = (drafts[k][i] / drafts[0][i] for i in (0, 1))
            lines.append(f"| {build} | {context} | {k} | {prefill:.2f} | {decode:.2f} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the prefill ratio, decode tokens/s and elapsed seconds by prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), constrained_layout=True)
    rows = table_rows(result)
    for variant in dict.fromkeys(r[1] for r in rows):
        own = [r for r in rows if r[1] == variant]
        xs = [r[0] for r in own]
        axes[0].plot(xs, [r[4] for r in own], "o-", label=variant)
        if own[0][5] is not None:
            axes[1].plot(xs, [r[5] for r in own], "o-", label=variant)
            axes[2].plot(xs, [r[8] for r in own], "o-", label=variant)
    for build, style in (("before", ":"), ("after", "--")):
        points = [(c, d[4][0] / d[0][0]) for (b, c), d in LLAMA_CPP_FORK.items() if b == build]
        axes[0].plot(*zip(*points, strict=True), f"k{style}", label=f"llama.cpp {build} its fix, draft 4")
    axes[0].axhline(1, color="grey", lw=0.8)
    axes[0].set_ylabel("prefill tok/s ÷ MTP off, whole layers")
    axes[1].set_ylabel("decode (tok/s)")
    axes[2].set_ylabel("prompt read and text decoded (s)")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("prompt (tokens)")
        axis.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    axes[1].legend(fontsize=8)
    figure.suptitle(f"{result['model']} on {result['device']}, {result['acceptance']}")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


def write_table(result: dict[str, Any], prefix: str | None) -> None:
    """Print the table; with a prefix also write PREFIX.csv, PREFIX.md and PREFIX.png."""
    about = f"{result['acceptance']}, prompts of {result['prompts']}"
    text = markdown(result)
    print(f"\n{about}\n\n{text}")
    if prefix:
        with open(prefix + ".csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*HEADER, "acceptance"])
            writer.writerows([*row, result["acceptance"]] for row in table_rows(result))
        Path(prefix + ".md").write_text(f"{about}\n\n{text}\n", encoding="utf-8")
        plot(result, Path(prefix + ".png"))
