"""Ratios of two JSON files of the same benchmark; changes beyond the spread of their runs are flagged.

    python -m scripts.benchmarks.bench_compare docs/benchmarks/table.json new.json [--at-least 1.05]

The exit status is 1 if anything is flagged. Figures are matched by their path in the file. The path of a row in a list
is made of the values that name it (prompt_tokens, side, draft, batch, ...).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Keys whose values name a row.
ROW_KEYS = (
    "part",
    "prompt_tokens",
    "side",
    "variant",
    "domain",
    "rows",
    "mtp",
    "batch",
    "temperature",
    "draft",
    "type",
    "name",
)
NOT_FIGURES = ("versions", "cores", "new_tokens")


class Comparison(NamedTuple):
    """One figure of both files: its path, the medians, their ratio new / old, and whether the change is flagged."""

    path: str
    old: float
    new: float
    ratio: float
    flagged: bool


def figures(content: Any, path: str = "") -> Iterator[tuple[str, list[float]]]:
    """Yield (path, runs): a list of numbers holds the runs of one figure, a single number is a figure of one run."""
    if isinstance(content, bool) or content is None or isinstance(content, str):
        return
    if isinstance(content, int | float):
        yield path, [float(content)]
    elif isinstance(content, list):
        if content and all(isinstance(x, int | float) and not isinstance(x, bool) for x in content):
            yield path, [float(x) for x in content]
            return
        for number, item in enumerate(content):
            label = str(number)
            if isinstance(item, dict):
                named = [f"{key}={item[key]}" for key in ROW_KEYS if isinstance(item.get(key), str | int | float)]
                label = " ".join(named) or label
            yield from figures(item, f"{path}[{label}]")
    elif isinstance(content, dict):
        for key, value in content.items():
            names_the_row = key in ROW_KEYS and not isinstance(value, list | dict)
            if not names_the_row and key not in NOT_FIGURES:
                yield from figures(value, f"{path}.{key}" if path else key)


def compare(old: Any, new: Any, at_least: float) -> list[Comparison]:
    """Compare the figures that both contents have.

    A figure is flagged if the runs do not overlap and the ratio is beyond `at_least`. Figures of a single run have no
    spread, so `at_least` alone decides.
    """
    old_figures, comparisons = dict(figures(old)), []
    for path, new_runs in figures(new):
        if path not in old_figures:
            continue
        old_runs = old_figures[path]
        a, b = statistics.median(old_runs), statistics.median(new_runs)
        if a == 0:
            ratio = 1.0 if b == 0 else float("inf")
        else:
            ratio = b / a
        apart = min(new_runs) > max(old_runs) or max(new_runs) < min(old_runs)
        comparisons.append(Comparison(path, a, b, ratio, apart and not 1 / at_least <= ratio <= at_least))
    return comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--at-least", type=float, default=1.05, help="smaller changes are never flagged (%(default)s)")
    args = parser.parse_args()
    if args.at_least < 1:
        parser.error(f"--at-least is {args.at_least}; expected 1 or more")
    contents = []
    for file in (args.old, args.new):
        try:
            contents.append(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            parser.error(f"{file}: cannot be read as JSON ({error})")
    old, new = contents
    for key in ("what", "device"):
        a, b = (content.get(key) if isinstance(content, dict) else None for content in contents)
        if a != b:
            print(f"note: {key} is {a!r} in {args.old} and {b!r} in {args.new}")
    comparisons = compare(old, new, args.at_least)
    if not comparisons:
        parser.error(f"{args.old} and {args.new} have no figure in common")
    for c in comparisons:
        print(f"{'CHANGED' if c.flagged else '       '} {c.ratio:8.3f}  {c.old:.5g} -> {c.new:.5g}  {c.path}")
    num_flagged = sum(c.flagged for c in comparisons)
    print(f"{len(comparisons)} figures, {num_flagged} changed beyond the spread of their runs and {args.at_least} x")
    sys.exit(1 if num_flagged else 0)


if __name__ == "__main__":
    main()
