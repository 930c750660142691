"""Operations of a compiled program and their times, read from a trace of JAX's own profiler."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import jax


def read_op_times(folder: Path, program: str) -> dict[str, tuple[int, float]]:
    """Read the newest trace under `folder`.

    Args:
        program: how the names of the programs to look at begin, such as "jit_decode".

    Returns:
        by operation: the number of its events, and their seconds together.
    """
    times: dict[str, list[float]] = collections.defaultdict(list)
    newest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and str(stats.get("hlo_module", "")).startswith(program):
                    times[str(stats["hlo_op"])].append(event.duration_ns * 1e-9)
    return {op: (len(seconds), sum(seconds)) for op, seconds in times.items()}


def op_kind(op: str) -> str:
    """Return the name of an operation without its number: `dot.12` -> `dot`."""
    return re.sub(r"[.\d]+.*$", "", op)
