"""Writes docs/benchmarks.md from the JSON files beside it.

    python scripts/benchmarks_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from table_output import markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
FILES = DOCS / "benchmarks"


def about(result: dict[str, Any]) -> str:
    """Where a file's figures come from."""
    versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
    machine = f"{result.get('device')} ({result.get('cores')} cores)"
    return f"{result.get('date')}, {machine}, {versions}, commit {result.get('commit')}."


def page() -> str:
    """The Markdown text."""
    parts = ["# Benchmarks", "Made by `python scripts/benchmarks_page.py` from the JSON files in `docs/benchmarks/`."]
    table = FILES / "table.json"
    if table.exists():
        result = json.loads(table.read_text())
        parts += [
            "## The table",
            f"`python scripts/bench_table.py --out docs/benchmarks/table`: {result['model']} model of about 50 M active "
            f"parameters in {result['dtype']}, prompts of {result['prompts']}, **{result['acceptance']}** (the published "
            "lengths of Qwen3.5-397B-A17B's head). " + about(result),
            "A ratio is the median of the ratios within each run. \"Spread\" is (slowest − fastest) ÷ median of the prefill's "
            "runs; where it exceeds a difference, the difference is not measured.",
            markdown(result),
            "![prefill ratio, decode speed and elapsed seconds by prompt length](benchmarks/table.png)",
        ]
    for name, title in (("rows", "Output rows and the MTP head while reading"), ("draft_length", "Draft length")):
        file = FILES / f"{name}.json"
        if file.exists():
            result = json.loads(file.read_text())
            picture = f"![{title}](benchmarks/{name}.png)"
            parts += [f"## {title}", f"`python scripts/experiments/{name}.py`. " + about(result), picture]
    others = sorted(f for f in FILES.glob("*.json") if f.stem not in ("table", "rows", "draft_length"))
    lines = [f"| [{f.name}](benchmarks/{f.name}) | {json.loads(f.read_text()).get('what', '')} |" for f in others]
    parts += ["## Other results", "| file | what |\n|---|---|\n" + "\n".join(lines)]
    parts += [
        "## Not measured",
        "No GPU has run any of this: there is no table for the 35B-A3B, no roofline, no kernel timing. On the CPU, contexts "
        "above those of the table were not run.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (DOCS / "benchmarks.md").write_text(page(), encoding="utf-8")
    print(f"wrote {DOCS / 'benchmarks.md'}")
