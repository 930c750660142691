"""Element types: their names in the safetensors format, and the properties that the readers need."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
DTYPE_NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}

# A value is NaN or infinite exactly when all of these bits are set. `np.isfinite` gives the same answer, but for these
# types it runs element by element, 17 times slower: a minute on the weights of a 35B model.
_NON_FINITE_BITS: dict[np.dtype[Any], int] = {
    DTYPES["BF16"]: 0x7F80,
    DTYPES["F16"]: 0x7C00,
    DTYPES["F8_E4M3"]: 0x7F,  # no infinity; exponent and mantissa all ones is NaN
    DTYPES["F8_E5M2"]: 0x7C,
    DTYPES["F8_E8M0"]: 0xFF,
}


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return True for IEEE floats and for the floats of `ml_dtypes`, whose numpy kind is 'V'."""
    return dtype.kind == "f" or dtype in _NON_FINITE_BITS


def can_convert(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Return whether values may be read as `target`: floats as any float (rounded), integers only without loss."""
    if is_float(source):
        return is_float(target)
    return bool(np.can_cast(source, target, "safe"))


def non_finite(values: NDArray[Any]) -> NDArray[Any]:
    """Return a boolean mask of the NaN and infinite elements of `values`, which must have a float type."""
    bits = _NON_FINITE_BITS.get(values.dtype)
    if bits is None:
        mask: NDArray[Any] = ~np.isfinite(values)
        return mask
    codes: NDArray[Any] = values.view(np.uint8 if values.dtype.itemsize == 1 else np.uint16)
    mask = (codes & bits) == bits
    return mask
