"""The benchmark scripts run on the embedded model and say what is simulated; the comparison flags changes."""

import csv
import importlib
import json
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from scripts.benchmarks import bench_table
from scripts.benchmarks.bench_compare import compare
from scripts.benchmarks.pre_norm_model import pre_norm
from scripts.gpu import suite
from scripts.tiny_model.loss import ROWS, fresh, spread_gains
from tests.helpers.models import numpy_model, tiny_config

TABLE = [sys.executable, "-m", "scripts.benchmarks.bench_table"]
GPU_SUITE = [sys.executable, "-m", "scripts.gpu.suite"]
ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = sorted(file.stem for file in (ROOT / "scripts" / "benchmarks").glob("*.py"))
EXPERIMENTS = ("cost_model", "draft_length", "hidden_state", "quantization", "rows")


@pytest.mark.fast
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith(("bench_", "acceptance", "profile_"))])
def test_a_benchmark_explains_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"scripts.benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_draws_its_published_figures(name: str) -> None:
    """The files in docs/benchmarks have the keys that the plots read."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    module = importlib.import_module(f"scripts.experiments.{name}")
    file = ROOT / "docs" / "benchmarks" / f"{name.replace('quantization', 'quantisation')}.json"
    figure = pyplot.figure()
    module.plot(json.loads(file.read_text(encoding="utf-8")), figure)
    assert figure.axes and all(axis.has_data() for axis in figure.axes)
    pyplot.close(figure)


@pytest.mark.fast
def test_compare_flags_changes_beyond_the_spread() -> None:
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
    found = {c.path: (c.ratio, c.flagged) for c in compare(old, new, 1.05)}
    assert found["rows[side=a].s"] == (pytest.approx(2.1 / 1.1), True)
    assert found["rows[side=b].s"][1] is False  # the runs overlap
    assert found["rows[side=c].s"][1] is False  # apart, by one hundredth


def test_the_pre_norm_model_changes_the_head_alone() -> None:
    """The trunk gives the same logits, in prompts and in verification; the head, which reads other rows, does not."""
    model = spread_gains(numpy_model(tiny_config(moe=False, num_superblocks=1)), seed=0)
    tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (1, ROWS + 1), dtype=np.int32)

    @partial(jax.jit, static_argnames="graph")
    def logits(graph: Any, params: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = nnx.merge(graph, params)
        cache, positions = fresh(model.cfg, 1)
        verified, _, _ = model.trunk_pending(tokens[:, :ROWS], cache, positions)
        rows, cache = model.trunk(tokens[:, :ROWS], cache, positions)
        hidden = model.final_norm(rows)
        drafted, _ = model.mtp_step(hidden, tokens[:, 1:], cache, positions)
        return model.head(hidden), model.head(verified), model.head(drafted)

    post, pre = (logits(m.graph, m.params) for m in (model, pre_norm(model)))
    for a, b in zip(post[:2], pre[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.abs(post[2] - pre[2]).max() > 0.1 * np.abs(post[2]).max()


@pytest.mark.slow
def test_the_table_of_the_embedded_model(tmp_path: Path) -> None:
    """Every variant is in every file; the acceptance is that of the option and is named as simulated in each."""
    args = ["--model", "tiny", "--prompt-tokens", "32", "--chunk", "16", "--num-speculative-tokens", "0", "3"]
    args += ["--max-tokens", "24", "--runs", "2", "--acceptance", "1,1,1", "--out", str(tmp_path / "t")]
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


@pytest.mark.fast
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-speculative-tokens", "2"], "with 0, the base of all ratios"),
        (["--prompt-tokens", "700"], "expected positive multiples of --chunk 512"),
    ],
)
def test_bad_arguments_are_named(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_table.main(args)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.minutes
@pytest.mark.slow
def test_the_gpu_suite_runs_at_a_toy_size(tmp_path: Path) -> None:
    """Parts write rows with a share of the roofline, then come a page and the compiled programs for the next run."""
    parts = ("model", "kernels", "batch", "text", "tune", "profile")  # "bits" has a test of its own
    command = [*GPU_SUITE, "--smoke", "--minutes", "12", "--out", str(tmp_path), "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f"gpu_{name}.json").read_text()) for name in parts}
    assert all(p["complete"] and p["rows"] and not p["failed"] and not p["not_measured"] for p in found.values())
    rows = found["kernels"]["rows"]
    kinds = set("linear experts joined attention entering deltanet norm gating routing sampling".split())
    assert {r["case"].split()[0] for r in rows} == kinds
    assert all(r["right"] and 0 < r["of_roofline"] for r in rows)
    assert all(0 < r["error"] for r in rows if r["case"].split()[0] not in ("routing", "sampling"))  # few sums
    decode = [r for r in found["model"]["rows"] if r["kind"] == "decode"]
    assert {(r["context"], r["draft"]) for r in decode} == {(c, k) for c in (256, 512) for k in (0, 2)}
    assert {r["side"] for r in found["model"]["rows"] if r["kind"] == "prompt"} == {"MTP on", "MTP off"}
    assert {(r["batch"], r["draft"]) for r in found["batch"]["rows"]} == {(b, k) for b in (1, 2) for k in (0, 3)}
    assert (tmp_path / "gpu_profile_decode.csv").read_text().count("\n") > 20
    page = (tmp_path / "report.md").read_text()
    assert "## batch" in page and "| 2 | 256 | 3 |" in page and all(f"| {part} | done |" in page for part in parts)
    with tarfile.open(tmp_path / "caches.tar") as tar:
        assert len(tar.getnames()) > 10


def test_the_gpu_suite_stops_what_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds are too short for a process to begin measuring; the page says what became of each part."""
    monkeypatch.setattr(suite, "GRACE_SECONDS", 0)
    ended = suite.run_parts(["profile", "model"], ["--smoke", "--out", str(tmp_path)], tmp_path, minutes=1.5 / 60)
    assert ended == {"profile": "not begun: the time was up", "model": "stopped: it took longer than its time"}
    page = suite.write_page(tmp_path, ended).read_text()
    assert all(f"| {part} | {how} | 0 | 0 |  |" in page for part, how in ended.items())


def test_the_gpu_suite_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [*GPU_SUITE, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "not a CUDA GPU; try --smoke" in done.stderr
