"""The benchmark scripts: they run on the embedded model, say what is simulated, and the comparison flags what changed."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = [sys.executable, ROOT / "scripts/bench_table.py"]
sys.path.insert(0, str(ROOT / "scripts"))

from bench_compare import compare  # noqa: E402


def test_compare_flags_what_lies_beyond_the_spread():
    old = {"rows": [{"side": "a", "s": [1.0, 1.1, 1.2]}, {"side": "b", "s": [1.0, 1.1, 1.2]}, {"side": "c", "s": [1.0, 1.0]}]}
    new = {"rows": [{"side": "b", "s": [1.15, 1.3, 1.4]}, {"side": "a", "s": [2.0, 2.1, 2.2]}, {"side": "c", "s": [1.01, 1.01]}]}
    found = {place: (ratio, flagged) for place, _, _, ratio, flagged in compare(old, new, 1.05)}
    assert found["rows[side=a].s"] == (pytest.approx(2.1 / 1.1), True)
    assert found["rows[side=b].s"][1] is False  # the runs overlap
    assert found["rows[side=c].s"][1] is False  # apart, by one hundredth


@pytest.mark.slow
def test_the_table_of_the_embedded_model(tmp_path):
    """Every side in every file; the simulated acceptance is what was asked and is named in each of them."""
    args = ["--model", "tiny", "--contexts", "32", "--chunk", "16", "--drafts", "0", "2", "--new", "24", "--runs", "2"]
    args += ["--acceptance", "1,1", "--out", str(tmp_path / "t")]
    done = subprocess.run([*TABLE, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    rows = {r["side"]: r for r in result["rows"]}
    assert len(rows) == 6 and all(len(r["prefill_seconds"]) == 2 for r in rows.values())
    assert rows["draft 2"]["tokens_per_round"] == 3 and rows["draft 0"]["tokens_per_round"] == 1
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
