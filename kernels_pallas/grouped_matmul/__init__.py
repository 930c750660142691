"""Mixture-of-Experts matrix products: each row is multiplied only by the experts that were chosen for it."""

from kernels_pallas.grouped_matmul.api import EACH_KERNELS, expert_mlp

__all__ = ["EACH_KERNELS", "expert_mlp"]
