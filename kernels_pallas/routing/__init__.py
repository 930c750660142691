"""The choice of experts."""

from kernels_pallas.routing.api import KERNELS

__all__ = ["KERNELS"]
