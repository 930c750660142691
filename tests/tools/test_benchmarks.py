"""The benchmark scripts run on the embedded model and say what is simulated; the comparison flags changes."""

import csv
import json
import subprocess
import sys

import pytest

from scripts.benchmarks.bench_compare import compare

TABLE = [sys.executable, "-m", "scripts.benchmarks.bench_table"]
GPU_SUITE = [sys.executable, "-m", "scripts.gpu.suite"]


def test_compare_flags_what_lies_beyond_the_spread():
    old = {
        "rows": [
            {"side": "a", "s": [1.0, 1.1, 1.2]},
            {"side": "b", "s": [1.0, 1.1, 1.2]},
            {"side": "c", "s": [1.0, 1.0]},
        ]
    }
    new = {
        "rows": [
            {"side": "b", "s": [1.15, 1.3, 1.4]},
            {"side": "a", "s": [2.0, 2.1, 2.2]},
            {"side": "c", "s": [1.01, 1.01]},
        ]
    }
    found = {place: (ratio, flagged) for place, _, _, ratio, flagged in compare(old, new, 1.05)}
    assert found["rows[side=a].s"] == (pytest.approx(2.1 / 1.1), True)
    assert found["rows[side=b].s"][1] is False  # the runs overlap
    assert found["rows[side=c].s"][1] is False  # apart, by one hundredth


@pytest.mark.slow
def test_the_table_of_the_embedded_model(tmp_path):
    """Every side in every file; the simulated acceptance is what was asked and is named in each of them."""
    args = ["--model", "tiny", "--contexts", "32", "--chunk", "16", "--drafts", "0", "3", "--new", "24", "--runs", "2"]
    args += ["--acceptance", "1,1,1", "--out", str(tmp_path / "t")]
    done = subprocess.run([*TABLE, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    rows = {r["side"]: r for r in result["rows"]}
    assert len(rows) == 7 and all(len(r["prefill_seconds"]) == 2 for r in rows.values())
    assert rows["draft 3"]["tokens_per_round"] == 4 and rows["draft 0"]["tokens_per_round"] == 1
    assert rows["draft 3, last 16 tokens"]["tokens_per_round"] == 4
    assert all(megabytes > 0 for megabytes in result["temporary_mb"].values())
    with open(tmp_path / "t.csv", newline="") as file:
        assert {r["acceptance"] for r in csv.DictReader(file)} == {"simulated acceptance"}
    assert (tmp_path / "t.md").read_text().startswith("simulated acceptance")
    assert (tmp_path / "t.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--drafts", "2"], "with 0, the base of all ratios"),
        (["--contexts", "700"], "expected positive multiples of --chunk 512"),
    ],
)
def test_bad_arguments_are_named(args, message):
    done = subprocess.run([*TABLE, *args], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_the_gpu_suite_runs_at_a_toy_size(tmp_path):
    """Every part writes its file with ceilings and a share of the roofline; the kernels are right in interpret mode."""
    done = subprocess.run([*GPU_SUITE, "--smoke", "--out", tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    names = ("kernels", "experts", "prefill", "decode", "table", "profile")
    parts = {name: json.loads((tmp_path / f"gpu_{name}.json").read_text()) for name in names}
    assert all(p["ceilings"]["bytes_per_second"] > 0 and not p["not_measured"] for p in parts.values())
    rows = parts["kernels"]["rows"]
    kinds = {"linear", "experts", "attention", "entering", "deltanet", "norm", "gating", "routing", "sampling"}
    assert {r["case"].split()[0] for r in rows} == kinds
    assert all(r["right"] and 0 < r["of_roofline"] for r in rows)
    assert all(0 < r["error"] for r in rows if r["case"].split()[0] not in ("routing", "sampling"))  # few sums
    beside = parts["experts"]["rows"]
    assert {r["side"] for r in beside} == {"kernels", "unpack", "ragged_dot"}
    assert all(r["right"] and 0 < r["error"] and 0 < r["of_roofline"] for r in beside)
    assert {r["side"] for r in parts["prefill"]["rows"]} == {"MTP on", "MTP off"}
    assert {(r["context"], r["draft"]) for r in parts["decode"]["rows"]} == {(c, k) for c in (256, 512) for k in (0, 2)}
    assert all(r["prefill_floor"] > 0 for r in parts["table"]["rows"])
    assert 0 < len(parts["profile"]["decode"]["longest"]) <= 10


def test_the_gpu_suite_says_that_there_is_no_gpu(tmp_path):
    command = [*GPU_SUITE, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "not a CUDA GPU; try --smoke" in done.stderr
