"""A model of the time of a kernel of few rows: a start, and then its bytes at the rate that such kernels reach.

    microseconds = start + slowness * bytes / copy bandwidth

Start and slowness are fitted to the best measured constants of five products (`docs/benchmarks/h100_tiles.json`). A
chain of dependent turns, such as the pieces of attention at a short context, is `start + turn * turns`, fitted to the
trials of attention at 1,024 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

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
# Trials of attention at 1,024 tokens, one row: turns of the loop over a piece.
CHAINS = {
    "attention M1 piece512 slots32": 16,
    "attention M1 piece128 slots32": 4,
    "attention M1 piece256 slots64": 4,
}


@dataclass(frozen=True)
class Line:
    """`intercept + slope * x`, and how far the points are from it."""

    intercept: float
    slope: float
    errors: dict[str, float]  # predicted ÷ measured - 1 of each point
    errors_left_out: dict[str, float]  # the same, from a line that is fitted to the others; nan: they give none

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


def fit(points: dict[str, tuple[float, float]]) -> Line:
    """Fit (x, microseconds) by least squares of the relative errors."""

    def line(names: list[str]) -> tuple[float, float]:
        x, y = np.array([points[name] for name in names]).T
        if len(set(x)) < 2:
            return math.nan, math.nan
        slope, intercept = np.polyfit(x, y, 1, w=1 / y)
        return float(intercept), float(slope)

    def error(name: str, names: list[str]) -> float:
        intercept, slope = line(names)
        x, us = points[name]
        return (intercept + slope * x) / us - 1

    errors = {name: error(name, list(points)) for name in points}
    left_out = {name: error(name, [other for other in points if other != name]) for name in points}
    return Line(*line(list(points)), errors, left_out)


def weight_bytes(packed_outputs: int, plain_outputs: int, inputs: int) -> float:
    """Return the bytes of a product's weights."""
    return (packed_outputs * PACKED + plain_outputs * PLAIN) * inputs


@cache
def products() -> Line:
    """Return the model of products with few rows; x: microseconds of its bytes at the copy bandwidth."""
    return fit(
        {case: (weight_bytes(*sizes) / bandwidth(), trial(case, kernel)) for (case, kernel), sizes in PRODUCTS.items()}
    )


@cache
def chains() -> Line:
    """Return the model of attention's loop over one piece; x: turns."""
    return fit({case: (turns, trial(case, "attention_few", 1024)) for case, turns in CHAINS.items()})


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
    return products().slope * num_bytes / bandwidth()
