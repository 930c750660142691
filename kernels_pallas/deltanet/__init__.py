"""The recurrence of Gated DeltaNet: the few rows of a verify window, the many of a prompt."""

from kernels_pallas.deltanet.api import pick, pick_chunks
from kernels_pallas.deltanet.triton import Fixed, Projected

__all__ = ["Fixed", "Projected", "pick", "pick_chunks"]
