"""Attention of a few or many rows over a cache of keys and values."""

from kernels_pallas.attention.api import pick

__all__ = ["pick"]
