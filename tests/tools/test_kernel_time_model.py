"""The model of kernel times: near the measured points, and it follows constants and cards in the right direction."""

import statistics
import sys

import numpy as np
import pytest

from kernels_pallas.tile_tables import ExpertsConstants, MatmulConstants
from scripts.gpu import predict_tables
from scripts.gpu.cuda_target import CARDS
from scripts.gpu.kernel_launches import Cache, Delta, Experts, Matrix
from scripts.gpu.kernel_time_model import MODEL, fitted, kernel_time, measured_points, predict

H100 = CARDS["h100"]


def test_the_error_on_the_measured_points() -> None:
    """Pieces of attention with two or four turns are not understood: they took up to six times as long."""
    ratios = {p.case: predict(p.launch, H100, fitted()) / p.microseconds for p in measured_points()}
    assert len(ratios) > 120
    off = [abs(np.log(ratio)) for case, ratio in ratios.items() if not case.startswith("attention")]
    assert statistics.median(off) < 0.05 and max(off) < 0.3


def test_tables_and_rows_change_times_as_they_were_measured() -> None:
    before, after = (MatmulConstants(programs, stages, stages) for programs, stages in ((128, 3), (512, 2)))
    for name in ("in", "out", "qkv"):
        assert kernel_time("matmul", MODEL[name], 5, H100, after) < kernel_time("matmul", MODEL[name], 5, H100, before)
    narrow, wide = (MatmulConstants(row_tile_many=rows) for rows in (64, 128))
    ratio = kernel_time("matmul", MODEL["in"], 2048, H100, narrow) / kernel_time(
        "matmul", MODEL["in"], 2048, H100, wide
    )
    assert 1.6 < ratio < 2.0
    one, two = (ExpertsConstants(gate_up_parts=parts) for parts in (1, 2))
    of_one_row = [kernel_time("experts_gate_up", Experts(), 1, H100, each) for each in (one, two)]
    assert of_one_row[0] > 1.3 * of_one_row[1]


def test_all_cards_and_ops() -> None:
    shapes = {
        "matmul": [Matrix(8192, 2048)],
        "experts_gate_up": Experts(),
        "experts_down": Experts(),
        "attention": Cache(32768),
        "gated_delta_rule": Delta(),
    }
    for op, shape in shapes.items():
        times = {name: kernel_time(op, shape, 5, card) for name, card in CARDS.items()}
        assert all(1 < time < 1000 for time in times.values()), (op, times)
        assert times["h200"] <= times["h100"] < times["rtx3090"]
    with pytest.raises(ValueError, match="no model of 'conv'; expected one of matmul, experts_gate_up"):
        kernel_time("conv", None, 1, H100)


def test_the_predicted_tables_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of the model or of the H100's table: `python -m scripts.gpu.predict_tables`."""
    monkeypatch.setattr(sys, "argv", ["predict_tables", "--check"])
    assert predict_tables.main() == 0
    assert predict_tables.choose(3, [1, 2, 3], lambda x: 100.0 + x) == 3
    assert predict_tables.choose(3, [1, 2, 3], lambda x: 100.0 * x) == 1
