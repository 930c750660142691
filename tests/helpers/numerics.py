"""How closely a kernel must agree with a float64 computation."""

from __future__ import annotations

from typing import Any

import numpy as np

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}  # largest error, relative to the largest magnitude


def as_float64(x: Any) -> np.ndarray:
    """The same values in float64."""
    return np.asarray(x).astype(np.float64)


def assert_close(got: Any, want: np.ndarray, dtype: str) -> None:
    """Compare a result of operations in `dtype` with what it must be."""
    got = as_float64(got)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= BOUNDS[dtype] * np.abs(want).max()
