"""One part of the GPU suite in a process of its own: `python -m scripts.gpu.suite_part PART --out FOLDER ...`.

`--compile PART ...` compiles the programs of parts ahead of their use instead, into the persistent compilation cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mtpjax.presets import PRESETS
from scripts.benchmarks import bench_table
from scripts.gpu import experts as gpu_experts
from scripts.gpu import kernels as gpu_kernels
from scripts.gpu.suite_bits import bits
from scripts.gpu.suite_parts import batch, batch_programs, model, model_programs, profile, text, warm_up
from scripts.gpu.suite_setup import Options, Results, Setup

PROGRAMS = {"model": model_programs, "batch": batch_programs}


def kernels(setup: Setup, results: Results) -> None:
    """Compare each kernel with the formula, and measure it."""
    failed = []
    for row in gpu_kernels.measure_all(setup.smoke, setup.ceilings, setup.go_on):
        results.add(row)
        verdict = "right" if row["right"] else "WRONG"
        failed += [] if row["right"] else [row["case"]]
        print(
            f"{row['case']:28} {verdict} (error {row['error']:.1e})  {statistics.median(row['seconds']) * 1e6:9.1f} us "
            f"({row['clock']}), {row['of_roofline']:.2f} of the roofline ({row['limit']})",
            flush=True,
        )
    results.finish(failed)


def experts(setup: Setup, results: Results) -> None:
    """Compare our expert kernels with `ragged_dot` and with dequantised products, for several numbers of rows."""
    failed = []
    for row in gpu_experts.measure_all(setup.smoke, setup.ceilings, setup.go_on):
        results.add(row)
        name = f"{row['rows']:5} rows {row['side']:10}"
        if "impossible" in row:
            print(f"{name} impossible: {row['impossible']}", flush=True)
            continue
        failed += [] if row["right"] else [name]
        print(
            f"{name} {'right' if row['right'] else 'WRONG'} (error {row['error']:.1e})  "
            f"{statistics.median(row['seconds']) * 1e6:9.1f} us a layer, {row['of_kernels_time']:.2f} x the kernels, "
            f"{row['of_roofline']:.2f} of the roofline ({row['limit']})",
            flush=True,
        )
    results.finish(failed)


def table(setup: Setup, results: Results) -> None:
    """Run bench_table.py, one side after another."""
    if setup.smoke:
        sizes = (
            "--model tiny --prompt-tokens 32 --chunk 16 --num-speculative-tokens 0 2 --max-tokens 8 --runs 1".split()
        )
    else:
        contexts = [str(context) for context in sorted(setup.contexts) if context <= 32_768]
        sizes = ["--shape", setup.options.shape, "--prompt-tokens", *contexts, "--chunk", "1024", "--runs", "2"]
    extra = ["--quantization", setup.options.weights, "--interleave", "prompt", "--no-ablations", "--roofline"]
    found = bench_table.main([*sizes, *extra, "--out", str(setup.options.out / "gpu_table")])
    for row in found.pop("rows"):
        results.add(row)
    results.finish(**found)


def tune(setup: Setup, results: Results) -> None:
    """Run `mtpjax tune`, and keep the table that it writes among the results."""
    target = setup.options.out / "tile_table.json"
    command = [sys.executable, "-m", "mtpjax.cli.main", "tune", "--out", str(target)]
    command += ["--toy"] if setup.smoke else ["--minutes", f"{max(setup.options.seconds / 60, 0.5):.2f}"]
    done = subprocess.run(command, text=True, capture_output=True)
    print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
    results.add({"table": str(target), "exit_status": done.returncode})
    results.finish([] if done.returncode == 0 else ["mtpjax tune"])


PARTS: dict[str, Callable[[Setup, Results], None]] = {
    "model": model,
    "bits": bits,
    "kernels": kernels,
    "batch": batch,
    "text": text,
    "experts": experts,
    "tune": tune,
    "table": table,
    "profile": profile,
}
NO_CEILINGS = ("bits", "text", "tune")  # nothing in them is compared with the roofline


def options_parser() -> argparse.ArgumentParser:
    """Return the options that the suite and its parts share."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--shape", choices=list(PRESETS), default="35b-a3b")
    parser.add_argument("--weights", default="iq4nl", choices=["int4", "int8", "iq4nl", "fp8"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[], help="lengths of caches, the most telling first")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that everything runs, on any device")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the results (%(default)s)")
    return parser


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__), parents=[options_parser()])
    parser.add_argument("part", choices=PARTS, nargs="?")
    parser.add_argument("--seconds", type=float, default=480, help="start nothing new after so long")
    parser.add_argument("--compile", choices=PROGRAMS, nargs="+", help="compile the programs of these parts instead")
    args = parser.parse_args()
    options = Options(args.out, args.seconds, args.smoke, args.shape, args.weights, tuple(args.contexts))
    if args.compile:
        setup = Setup(options, abstract=True)
        for part in args.compile:
            warm_up(setup, PROGRAMS[part](setup))
        return 0
    if args.part is None:
        parser.error("name a part, or the parts to --compile")
    setup = Setup(options)
    results = Results(args.part, setup, ceilings=args.part not in NO_CEILINGS)
    PARTS[args.part](setup, results)
    return int(bool(results.content["failed"]))


if __name__ == "__main__":
    sys.exit(main())
