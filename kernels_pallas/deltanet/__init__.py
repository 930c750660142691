"""The recurrence of Gated DeltaNet over the few rows of a verify window."""

from kernels_pallas.deltanet.api import pick

__all__ = ["pick"]
