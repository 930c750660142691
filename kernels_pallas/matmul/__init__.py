"""Matrix products of activations with stored weights."""

from kernels_pallas.matmul.api import Packed, embedding_lookup, fused_linears, linear, linears_split_k

__all__ = ["Packed", "linear", "fused_linears", "linears_split_k", "embedding_lookup"]
