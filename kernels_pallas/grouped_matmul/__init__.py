"""The routed experts of a Mixture-of-Experts layer: each row is multiplied by the experts chosen for it alone."""

from kernels_pallas.grouped_matmul.api import (
    Router,
    SharedExpert,
    combine_experts,
    fused_moe,
    fused_moe_unreduced,
    fused_moe_with_router,
    fused_moe_with_shared,
)

__all__ = [
    "Router",
    "SharedExpert",
    "combine_experts",
    "fused_moe",
    "fused_moe_unreduced",
    "fused_moe_with_router",
    "fused_moe_with_shared",
]
