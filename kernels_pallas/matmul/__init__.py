"""Matrix products of activations with stored weights."""

from kernels_pallas.matmul.api import linear, take_rows

__all__ = ["linear", "take_rows"]
