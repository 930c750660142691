"""What lies between matrix products: residual sums and norms."""

from kernels_pallas.norm.api import Mixture, NormKernels, pick

__all__ = ["Mixture", "NormKernels", "pick"]
