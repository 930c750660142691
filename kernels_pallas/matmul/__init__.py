"""Matrix products of rows with stored weights; nothing above this room asks how a weight is stored."""

from kernels_pallas.matmul.api import embedding_lookup, fused_linears, linear, linears_split_k

__all__ = ["embedding_lookup", "fused_linears", "linear", "linears_split_k"]
