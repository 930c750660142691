"""Attention of a few or many rows over a cache of keys and values."""

from kernels_pallas.attention.api import AttentionKernels, pick
from kernels_pallas.attention.triton_qkv import Entering

__all__ = ["AttentionKernels", "Entering", "pick"]
