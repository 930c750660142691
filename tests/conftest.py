"""Settings and fixtures of all tests: quick compilation, one cache of compiled programs, the golden cases."""

import gc
import os
import platform
from collections.abc import Iterator
from functools import cache, partialmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

# A test runs a program for milliseconds and compiles it for seconds, nearly all of them in LLVM. These flags make that
# five times faster and leave the mathematics alone; `shipped_code` undoes them where a test is about what users run.
# They are not for GPUs, and a flag that is set already stays: XLA_FLAGS=--xla_backend_optimization_level=3
SHIPPED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 11):
    # The flag is gone there, and an unknown flag ends the process.
    del SHIPPED["xla_cpu_use_fusion_emitters"], QUICK["xla_cpu_use_fusion_emitters"]
if not os.path.exists("/dev/nvidiactl"):
    given = os.environ.get("XLA_FLAGS", "")
    quick = [f"--{name}={str(value).lower()}" for name, value in QUICK.items() if name not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *quick]).strip()
# Tests neither read nor fill the user's folder of compiled programs; those about it have folders of their own.
os.environ["MTPJAX_PROGRAM_CACHE"] = ""

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.helpers import typecheck  # noqa: E402, F401 - `make test-types` finds it where it has been imported
from tests.helpers.models import Golden  # noqa: E402

# The same examples in every run, and no limit on the time of one: it may compile a program.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that take minutes start first: at the end of a run, one of them would keep all but one core idle."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


# The instruction sets of vectors by which a CPU's rounding differs, the widest first, as Linux names them.
INSTRUCTION_SETS = ("avx512f", "avx2", "avx", "sse4_2")
CPUINFO = Path("/proc/cpuinfo")


def pytest_report_header() -> list[str]:
    """Say where the session runs: bits of sums depend on it."""
    names = CPUINFO.read_text().split() if CPUINFO.exists() else []
    widest = next((name for name in INSTRUCTION_SETS if name in names), f"unknown ({platform.machine()})")
    return [f"XLA_FLAGS: {os.environ.get('XLA_FLAGS', '(none)')}", f"widest vectors of the processor: {widest}"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """Repeat the header behind failures of a quiet session, which prints none."""
    if exitstatus and terminalreporter.verbosity < 0:
        for line in pytest_report_header():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache() -> None:
    """Where JAX_COMPILATION_CACHE_DIR names a folder, every program is kept there for the next session."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Every compiled program keeps some dozens of memory mappings for as long as JAX's caches hold it; Linux gives a process
# 65,530 (vm.max_map_count), and a compiler that is refused one ends the process ("Aborted", "Segmentation fault").
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 20_000


@pytest.fixture(autouse=True)
def forget_programs() -> Iterator[None]:
    """After a test that leaves many programs behind, drop those that nothing else holds."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def shipped_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs compiled ahead of time in this test, as the engine does, get the optimisations that users get."""
    if jax.default_backend() == "cpu":
        quick = jax.stages.Lowered.compile
        monkeypatch.setattr(jax.stages.Lowered, "compile", partialmethod(quick, compiler_options=SHIPPED))


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`golden(case)`: a `Golden`, made once."""
    folder = tmp_path_factory.mktemp("golden")
    yield cache(lambda case: Golden(case, folder))
