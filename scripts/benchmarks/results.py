"""What every benchmark shares: where it ran, a table of medians, and a JSON file that appears whole or not at all."""

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
    """Date, device (JAX's own, unless it is told and JAX need not start), versions and commit of this run."""
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
    """The device's peak so far; the process's peak resident memory where the device does not count."""
    import resource

    import jax

    found = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found / 2**20 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ratio_table(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: a row a measurement, a column a side; median (lowest ... highest) of the runs."""
    sides = list(dict.fromkeys(side for row in figures.values() for side in row))
    lines = ["| | " + " | ".join(sides) + " |", "|---|" + "---|" * len(sides)]
    for name, row in figures.items():
        cells = [
            f"{statistics.median(row[s]):.4g} ({min(row[s]):.4g} … {max(row[s]):.4g})" if s in row else ""
            for s in sides
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write `content`, through a temporary file beside it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(target)
    print(f"wrote {target}")
