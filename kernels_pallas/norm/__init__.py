"""What lies between matrix products: residual sums and norms."""

from kernels_pallas.norm.api import MoeOutput, NormKernels, pick

__all__ = ["MoeOutput", "NormKernels", "pick"]
