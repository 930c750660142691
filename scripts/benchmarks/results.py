"""Output that all benchmarks share: a description of the run, a table of medians, and JSON files written atomically."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def describe(device: str | None = None) -> dict[str, Any]:
    """Describe this run: date, device, machine, versions and commit. Pass `device` to avoid initialising JAX."""
    if device is None:
        import jax

        device = jax.devices()[0].device_kind
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
    }


def memory_peak_mb() -> float:
    """Return the device's peak memory so far, or the process's peak resident memory if the device does not count."""
    import resource

    import jax

    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return peak / 2**20 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ratio_table(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return a Markdown table with a row for each figure and a column for each variant.

    Cells are the median (lowest … highest) of the runs, which are `figures[figure][variant]`.
    """
    variants = list(dict.fromkeys(variant for row in figures.values() for variant in row))
    lines = ["| | " + " | ".join(variants) + " |", "|---|" + "---|" * len(variants)]
    for name, row in figures.items():
        cells = [
            f"{statistics.median(row[v]):.4g} ({min(row[v]):.4g} … {max(row[v]):.4g})" if v in row else ""
            for v in variants
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_json(path: str, content: Mapping[str, Any], *, quiet: bool = False) -> None:
    """Write `content` to a temporary file beside `path`, then rename that file to `path`; say so unless `quiet`."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(target)
    if not quiet:
        print(f"wrote {target}")
