"""The routed experts of a Mixture-of-Experts layer: each row is multiplied only by the experts that were chosen for it."""

from kernels_pallas.grouped_matmul.api import combine_experts, fused_moe, fused_moe_unreduced

__all__ = ["combine_experts", "fused_moe", "fused_moe_unreduced"]
