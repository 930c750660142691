"""Residual sums and RMS norms."""

from kernels_pallas.norm.api import add_rms_norm, concatenated_rms_norm, gated_rms_norm, rms_norm, sum_rms_norm
from kernels_pallas.norm.moe_output import MoeOutput
from kernels_pallas.norm.reference import l2_norm

__all__ = [
    "MoeOutput",
    "add_rms_norm",
    "concatenated_rms_norm",
    "gated_rms_norm",
    "l2_norm",
    "rms_norm",
    "sum_rms_norm",
]
