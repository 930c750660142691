"""Damage a GGUF file at random; every outcome must be a load or a clear error.

python -m scripts.format_checks.fuzz_gguf FILE.gguf [--cases 10000]
"""

from __future__ import annotations

import argparse
import collections
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from checkpoints import CheckpointError, CheckpointWarning, GgufFile
from mtpjax.config import ConfigError
from mtpjax.loading.weight_map import check_source

SECONDS = 2.0


def flipped(raw: bytes, seed: int) -> bytes:
    """Replace one to eight bytes, mostly near the front with its lengths and counts; cut one file in ten short."""
    rng = np.random.default_rng(seed)
    damaged = bytearray(raw)
    for _ in range(rng.integers(1, 9)):
        end = len(raw) if rng.random() < 0.2 else min(len(raw), int(2 ** rng.uniform(3, 14)))
        damaged[rng.integers(end)] = rng.integers(256)
    return bytes(damaged[: rng.integers(len(raw))] if rng.random() < 0.1 else damaged)


def outcome(raw: bytes, file: Path, limit: float | None = None) -> str:
    """Read the header and every tensor; return "loaded", "loaded with a warning" or "refused".

    Raises:
        TimeoutError: that took more than `limit` seconds of processor time.
        Exception: reading failed with anything but a CheckpointError or ConfigError.
    """
    file.write_bytes(raw)
    start = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CheckpointWarning)
            source = GgufFile(file)
            check_source(source)
            for name in source.tensors:
                source.read(name)
        result = "loaded with a warning" if caught else "loaded"
    except (CheckpointError, ConfigError):
        result = "refused"
    if limit is not None and (seconds := time.process_time() - start) > limit:
        raise TimeoutError(f"{seconds:.1f} s for a file of {len(raw):,} bytes, expected at most {limit:.0f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path, help="a small, valid GGUF file")
    parser.add_argument("--cases", type=int, default=10_000)
    args = parser.parse_args()
    raw, counts = args.file.read_bytes(), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.cases):
            try:
                counts[outcome(flipped(raw, seed), Path(folder) / "f.gguf", SECONDS)] += 1
            except Exception:
                print(f"case {seed}:", file=sys.stderr)
                raise
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.cases:,} cases: {dict(counts)}; peak {peak:,.0f} MiB of memory, no other outcome")


if __name__ == "__main__":
    main()
