"""A model of how long a kernel takes on a card, fitted to times of an H100; prints its error on these.

    python -m scripts.gpu.kernel_time_model [--card rtx4090] [--points]

A kernel is so many programs of so many turns of a loop. Four things take time: starting it; the turns that follow one
another on a multiprocessor, each as long as the latency of a turn; the instructions of all turns of a multiprocessor;
and the bytes of memory. The last three overlap:

    time = start + ((turns in a row * latency)^2 + (turns of a multiprocessor * work)^2 + (bytes / bandwidth)^2)^(1/2)

Latency and work of a turn belong to a family of kernels, such as products of few rows; the start and the share of the
bandwidth that is reached belong to all of them. On another card latency and work scale with the clock, and turns in a
row follow the number of multiprocessors and how many programs one holds at a time. Times are in microseconds. A kernel
that `kernel_time` does not know can be described as a `Launch` and given to `predict` with `fitted()`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

from kernels_pallas.tile_tables import ExpertsConstants, MatmulConstants
from scripts.gpu.cuda_target import CARDS, Card
from scripts.gpu.kernel_launches import (
    LAUNCHES,
    AttentionSplits,
    Cache,
    Delta,
    Experts,
    Launch,
    Matrix,
    attention_launch,
    delta_launch,
    matmul_launch,
)

POINTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "h100_tiles.json"


def kernel_time(op: str, shape: Any, rows: int, card: Card, constants: Any = None) -> float:
    """Return the microseconds that a kernel takes.

    Args:
        op: "matmul", "experts_gate_up", "experts_down"; or "attention" (without what combines the splits) and
            "gated_delta_rule", both for few rows and as they were measured: other kernels do their work now.
        shape: a list of `Matrix` for "matmul", all in one launch; `Experts`, `Cache` or `Delta` for the others.
        rows: token rows of the call.
        card: one of `CARDS`.
        constants: tile constants; None: the constants of the package's table for the card. For attention
            `AttentionSplits` and for the recurrence the columns of a program, which no table has.

    Raises:
        ValueError: there is no such op.
    """
    if op not in LAUNCHES:
        raise ValueError(f"there is no model of {op!r}; expected one of {', '.join(LAUNCHES)}")
    return predict(LAUNCHES[op](shape, rows, card, constants), card, fitted())


GROWING = (
    "many rows",
    "attention",
    "experts_gate_up of many rows",
    "experts_down of many rows",
)  # families with turns of several sizes


class Coefficients(NamedTuple):
    """What is fitted: microseconds at the clock of the H100, and the share of the bandwidth."""

    start: float
    bandwidth: float
    latency: dict[str, float]  # of a turn, by family
    work: dict[str, float]  # of a turn, by family
    growth: dict[str, float]  # exponent of the size of a turn in both, by family
    stages: float  # exponent of the stages in the work of products of few rows: more of them were slower


def predict(launch: Launch, card: Card, found: Coefficients) -> float:
    """Return the microseconds of a launch."""
    clock = CARDS["h100"].ghz / card.ghz
    of_core = launch.turns / card.cores
    waves = max(1.0, np.ceil(launch.programs / card.cores / launch.resident) if launch.resident == 1 else 1.0)
    at_a_time = min(launch.resident, max(1.0, launch.programs / card.cores))
    in_a_row = max(launch.longest * waves, of_core / at_a_time)
    growth = launch.size ** found.growth.get(launch.family, 0.0)
    chain = in_a_row * found.latency[launch.family] * clock * growth
    work = of_core * found.work[launch.family] * clock * growth * (launch.stages / 2) ** found.stages
    memory = launch.bytes / (card.gb_per_second * found.bandwidth * 1e3)
    return float(found.start + np.sqrt(chain**2 + work**2 + memory**2))


class Point(NamedTuple):
    """A measured kernel."""

    case: str
    launch: Launch
    microseconds: float


MODEL = {  # the products of the 35B-A3B that were measured, see "what" in the file
    "in": [Matrix(8192, 2048), Matrix(4096, 2048), Matrix(32, 2048, 16), Matrix(32, 2048, 16)],
    "out": [Matrix(2048, 4096)],
    "qkv": [Matrix(8192, 2048), Matrix(512, 2048), Matrix(512, 2048)],
    "router": [Matrix(256, 2048, 16), Matrix(1, 2048, 16), Matrix(512, 2048), Matrix(512, 2048)],
    "down": [Matrix(2048, 512)],
}


def measured_points(file: Path = POINTS) -> list[Point]:
    """Return the measured kernels whose constants a table may hold: not those with steps of other sizes, nor tiles of
    256 rows, which no table has, nor the kernel that combined the splits of attention, which is gone.
    """
    card, points = CARDS["h100"], []
    for case, kernels in json.loads(file.read_text())["cases"].items():
        if isinstance(kernels, str) or re.search(r"step(8|32)\b|rows256", case):
            continue
        op, *settings = case.split()
        values = {name: int(value) for name, value in re.findall(r"([a-zM]+)(\d+)", " ".join(settings))}
        rows = values["M"]
        for kernel, microseconds in kernels.items():
            if "join" in kernel:
                continue
            launch: Launch
            if op in MODEL:
                stages, tile = values["stages"], values.get("rows", 64)
                constants = MatmulConstants(values.get("programs", 128), stages, stages, tile, 64)
                launch = matmul_launch(MODEL[op], rows, card, constants)
            elif op in ("experts", "gate_up"):
                which = "experts_down" if "down" in kernel else "experts_gate_up"
                chosen = ExpertsConstants(values.get("splits", 1), 3, 3, min(64, values.get("rows", 64)))
                launch = LAUNCHES[which](Experts(), rows, card, chosen)
            elif op == "attention":
                cache_ = Cache(int(kernel.split()[-1]))
                launch = attention_launch(cache_, rows, card, AttentionSplits(values["piece"], values["slots"]))
            else:
                launch = delta_launch(Delta(), rows, card, values["columns"])
            points.append(Point(f"{case}: {kernel}", launch, microseconds))
    return points


@cache
def fitted() -> Coefficients:
    """Return the coefficients that fit the measured points best, by the logarithm of the ratio."""
    points, card = measured_points(), CARDS["h100"]
    families = list(dict.fromkeys(point.launch.family for point in points))

    def unpack(x: Any) -> Coefficients:
        start, bandwidth, *each = np.exp(x[: 2 + 2 * len(families)])
        latency, work = each[: len(families)], each[len(families) :]
        pairs = dict(zip(families, latency, strict=True)), dict(zip(families, work, strict=True))
        return Coefficients(start, bandwidth, *pairs, dict(zip(GROWING, x[-1 - len(GROWING) : -1], strict=True)), x[-1])

    def errors(x: Any) -> list[float]:
        found = unpack(x)
        return [np.log(predict(point.launch, card, found) / point.microseconds) for point in points]

    count = len(families)
    first = [*np.log([2.0, 0.7] + count * [0.7] + count * [0.05]), *(0.3 for _ in GROWING), 0.1]
    low = [*np.log([1.0, 0.5] + count * [0.02] + count * [0.0005]), *(0.0 for _ in GROWING), 0.0]
    high = [*np.log([3.0, 0.9] + count * [6.0] + count * [3.0]), *(1.5 for _ in GROWING), 0.5]
    return unpack(least_squares(errors, first, bounds=(low, high), loss="soft_l1", f_scale=0.1).x)


def describe_errors(ratios: list[float]) -> str:
    """Return the errors of a list of ratios, model to measurement, in words."""
    off = [abs(np.log(ratio)) for ratio in ratios]
    figures = {"median": statistics.median(off), "mean": statistics.mean(off), "largest": max(off)}
    return "error " + ", ".join(f"{name} {np.expm1(value):.0%}" for name, value in figures.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100", help="predict the 35B-A3B's kernels for this card")
    parser.add_argument("--points", action="store_true", help="print every measured point")
    args = parser.parse_args()
    found, card = fitted(), CARDS["h100"]
    ratios: dict[str, list[float]] = {}
    for point in measured_points():
        time = predict(point.launch, card, found)
        ratios.setdefault(point.launch.family, []).append(time / point.microseconds)
        if args.points:
            line = f"measured {point.microseconds:8.2f}  model {time:8.2f}  {time / point.microseconds:.2f}"
            print(f"{point.case:66} {line}")
    growths = ", ".join(f"{family} {growth:.2f}" for family, growth in found.growth.items())
    print(f"start {found.start:.2f} us, {found.bandwidth:.2f} of the bandwidth; exponents: stages {found.stages:.2f}")
    print(f"exponents of the size of a turn: {growths}")
    print("errors on the points that the model was fitted to:")
    for family, each in ratios.items():
        terms = f"latency {found.latency[family]:6.3f}, work {found.work[family]:6.4f} us a turn"
        print(f"{family:28} {len(each):3} points, {terms}; {describe_errors(each)}")
    print(f"all: {describe_errors([ratio for each in ratios.values() for ratio in each])}")
    print(f"\npredicted for {CARDS[args.card].name}, microseconds at 1, 5 and 2,048 rows:")
    for op, shape in [*(("matmul", shape) for shape in MODEL.values())]:
        name = next(name for name, each in MODEL.items() if each is shape)
        times = [kernel_time(op, shape, rows, CARDS[args.card]) for rows in (1, 5, 2048)]
        print(f"{name:16} " + " ".join(f"{time:9.1f}" for time in times))
    for op in ("experts_gate_up", "experts_down"):
        times = [kernel_time(op, Experts(), rows, CARDS[args.card]) for rows in (1, 5, 2048)]
        print(f"{op:16} " + " ".join(f"{time:9.1f}" for time in times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
