"""Time from the start of a process to its first token: the job of `make demo`.

    python -m scripts.benchmarks.bench_start [--runs 7] [--json docs/benchmarks/start.json]

Four variants take turns, each run in a new process:

* nothing: no program is at hand, every one is traced, lowered and compiled;
* one by one: the same, without compiling the decode loop while prompts are read;
* XLA's cache: JAX's persistent cache has the binaries, and programs are traced and lowered;
* kept: `ProgramCache` has the executables.

Reported are medians, and where the time went: imports (jax, flax and mtpjax), the model (opening, reading, layout,
tokenizer), waiting for programs, and the rest, which is reading the prompts and one call of the decode loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.benchmarks.results import describe, ratio_table, write_json

VARIANTS = ("nothing", "one by one", "XLA's cache", "kept")
PARTS = ("first token", "imports", "model", "programs", "prompts and first call")
EVENTS = {
    "traces": "/jax/core/compile/jaxpr_trace_duration",
    "lowerings": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compilations": "/jax/core/compile/backend_compile_duration",
}


class FirstTokenError(Exception):
    """Ends the job at its first token."""


def child(started: float, one_by_one: bool) -> None:
    """Run the job up to its first token; print the parts of its time, in seconds, and its counts as JSON.

    Args:
        started: `time.monotonic()` when the process was started.
        one_by_one: make each program when it is needed.
    """
    from collections import Counter

    import jax

    from mtpjax import LLM
    from mtpjax.cli import generate  # noqa: F401  the command's own imports count as such
    from mtpjax.cli.main import run_process
    from mtpjax.engine.model_runner import ModelRunner

    imported = time.monotonic()
    seen: Counter[str] = Counter()
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: seen.update([event]))
    if one_by_one:
        ModelRunner.begin_decode = lambda *_: None  # type: ignore[method-assign]
    generate_iter = LLM.generate_iter

    def until_first_token(llm, jobs, *, on_tokens=None):
        ready = time.monotonic()

        def first(index, tokens):
            now = time.monotonic()
            programs = llm.engine.compile_seconds
            rest = now - ready - programs
            seconds = zip(PARTS, (now - started, imported - started, ready - imported, programs, rest), strict=True)
            counts = {name: seen[event] for name, event in EVENTS.items()}
            kept = llm.engine.runner.programs.kept
            if kept is not None:
                kept.wait()
            print("\n" + json.dumps({"seconds": dict(seconds), "counts": counts}))
            raise FirstTokenError

        return generate_iter(llm, jobs, on_tokens=first)

    LLM.generate_iter = until_first_token  # type: ignore[method-assign]
    try:
        run_process(["generate", "--recommended-sampling"])
    except FirstTokenError:
        return


def run(variant: str, folder: Path) -> dict[str, dict[str, float]]:
    """Return the figures of one process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    env["MTPJAX_PROGRAM_CACHE"] = str(folder / "kept") if variant == "kept" else ""
    if variant == "XLA's cache":
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    command = [sys.executable, "-m", "scripts.benchmarks.bench_start", "--child"]
    command += [repr(time.monotonic()), *(["--one-by-one"] if variant == "one by one" else [])]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=7, help="processes of each variant")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--one-by-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return child(args.child, args.one_by_one)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant in ("XLA's cache", "kept"):
            run(variant, folder)  # fills the folder
        runs = [{variant: run(variant, folder) for variant in VARIANTS} for _ in range(args.runs)]
        sizes = [file.stat().st_size for file in (folder / "kept").iterdir()]
    seconds = {part: {v: [r[v]["seconds"][part] for r in runs] for v in VARIANTS} for part in PARTS}
    counts = {variant: runs[0][variant]["counts"] for variant in VARIANTS}
    print(ratio_table(seconds))
    for variant, count in counts.items():
        print(f"{variant}: " + ", ".join(f"{n} {event}" for event, n in count.items()))
    if args.json:
        medians = {part: {v: statistics.median(values) for v, values in row.items()} for part, row in seconds.items()}
        content = {"what": "from the start of a process to its first token, by what is kept", **describe()}
        write_json(
            args.json, content | {"median": medians, "runs": seconds, "counts": counts, "kept_bytes": sum(sizes)}
        )


if __name__ == "__main__":
    main()
