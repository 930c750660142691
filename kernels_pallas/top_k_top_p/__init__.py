"""Which tokens a request samples from."""

from kernels_pallas.top_k_top_p.api import KERNELS
from kernels_pallas.top_k_top_p.reference import least_kept

__all__ = ["KERNELS", "least_kept"]
