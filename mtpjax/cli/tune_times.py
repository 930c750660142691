"""Times of the trials of `mtpjax tune`: kernels from the profiler on a GPU, whole programs from the host on a CPU."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtpjax.cli.tune_cases import Trial, TuneCase

CALLS = 5  # of each trial in a round, on a GPU
Program = Callable[[], Any]


def compile_in_parallel(cache: Path, workers: int, seconds: float, *arguments: str) -> None:
    """Have worker processes compile shares of the trials into JAX's persistent cache, for at most so many seconds.

    What they do not finish, this process compiles itself, and meets the errors that they met.
    """
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the workers share the card's memory, of which they need little
    }
    command = [sys.executable, "-m", "mtpjax.cli.main", "tune", *arguments, "--worker"]
    started = [
        subprocess.Popen([*command, str(share), str(workers)], env=env, stdout=subprocess.DEVNULL)
        for share in range(workers)
    ]
    deadline = time.perf_counter() + seconds
    for process in started:
        try:
            process.wait(max(0.1, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compile_share(trials: list[Trial], device: str, share: int, workers: int) -> None:
    """In a worker process: compile every `workers`-th trial. What fails, fails again where it is measured."""
    for trial in trials[share::workers]:
        try:
            trial.compile(device)
        except Exception as error:  # whatever the compiler raises
            print(f"{trial.program_name}: {error}", file=sys.stderr)


def load_programs(trials: list[Trial], device: str) -> tuple[dict[Trial, Program], dict[Trial, str]]:
    """Return a function for each trial that runs it on random data, and the errors of trials that do not compile."""
    programs: dict[Trial, Program] = {}
    failed: dict[Trial, str] = {}
    data: dict[str, tuple[Any, ...]] = {}
    for trial in trials:
        try:
            compiled = trial.compile(device)
        except Exception as error:  # what does not fit this card is a result, whatever the error
            failed[trial] = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:200]}"
            continue
        if trial.case.name not in data:
            data[trial.case.name] = random_arguments(trial.case)
        programs[trial] = partial(_run, compiled, data[trial.case.name])
    return programs, failed


def _run(compiled: jax.stages.Compiled, args: tuple[Any, ...]) -> None:
    jax.block_until_ready(compiled(*args))


def random_arguments(case: TuneCase) -> tuple[Any, ...]:
    """Return random arrays of the case's arguments: any codes; scales and other numbers between 2^-8 and 2^-6."""
    rng = np.random.default_rng(0)

    def make(spec: Any) -> jax.Array:
        if np.issubdtype(spec.dtype, np.integer):
            size = int(np.prod(spec.shape)) * spec.dtype.itemsize
            return jax.device_put(np.frombuffer(rng.bytes(size), spec.dtype).reshape(spec.shape))
        return jax.device_put(np.exp2(rng.uniform(-8, -6, spec.shape)).astype(spec.dtype))

    return jax.tree.map(make, case.args)


def measure(
    programs: Mapping[Trial, Program], rounds: int, deadline: float, from_profiler: bool
) -> dict[Trial, list[float]]:
    """Return microseconds of each trial, one figure a round. Rounds run all trials one after the other.

    Args:
        deadline: of `time.perf_counter`; no round begins after it, except the first.
        from_profiler: take the times of kernels from JAX's profiler; else those of the whole program from the host.
    """
    for run in programs.values():
        run()
    found: dict[Trial, list[float]] = {trial: [] for trial in programs}
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0  # the card's events are enough
    for number in range(rounds):
        if number and time.perf_counter() > deadline:
            break
        in_order = list(programs.items())[:: 1 if number % 2 else -1]
        if not from_profiler:
            for trial, run in in_order:
                start = time.perf_counter()
                run()
                found[trial].append((time.perf_counter() - start) * 1e6)
            continue
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                for _ in range(CALLS):
                    for _, run in in_order:
                        run()
            events = kernel_events(Path(folder))
        for trial in programs:
            found[trial].append(kernel_microseconds(events.get(f"jit_{trial.program_name}", {}), trial))
    return found


def kernel_events(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return microseconds of all events of GPUs in the newest trace under a folder, by program and kernel."""
    events: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    newest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        if "GPU" not in plane.name:
            continue
        for line in plane.lines:
            if line.name.startswith("XLA"):  # the same times again, by operation or program
                continue
            for event in line.events:
                module = str(dict(event.stats).get("hlo_module", ""))
                if module:  # copies of a kernel in a program are numbered
                    name = re.sub(r"[._]\d+$", "", event.name)
                    events[module][name].append(event.duration_ns * 1e-3)
    return events


def kernel_microseconds(kernels: Mapping[str, list[float]], trial: Trial) -> float:
    """Return the median time of each of the trial's kernels, added up.

    Raises:
        RuntimeError: the trace has none of them.
    """
    times = [statistics.median(each) for name, each in kernels.items() if name.startswith(trial.case.kernels)]
    if not times:
        raise RuntimeError(
            f"the profiler saw no kernel {trial.case.kernels}* of {trial.case.name}; it needs NVIDIA's CUPTI, which "
            "`pip install 'jax[cuda12]'` brings along, and the right to read the card's counters"
        )
    return sum(times)
