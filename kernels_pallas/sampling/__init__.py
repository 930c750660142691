"""Which tokens a request samples from."""

from kernels_pallas.sampling.api import KERNELS
from kernels_pallas.sampling.reference import least_kept

__all__ = ["KERNELS", "least_kept"]
