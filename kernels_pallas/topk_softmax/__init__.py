"""The choice of experts."""

from kernels_pallas.topk_softmax.api import KERNELS

__all__ = ["KERNELS"]
