"""Matrix products of activations with stored weights."""

from kernels_pallas.matmul.api import linear

__all__ = ["linear"]
