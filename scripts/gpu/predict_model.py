"""A model of the time of a kernel of few rows: a start, and then its bytes at the rate that such kernels reach.

    microseconds = start + slowness * bytes / copy bandwidth

Start and slowness are fitted to the best measured constants of five products (`docs/benchmarks/h100_tiles.json`).
Attention at a short context is a chain of turns, and its empty programs take time:

    microseconds = start + turn * turns of a piece + program * programs

That is fitted to the trials of attention at 1,024 tokens with a cache of 131,136.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kernels_pallas.tile_tables import MatmulConstants
from scripts.gpu.cuda_target import CARDS
from scripts.gpu.kernel_launches import Matrix
from scripts.gpu.kernel_time_model import kernel_time
from scripts.gpu.predict_measured import bandwidth, trace, trial

PACKED, PLAIN = 0.5625, 2.0  # bytes of a weight: IQ4_NL (32 codes of 4 bits and a 16-bit scale), bfloat16
LM_HEAD_ROWS = 248_320
# The best constants tried for five rows, and the weights that the kernel reads: packed and plain outputs, inputs.
PRODUCTS: dict[tuple[str, str], tuple[int, int, int]] = {
    ("in M5 programs512 stages2", "matmul_codes4_plain"): (12_288, 64, 2048),
    ("out M5 programs512 stages2", "matmul_codes4"): (2048, 0, 4096),
    ("qkv M5 programs512 stages2", "matmul_codes4"): (9216, 0, 2048),
    ("router M5 programs512 stages2", "matmul_plain_codes4"): (1024, 257, 2048),
    ("down M5 programs512 stages3", "matmul_codes4"): (2048, 0, 512),
}
# Trials of attention at 1,024 tokens: turns of the loop over a piece, and programs (tiles of 16 pairs x pieces).
CHAINS = {
    "attention M1 piece512 slots32": (16, 2 * 1 * 257),
    "attention M1 piece128 slots32": (4, 2 * 1 * 1025),
    "attention M1 piece256 slots64": (4, 2 * 1 * 513),
    "attention M5 piece512 slots32": (16, 2 * 3 * 257),
    "attention M5 piece256 slots32": (8, 2 * 3 * 513),
    "attention M5 piece128 slots32": (4, 2 * 3 * 1025),
}


@dataclass(frozen=True)
class Line:
    """`start + sum of slopes * x`, and how far the points are from it."""

    start: float
    slopes: tuple[float, ...]
    errors: dict[str, float]  # predicted ÷ measured - 1 of each point
    errors_left_out: dict[str, float]  # the same, from a line that is fitted to the other points

    def at(self, *x: float) -> float:
        return self.start + sum(slope * each for slope, each in zip(self.slopes, x, strict=True))


def fit(points: dict[str, tuple[tuple[float, ...], float]]) -> Line:
    """Fit microseconds as a sum of the start and of x times slopes, by least squares of the relative errors."""

    def coefficients(names: list[str]) -> Any:
        us = np.array([points[name][1] for name in names])
        x = np.array([(1.0, *points[name][0]) for name in names])
        return np.linalg.lstsq(x / us[:, None], np.ones(len(names)), rcond=None)[0]

    def error(name: str, names: list[str]) -> float:
        x, us = points[name]
        return float(coefficients(names) @ (1.0, *x)) / us - 1

    start, *slopes = map(float, coefficients(list(points)))
    errors = {name: error(name, list(points)) for name in points}
    left_out = {name: error(name, [other for other in points if other != name]) for name in points}
    return Line(start, tuple(slopes), errors, left_out)


def weight_bytes(packed_outputs: int, plain_outputs: int, inputs: int) -> float:
    """Return the bytes of a product's weights."""
    return (packed_outputs * PACKED + plain_outputs * PLAIN) * inputs


@cache
def products() -> Line:
    """Return the model of products with few rows; x: microseconds of its bytes at the copy bandwidth."""
    sizes = {case: (weight_bytes(*each) / bandwidth(),) for (case, _), each in PRODUCTS.items()}
    return fit({case: (sizes[case], trial(case, kernel)) for case, kernel in PRODUCTS})


@cache
def chains() -> Line:
    """Return the model of attention at a short context; x: turns of a piece, programs."""
    return fit({case: (x, trial(case, "attention_few", 1024)) for case, x in CHAINS.items()})


def bytes_us(num_bytes: float) -> float:
    """Return the predicted microseconds of a kernel of few rows that reads or writes so many bytes.

    Long kernels come nearer to the bandwidth. Beyond the largest product of the fit the time lies on the line from that
    product to the LM head as it was measured.
    """
    floor, largest = num_bytes / bandwidth(), max(weight_bytes(*sizes) for sizes in PRODUCTS.values()) / bandwidth()
    if floor <= largest:
        return products().at(floor)
    head = weight_bytes(LM_HEAD_ROWS, 0, 2048) / bandwidth()
    measured = trace("decode 0")["LM head"].us
    return products().at(largest) + (measured - products().at(largest)) * (floor - largest) / (head - largest)


def more_bytes_us(num_bytes: float) -> float:
    """Return the predicted microseconds that so many more bytes add to a kernel."""
    return products().slopes[0] * num_bytes / bandwidth()


def product_us(outputs: int, inputs: int, rows: int) -> float:
    """Return the predicted microseconds of a product of few rows with an IQ4_NL weight, by `kernel_time_model`."""
    return kernel_time("matmul", [Matrix(outputs, inputs)], rows, CARDS["h100"])


def row_tile_ratio(weights: Sequence[tuple[int, int, int]], rows: int) -> float:
    """Return the predicted time of a product of many rows in tiles of 128 rows, divided by that in tiles of 64.

    Args:
        weights: outputs, inputs and bits of each weight of the launch.
        rows: of the chunk.
    """
    matrices = [Matrix(*weight) for weight in weights]
    times = [
        kernel_time("matmul", matrices, rows, CARDS["h100"], MatmulConstants(512, 2, 3, tile, 64)) for tile in (128, 64)
    ]
    return times[0] / times[1]
