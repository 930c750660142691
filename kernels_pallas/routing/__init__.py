"""The choice of experts for a few rows."""

from kernels_pallas.routing.api import pick

__all__ = ["pick"]
