"""Matrix products of activations with stored weights."""

from kernels_pallas.matmul.api import Packed, added, linear, linears, linears_in_parts, take_rows

__all__ = ["Packed", "added", "linear", "linears", "linears_in_parts", "take_rows"]
