"""Everything worth proving on a CUDA GPU, in as many minutes as there are; no network.

    python -m scripts.gpu.suite [--minutes 12] [--parts model bits ...] [--out FOLDER]
    python -m scripts.gpu.suite --smoke                    # all parts at a toy size, on any device

Each part is a process of its own with a time limit, the most telling one first, and writes FOLDER/gpu_PART.json after
every row: an interrupted run leaves what it has measured. While one process measures, another one compiles the programs
of the parts to come. What the time was too short for is listed. At the end there is FOLDER/report.md, a page for
people, and FOLDER/caches.tar with the compiled programs, which `--caches` gives to the next run.

    model    decoding rounds and prompt chunks of one sequence, 1k to 196k tokens of context
    bits     every op and whole models: the same bits among other rows, in other chunks, with and without drafts
    kernels  each kernel against the formula, with its time from the profiler
    batch    decoding rounds of 1 to 64 sequences
    text     texts of the embedded model, with and without drafts
    experts  our expert kernels beside `ragged_dot` and dequantised products
    tune     `mtpjax tune`
    table    the reference table (`scripts.benchmarks.bench_table`)
    profile  a CSV of all kernels of a round and of a prompt chunk

The model is a 35B-A3B with random IQ4_NL weights (`--shape`, `--weights`), so acceptance is simulated. Needs jax, flax,
orbax, numpy, safetensors, tokenizers; matplotlib for the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.gpu.suite_page import write_page
from scripts.gpu.suite_part import PARTS, PROGRAMS, options_parser

# Shares of the time. What a part leaves over goes to the parts after it.
SHARES = dict(zip(PARTS, (0.28, 0.22, 0.11, 0.12, 0.04, 0.04, 0.1, 0.06, 0.03), strict=True))
GRACE_SECONDS = 10  # after its time a part may finish what it is at
CACHES_MEGABYTES = 60


def environment(out: Path) -> dict[str, str]:
    """Return the environment of the parts: they share caches of compiled programs, and the memory of the GPU."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(out / "caches" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "MTPJAX_PROGRAM_CACHE": str((out / "caches" / "programs").absolute()),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def run_parts(parts: Sequence[str], options: list[str], out: Path, minutes: float) -> dict[str, str]:
    """Run the parts one after another within their shares of the time. Returns how each of them ended."""
    ends = time.monotonic() + 60 * minutes
    module = [sys.executable, "-m", "scripts.gpu.suite_part"]
    ended: dict[str, str] = {}
    env, ahead = environment(out), [part for part in parts if part in PROGRAMS]
    compiler = subprocess.Popen([*module, *options, "--compile", *ahead], env=env) if ahead else None
    try:
        for number, part in enumerate(parts):
            left = ends - time.monotonic()
            seconds = left * SHARES[part] / sum(SHARES[p] for p in parts[number:])
            if seconds < 1:
                ended[part] = "not begun: the time was up"
                continue
            print(f"== {part}, {seconds:.0f} s", flush=True)
            worker = subprocess.Popen([*module, part, *options, "--seconds", f"{seconds:.1f}"], env=env)
            try:
                status = worker.wait(seconds + GRACE_SECONDS)
                ended[part] = {0: "done", 1: "WRONG results"}.get(status, f"exit status {status}")
            except subprocess.TimeoutExpired:
                ended[part] = "stopped: it took longer than its time"
            finally:
                worker.kill()
                worker.wait()
    except KeyboardInterrupt:
        ended |= {part: "interrupted" for part in parts if part not in ended}
    finally:
        if compiler:
            compiler.kill()
            compiler.wait()
    return ended


def pack_caches(out: Path, megabytes: int = CACHES_MEGABYTES) -> Path:
    """Write the compiled programs to a tar file, those used last first, up to a size. Returns the file."""
    files = [file for file in (out / "caches").rglob("*") if file.is_file()]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    size, target = 0, out / "caches.tar"
    with tarfile.open(target, "w") as tar:
        for file in files:
            size += file.stat().st_size + 1536  # its header, and up to a block of padding
            if size < megabytes << 20:
                tar.add(file, file.relative_to(out))
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options_parser()]
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="in this order")
    parser.add_argument("--minutes", type=float, default=12, help="for all parts together (%(default)s)")
    parser.add_argument("--caches", type=Path, help="caches.tar of an earlier run")
    args = parser.parse_args()
    if not args.smoke:
        check = "from kernels_pallas.platform import platform; import jax, sys; "
        check += "sys.exit(0 if platform() == 'cuda' else jax.devices()[0].device_kind)"
        found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
        if found.returncode:
            device = found.stderr.strip().splitlines()[-1]
            parser.error(f"the device is {device}, not a CUDA GPU; try --smoke")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.caches:
        with tarfile.open(args.caches) as tar:
            tar.extractall(args.out, filter="data")
    options = ["--out", str(args.out), "--shape", args.shape, "--weights", args.weights]
    options += ["--contexts", *map(str, args.contexts)] if args.contexts else []
    options += ["--smoke"] if args.smoke else []
    ended = run_parts(args.parts, options, args.out, args.minutes)
    page = write_page(args.out, ended)
    print(page.read_text())
    print(f"{page}; {pack_caches(args.out)}: compiled programs for the next run")
    return int(any(how != "done" for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
