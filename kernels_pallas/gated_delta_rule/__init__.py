"""The recurrence of Gated DeltaNet: the few rows of a verify window, the many of a prompt."""

from kernels_pallas.gated_delta_rule.api import pick, pick_chunks
from kernels_pallas.gated_delta_rule.triton import DeltaProjections, Fixed

__all__ = ["Fixed", "DeltaProjections", "pick", "pick_chunks"]
