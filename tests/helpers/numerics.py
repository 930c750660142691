"""How closely a kernel must agree with a float64 computation."""

from __future__ import annotations

from typing import Any

import numpy as np

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}  # largest error, relative to the largest magnitude


def assert_close(got: Any, want: np.ndarray, dtype: str) -> None:
    """Compare a result of operations in `dtype` with what it must be."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= BOUNDS[dtype] * np.abs(want).max()
