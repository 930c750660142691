"""What bench_table.py prints and writes: CSV, Markdown and plots, with the reference system's ratios beside ours."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import Any

# Ratios of the reference system to its own run without MTP (llama.cpp TurboQuant fork, Qwen3.6-35B-A3B IQ4_NL, RTX 3090, one
# request; TheTom/llama-cpp-turboquant issue 147): (build, prompt tokens, draft) -> tok/s of prefill, of decode.
REFERENCE = {
    ("before", 1024): {0: (1461.19, 98.36), 2: (480.90, 115.37), 3: (471.46, 126.36), 4: (455.82, 143.21)},
    ("before", 8192): {0: (3277.07, 87.38), 2: (1568.59, 110.49), 3: (1626.07, 109.00), 4: (1671.36, 142.32)},
    ("before", 32768): {0: (2867.22, 61.33), 2: (1704.29, 100.82), 3: (1805.61, 119.21), 4: (1805.14, 128.24)},
    ("after", 1024): {0: (1288.02, 118.10), 2: (1190.01, 147.63), 3: (1145.07, 152.45), 4: (1277.92, 149.66)},
    ("after", 8192): {0: (3945.67, 104.42), 2: (3528.47, 148.37), 3: (3558.33, 157.01), 4: (3367.78, 156.47)},
    ("after", 32768): {0: (3452.69, 76.57), 2: (3065.30, 121.60), 3: (2942.63, 128.69), 4: (2922.91, 129.17)},
}
HEADER = (
    "prompt tokens", "side", "prefill tok/s", "/ draft 0", "/ draft 0 whole", "decode tok/s", "/ draft 0", "tokens a round",
    "elapsed s", "spread", "prefill of roofline", "decode of roofline",
)  # fmt: skip


def table_rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A row a context and side: medians over the runs; ratios are medians of the ratios within each run."""
    lines = []
    by = {(r["prompt_tokens"], r["side"]): r for r in result["rows"]}

    def against(context: int, side: str, base: str, what: str) -> float | None:
        a, b = by[context, side][what], by.get((context, base), {what: []})[what]
        return statistics.median(y / x for x, y in zip(a, b, strict=True)) if a and b else None

    for (context, side), row in by.items():
        read, wrote = row["prefill_seconds"], row["decode_seconds"]
        lines.append((
            context, side, context / statistics.median(read), against(context, side, "draft 0", "prefill_seconds"),
            against(context, side, "draft 0, whole", "prefill_seconds"),
            row["new_tokens"] / statistics.median(wrote) if wrote else None,
            against(context, side, "draft 0", "decode_seconds"), row.get("tokens_per_round"),
            statistics.median(map(sum, zip(read, wrote, strict=True))) if wrote else None,
            (max(read) - min(read)) / statistics.median(read),
            row["prefill_floor"] / statistics.median(read) if "prefill_floor" in row else None,
            row["decode_floor"] / statistics.median(wrote) if wrote and "decode_floor" in row else None,
        ))  # fmt: skip
    return lines


def all_drafts(result: dict[str, Any]) -> str:
    """Prefill of all drafts that read the whole prompt ÷ MTP off with whole layers: the median over all their runs."""
    seconds = {(r["prompt_tokens"], r["side"]): r["prefill_seconds"] for r in result["rows"]}
    found: dict[int, list[float]] = {}
    for (context, side), mine in seconds.items():
        name, _, k = side.partition(" ")
        if name == "draft" and k.isdigit() and k != "0":
            base = seconds[context, "draft 0, whole"]
            found.setdefault(context, []).extend(off / on for on, off in zip(mine, base, strict=True))
    ratios = ", ".join(f"{statistics.median(each):.3f} at {context:,}" for context, each in found.items())
    return f"All drafts' runs together, prefill tok/s with MTP ÷ draft 0, whole: **{ratios}** prompt tokens."


def markdown(result: dict[str, Any], reference: bool = True) -> str:
    """The table, and the reference's ratios."""

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
    for (build, context), drafts in REFERENCE.items():
        for k in (2, 3, 4):
            read, wrote = (drafts[k][i] / drafts[0][i] for i in (0, 1))
            lines.append(f"| {build} | {context} | {k} | {read:.2f} | {wrote:.2f} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Prefill ratio, decode tok/s and elapsed seconds by prompt length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), constrained_layout=True)
    rows = table_rows(result)
    for side in dict.fromkeys(r[1] for r in rows):
        mine = [r for r in rows if r[1] == side]
        xs = [r[0] for r in mine]
        axes[0].plot(xs, [r[4] for r in mine], "o-", label=side)
        if mine[0][5] is not None:
            axes[1].plot(xs, [r[5] for r in mine], "o-", label=side)
            axes[2].plot(xs, [r[8] for r in mine], "o-", label=side)
    for build, style in (("before", ":"), ("after", "--")):
        found = [(c, d[4][0] / d[0][0]) for (b, c), d in REFERENCE.items() if b == build]
        axes[0].plot(*zip(*found, strict=True), f"k{style}", label=f"llama.cpp {build} its fix, draft 4")
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
    text = markdown(result)
    print(f"\n{result['acceptance']}, prompts of {result['prompts']}\n\n{text}")
    if prefix:
        with open(prefix + ".csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*HEADER, "acceptance"])
            writer.writerows([*row, result["acceptance"]] for row in table_rows(result))
        Path(prefix + ".md").write_text(
            f"{result['acceptance']}, prompts of {result['prompts']}\n\n{text}\n", encoding="utf-8"
        )
        plot(result, Path(prefix + ".png"))
