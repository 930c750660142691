"""The recurrence of Gated DeltaNet over the few rows of a verify window."""

from kernels_pallas.deltanet.api import pick
from kernels_pallas.deltanet.triton import Fixed, Projected

__all__ = ["Fixed", "Projected", "pick"]
