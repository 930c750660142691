"""The choice of experts, and the activation of the shared expert, which reads the same launch."""

from kernels_pallas.topk_softmax.api import topk_softmax
from kernels_pallas.topk_softmax.reference import ExpertChoice

__all__ = ["ExpertChoice", "topk_softmax"]
