"""Mixture-of-Experts matrix products: each row is multiplied only by the experts that were chosen for it."""

from kernels_pallas.grouped_matmul.api import expert_mlp

__all__ = ["expert_mlp"]
