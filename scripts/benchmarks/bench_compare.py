"""Ratios of two JSON files of the same benchmark; flags changes beyond the spread of their runs.

    python -m scripts.benchmarks.bench_compare docs/benchmarks/table.json new.json [--at-least 1.05]

Exit status 1 when something is flagged. Numbers are matched by their place in the file; rows of a list by the values that name
them (prompt_tokens, side, draft, batch, ...).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = (
    "part", "prompt_tokens", "side", "variant", "domain", "rows", "mtp", "batch", "temperature", "draft", "type", "name",
)  # fmt: skip


def figures(content: Any, place: str = "") -> Iterator[tuple[str, list[float]]]:
    """(place, runs): a list of numbers is the runs of one figure, a lone number a figure of one run."""
    if isinstance(content, bool) or content is None or isinstance(content, str):
        return
    if isinstance(content, int | float):
        yield place, [float(content)]
    elif isinstance(content, list):
        if content and all(isinstance(x, int | float) and not isinstance(x, bool) for x in content):
            yield place, [float(x) for x in content]
            return
        for number, each in enumerate(content):
            label = number
            if isinstance(each, dict):
                named = [f"{n}={each[n]}" for n in NAMES if isinstance(each.get(n), str | int | float)]
                label = " ".join(named) or number  # type: ignore[assignment]
            yield from figures(each, f"{place}[{label}]")
    elif isinstance(content, dict):
        for key, value in content.items():
            named = key in NAMES and not isinstance(value, list | dict)
            if not named and key not in ("versions", "cores", "new_tokens"):
                yield from figures(value, f"{place}.{key}" if place else key)


def compare(old: Any, new: Any, at_least: float) -> list[tuple[str, float, float, float, bool]]:
    """(place, old median, new median, ratio, flagged): flagged if the runs do not overlap and the ratio is beyond `at_least`.

    A figure of one run each has no spread; `at_least` alone decides.
    """
    before, lines = dict(figures(old)), []
    for place, runs in figures(new):
        if place not in before:
            continue
        a, b = statistics.median(before[place]), statistics.median(runs)
        if a == 0:
            ratio = 1.0 if b == 0 else float("inf")
        else:
            ratio = b / a
        apart = min(runs) > max(before[place]) or max(runs) < min(before[place])
        lines.append((place, a, b, ratio, apart and not 1 / at_least <= ratio <= at_least))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--at-least", type=float, default=1.05, help="ratios nearer to 1 are never flagged (%(default)s)"
    )
    args = parser.parse_args()
    if args.at_least < 1:
        parser.error(f"--at-least is {args.at_least}; expected 1 or more")
    contents = []
    for path in (args.old, args.new):
        try:
            contents.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: cannot be read as JSON ({error})")
    for key in ("what", "device"):
        a, b = (c.get(key) if isinstance(c, dict) else None for c in contents)
        if a != b:
            print(f"note: {key} is {a!r} in {args.old} and {b!r} in {args.new}")
    lines = compare(*contents, args.at_least)
    if not lines:
        parser.error(f"{args.old} and {args.new} have no figure in common")
    for place, a, b, ratio, flagged in lines:
        print(f"{'CHANGED' if flagged else '       '} {ratio:8.3f}  {a:.5g} -> {b:.5g}  {place}")
    flagged_count = sum(line[-1] for line in lines)
    print(f"{len(lines)} figures, {flagged_count} changed beyond the spread of their runs and {args.at_least} x")
    sys.exit(1 if flagged_count else 0)


if __name__ == "__main__":
    main()
