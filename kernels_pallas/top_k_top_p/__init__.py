"""Which tokens a request samples from."""

from kernels_pallas.top_k_top_p.api import KERNELS
from kernels_pallas.top_k_top_p.reference import top_k_top_p_threshold

__all__ = ["KERNELS", "top_k_top_p_threshold"]
