"""Top-k and top-p truncation of a distribution over a vocabulary."""

from kernels_pallas.top_k_top_p.api import top_k_top_p_threshold

__all__ = ["top_k_top_p_threshold"]
