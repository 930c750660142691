"""`mtpjax tune`: the whole command at toy size, the choice among candidates, and times from a trace."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from kernels_pallas.platform import override_platform
from kernels_pallas.tile_tables import (
    ENVIRONMENT_VARIABLE,
    Entry,
    MatmulConstants,
    TileTable,
    TileTableError,
    lookup,
    override_table,
    packaged_table,
    tile_constants,
)
from kernels_pallas.tile_tables.constants import OPS
from mtpjax.cli import tune_times
from mtpjax.cli.main import main
from mtpjax.cli.tune import choose_entries, write_table
from mtpjax.cli.tune_cases import Trial, TuneCase, all_trials, tune_cases
from mtpjax.cli.tune_times import kernel_events, kernel_microseconds, load_programs, measure


def run_tune(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mtpjax.cli.main", "tune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


class TestCommand:
    @pytest.mark.slow
    def test_toy_from_end_to_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Workers compile, one process measures, the table is written; the CPU takes it and a card does not."""
        out = tmp_path / "new" / "toy.json"
        done = run_tune("--toy", "--out", str(out), "--minutes", "20", "--workers", "2")
        assert done.returncode == 0, done.stderr
        assert "14 programs compiled" in done.stdout
        assert all(f"chosen for {op}, all sizes" in done.stdout for op in OPS)
        assert [file.name for file in out.parent.iterdir()] == ["toy.json"]
        table = json.loads(out.read_text())
        entries = [entry for each in table["ops"].values() for entry in each]
        assert table["device"] == "cpu" and {entry["basis"] for entry in entries} == {"toy"}
        assert [entry.get("max_outputs") for entry in table["ops"]["matmul"]] == [64, None]
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(out))
        monkeypatch.setattr(lookup, "_loaded", {})
        with override_platform("cpu"):
            assert tile_constants("matmul", 8192, 2048).programs in (16, 32)
            assert tile_constants("experts", 1024, 2048).block_tile in (16, 32)
            assert tile_constants("gated_delta_rule").state_columns in (8, 16)
        with override_platform("cuda", device_kind="H100"), pytest.raises(TileTableError, match="this one is 'H100'"):
            tile_constants("matmul", 8192, 2048)

    @pytest.mark.slow
    def test_workers_leave_nothing_to_compile(self, tmp_path: Path) -> None:
        tune_times.compile_in_parallel(tmp_path, 2, 1200, "--toy")
        files = {file.name for file in tmp_path.glob("jit_tune_*-cache")}
        assert len(files) == len(all_trials(toy=True))

    def test_dry_run_lists_every_candidate(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tune", "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert "DeltaNet in, 5 rows" in out and "programs 1024, stages_few 2" in out
        assert "row_tile_many 128" in out and f"{len(all_trials(toy=False))} programs of 19 cases" in out
        assert (
            "experts of 512, 5 rows     gate_up_parts 4" in out and "DeltaNet window, 1 rows    state_columns 32" in out
        )

    def test_every_op_of_the_tables_is_tuned(self) -> None:
        """An entry of a user's table holds for all shapes of its op, so the last class takes any size."""
        for toy in (False, True):
            classes = {op: {case.size_class for case in tune_cases(toy) if case.op == op} for op in OPS}
            assert all((None, None) in each for each in classes.values())
        experts = {case.size_class for case in tune_cases(False) if case.op == "experts"}
        assert experts == {(entry.max_outputs, entry.max_inputs) for entry in packaged_table("H100").ops["experts"]}

    @pytest.mark.parametrize("toy", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_candidates_are_other_programs(self, toy: bool) -> None:
        """Grids, results, stages or tiles differ; a constant that nothing reads would be measured in vain."""
        for case in [each for each in tune_cases(toy) if each.op != "matmul"]:
            found = set()
            for constants in case.candidates:
                table = TileTable("", "test", {case.op: (Entry(constants, "measured"),)})
                with override_platform("cuda", (9, 0), interpret=True), override_table(table):
                    program = jax.make_jaxpr(partial(case.run))(*case.args)  # `partial`: JAX caches what it traced
                calls = [(e.outvars, e.params) for e in program.eqns if e.primitive.name == "pallas_call"]
                shapes = [(tuple(v.aval.shape for v in out), params["grid_mapping"].grid) for out, params in calls]
                kernels = [params["jaxpr"].eqns for _, params in calls]
                tiles = [tuple(str(v.aval) for e in eqns for v in e.outvars) for eqns in kernels]
                found.add((*shapes, *tiles, *(params["compiler_params"] for _, params in calls)))
                assert calls
            assert len(found) == len(case.candidates), case.name

    def test_what_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments, message in (
            (["--toy"], "--toy needs --out"),
            (["--minutes", "0"], "--minutes is 0.0, expected more than 0"),
            (["--workers", "-1"], "--workers is -1, expected more than 0"),
        ):
            with pytest.raises(SystemExit) as stopped:
                main(["tune", *arguments])
            assert stopped.value.code == 2 and message in capsys.readouterr().err

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="needs a machine without a GPU")
    def test_there_is_no_card(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tune"]) == 2
        assert "the device is 'cpu', not a CUDA GPU; --toy runs" in capsys.readouterr().err


def case_of(name: str, size: int | None, tuned: tuple[str, ...], *candidates: MatmulConstants) -> TuneCase:
    return TuneCase(name, "matmul", (size, None), "matmul_", tuned, candidates, lambda x: x, ())


class TestChoice:
    few = tuple(MatmulConstants(programs=programs) for programs in (128, 256, 512))
    many = tuple(MatmulConstants(row_tile_many=rows) for rows in (64, 128))

    def times(self, **microseconds: list[float | None]) -> dict[Trial, float]:
        """One row, five rows and many rows of a large weight, and one row of a small one; None: did not run."""
        programs, large = ("programs",), None
        cases = {
            "one": case_of("one", large, programs, *self.few),
            "five": case_of("five", large, programs, *self.few),
            "many": case_of("many", large, ("row_tile_many",), *self.many),
            "small": case_of("small", 2048, programs, *self.few),
        }
        found, number = {}, 0
        for name, each in microseconds.items():
            for constants, time in zip(cases[name].candidates, each, strict=True):
                number += 1
                if time is not None:
                    found[Trial(number, cases[name], constants)] = time
        return found

    def test_cases_decide_together_and_each_class_for_itself(self) -> None:
        times = self.times(one=[10, 7, 5], five=[10, 9, 14], many=[800, 400], small=[3, 5, 5])
        small, large = choose_entries(times, "measured")["matmul"]
        assert (small.max_outputs, small.constants) == (2048, MatmulConstants(programs=128))
        assert (large.max_outputs, large.constants) == (None, MatmulConstants(programs=256, row_tile_many=128))
        assert large.note == "one: 7.0 us; five: 9.0 us; many: 400.0 us" and large.basis == "measured"

    def test_the_cheapest_of_equals(self) -> None:
        [entry] = choose_entries(self.times(one=[10, 9.1, 9]), "measured")["matmul"]
        assert entry.constants == MatmulConstants(programs=256)

    def test_what_does_not_run_everywhere_is_not_chosen(self) -> None:
        [entry] = choose_entries(self.times(one=[10, 7, None], five=[10, 9, 1]), "measured")["matmul"]
        assert entry.constants == MatmulConstants(programs=256)
        with pytest.raises(ValueError, match="no candidate of programs ran in all of: one; five"):
            choose_entries(self.times(one=[10, None, None], five=[None, 9, 1]), "measured")


class TestTimes:
    def trial(self) -> Trial:
        return Trial(7, case_of("one", None, ("programs",), MatmulConstants()), MatmulConstants())

    def test_kernels_of_a_trace(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only planes of GPUs, not their summaries; numbered copies of a kernel are one; the median of each."""

        def event(name: str, microseconds: float, module: str = "jit_tune_007") -> SimpleNamespace:
            return SimpleNamespace(name=name, duration_ns=microseconds * 1000, stats=[("hlo_module", module)])

        kernels = [event("matmul_codes4", 5), event("matmul_codes4_1", 6), event("matmul_codes4_2", 90)]
        others = [event("loop_fusion", 50), event("matmul_codes4", 1, "jit_tune_008"), event("memcpy", 3, "")]
        planes = [
            SimpleNamespace(
                name="/device:GPU:0",
                lines=[
                    SimpleNamespace(name="Stream #1", events=kernels + others),
                    SimpleNamespace(name="XLA Ops", events=[event("matmul_codes4.3", 100)]),
                ],
            ),
            SimpleNamespace(name="/host:CPU", lines=[SimpleNamespace(name="a", events=[event("matmul_x", 1)])]),
        ]
        (tmp_path / "a.xplane.pb").touch()
        data = SimpleNamespace(from_file=lambda file: SimpleNamespace(planes=planes))
        monkeypatch.setattr(jax.profiler, "ProfileData", data)
        events = kernel_events(tmp_path)
        assert events["jit_tune_007"] == {"matmul_codes4": [5, 6, 90], "loop_fusion": [50]}
        assert kernel_microseconds(events["jit_tune_007"], self.trial()) == 6
        with pytest.raises(RuntimeError, match=r"the profiler saw no kernel matmul_\* of one; it needs NVIDIA's CUPTI"):
            kernel_microseconds(events["jit_tune_009"], self.trial())

    def test_rounds_alternate_and_end_in_time(self) -> None:
        first, second = self.trial(), Trial(8, self.trial().case, MatmulConstants(programs=128))
        order: list[int] = []
        programs = {trial: (lambda number=trial.number: order.append(number)) for trial in (first, second)}
        assert {len(each) for each in measure(programs, 3, 1e18, from_profiler=False).values()} == {3}
        assert order == [7, 8, 8, 7, 7, 8, 8, 7]
        assert {len(each) for each in measure(programs, 3, 0, from_profiler=False).values()} == {1}

    def test_a_candidate_that_does_not_compile_is_reported(self) -> None:
        def run() -> Any:
            raise RuntimeError("Shared memory size limit exceeded\nmore")

        case = TuneCase("bad", "matmul", (None, None), "matmul_", (), (MatmulConstants(),), run, ())
        programs, failed = load_programs([Trial(0, case, MatmulConstants())], "cpu")
        assert not programs and list(failed.values()) == ["RuntimeError: Shared memory size limit exceeded"]

    def test_a_table_is_written_as_a_whole(self, tmp_path: Path) -> None:
        table = TileTable("H100", "test", {"matmul": (Entry(MatmulConstants(programs=500), "measured"),)})
        with pytest.raises(TileTableError, match="programs is 500, expected a power of two"):
            write_table(table, tmp_path / "t.json")
        assert not list(tmp_path.iterdir())
