"""The routed experts of a Mixture-of-Experts layer: each row is multiplied by the experts chosen for it alone."""

from kernels_pallas.grouped_matmul.api import combine_experts, fused_moe, fused_moe_unreduced

__all__ = ["combine_experts", "fused_moe", "fused_moe_unreduced"]
