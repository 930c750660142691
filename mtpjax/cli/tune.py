"""Measure tile constants of the GPU kernels on this card, and write the user's own table.

    mtpjax tune [--out FILE] [--minutes M] [--dry-run]
    mtpjax tune --toy --out FILE            (toy sizes on a CPU, to see that everything runs)

Kernels give the same results with the table up to the order of sums: texts in bfloat16 may change with it, but not
between two calls with the same one. From then on every program of mtpjax on this kind of card uses the table; delete
the file to go back to the table of the package. The environment variable MTPJAX_TILE_TABLE names another file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.platform import device_kind, platform
from kernels_pallas.tile_tables import ENVIRONMENT_VARIABLE, Entry, TileTable, parse_table, user_table_path
from kernels_pallas.tile_tables.constants import OPS
from mtpjax.cli.tune_cases import Trial, TuneCase, all_trials
from mtpjax.cli.tune_times import compile_in_parallel, compile_share, load_programs, measure

PROG = "mtpjax tune"
ROUNDS = 7
EQUAL = 1.02  # a candidate within so much of the fastest one counts as equally fast
COMPILING = 0.6  # share of the time after which the workers must have compiled


def choose_entries(times: dict[Trial, float], basis: str) -> dict[str, tuple[Entry, ...]]:
    """Return the entries of a table from the median microseconds of all trials that ran.

    Cases that decide the same constants decide together: by the sum of their times, each divided by the case's best.

    Raises:
        ValueError: no candidate ran in all cases that decide the same constants.
    """
    by_group: dict[tuple[str, tuple[int | None, int | None], tuple[str, ...]], list[TuneCase]] = defaultdict(list)
    for case in dict.fromkeys(trial.case for trial in times):
        by_group[case.op, case.size_class, case.tuned].append(case)
    chosen: dict[tuple[str, tuple[int | None, int | None]], tuple[dict[str, int], list[str]]] = {}
    for (op, size_class, tuned), cases in by_group.items():
        of_case = {case: {t.constants: time for t, time in times.items() if t.case is case} for case in cases}
        cost = {
            candidate: sum(found[candidate] / min(found.values()) for found in of_case.values())
            for candidate in cases[0].candidates
            if all(candidate in found for found in of_case.values())
        }
        if not cost:
            raise ValueError(f"no candidate of {', '.join(tuned)} ran in all of: {'; '.join(c.name for c in cases)}")
        best = next(candidate for candidate, each in cost.items() if each <= EQUAL * min(cost.values()))
        values, notes = chosen.setdefault((op, size_class), ({}, []))
        values |= cases[0].values(best)
        notes += [f"{case.name}: {found[best]:.1f} us" for case, found in of_case.items()]
    entries: dict[str, list[Entry]] = defaultdict(list)
    for (op, size_class), (values, notes) in sorted(chosen.items(), key=lambda item: _size(item[0][1])):
        constants: Any = OPS[op]()
        entries[op].append(Entry(replace(constants, **values), basis, "; ".join(notes), *size_class))
    return {op: tuple(each) for op, each in entries.items()}


def _size(size_class: tuple[int | None, int | None]) -> tuple[float, ...]:
    return tuple(float("inf") if size is None else size for size in size_class)


def report(times: dict[Trial, float], failed: dict[Trial, str], ops: dict[str, tuple[Entry, ...]]) -> None:
    """Print the median of every trial, and what was chosen."""
    best = {case: min(time for t, time in times.items() if t.case is case) for case in {t.case for t in times}}
    for trial, microseconds in times.items():
        ratio = microseconds / best[trial.case]
        print(f"{trial.case.name:26} {trial.case.describe(trial.constants):36} {microseconds:10.2f} us  {ratio:5.2f}")
    for trial, error in failed.items():
        print(f"{trial.case.name:26} {trial.case.describe(trial.constants):36} does not run: {error}")
    for op, entries in ops.items():
        for entry in entries:
            size = "all sizes" if entry.max_outputs is None else f"at most {entry.max_outputs} outputs"
            print(f"chosen for {op}, {size}: {entry.constants}")


def write_table(table: TileTable, path: Path) -> None:
    """Write a table's file as a whole: a reader finds the old one or the new one."""
    text = table.to_json()
    parse_table(text, str(path), table.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text)
    draft.replace(path)


def run(args: argparse.Namespace, trials: list[Trial]) -> int:
    """Compile, measure, choose and write."""
    began, device = time.perf_counter(), device_kind()
    out = args.out or Path(os.environ.get(ENVIRONMENT_VARIABLE) or user_table_path(device))
    seconds = args.minutes * 60
    with tempfile.TemporaryDirectory(prefix="mtpjax-tune-") as folder:
        options = ["--toy"] if args.toy else []
        compile_in_parallel(Path(folder), args.workers, COMPILING * seconds, *options)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        programs, failed = load_programs(trials, device)
        print(f"{len(programs)} programs compiled in {time.perf_counter() - began:.0f} s by {args.workers} processes")
        if not programs:
            print(f"{PROG}: no candidate runs; the first error: {next(iter(failed.values()))}", file=sys.stderr)
            return 1
        figures = measure(programs, 2 if args.toy else ROUNDS, began + 0.9 * seconds, from_profiler=not args.toy)
    times = {trial: statistics.median(each) for trial, each in figures.items()}
    rounds = min(map(len, figures.values()))
    ops = choose_entries(times, "toy" if args.toy else "measured")
    report(times, failed, ops)
    what = "toy sizes, host times" if args.toy else f"{jax.devices()[0].device_kind}, median of {rounds} rounds"
    table = TileTable(device, f"mtpjax tune, {time.strftime('%Y-%m-%d')}, jax {jax.__version__}: {what}", ops)
    write_table(table, out)
    print(f"written: {out} for {device!r}, after {time.perf_counter() - began:.0f} s")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run `mtpjax tune`. Returns 2 if there is no CUDA GPU, 1 if nothing could be measured."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the file to write (default: where mtpjax looks for it)")
    parser.add_argument("--minutes", type=float, default=3.0, help="take no longer (default 3)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and stop")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU; no other device takes the table")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("minutes", "workers"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} is {getattr(args, name)}, expected more than 0")
    if args.toy:
        jax.config.update("jax_platforms", "cpu")
        if args.out is None and not (args.dry_run or args.worker):
            parser.error("--toy needs --out: its table is not for use")
    trials = all_trials(args.toy)
    if args.dry_run:
        for trial in trials:
            print(f"{trial.case.op:16} {trial.case.name:26} {trial.case.describe(trial.constants)}")
        print(f"{len(trials)} programs of {len({trial.case.name for trial in trials})} cases")
        return 0
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the workers need some of the card's memory
    if not args.toy and platform() != "cuda":
        found = jax.devices()[0].device_kind
        print(f"{PROG}: the device is {found!r}, not a CUDA GPU; --toy runs at toy size on a CPU", file=sys.stderr)
        return 2
    if args.worker:
        compile_share(trials, device_kind(), *args.worker)
        return 0
    return run(args, trials)
