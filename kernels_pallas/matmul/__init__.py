"""Matrix products of activations with stored weights."""

from kernels_pallas.matmul.api import Packed, linear, linears, take_rows, with_first_in_parts

__all__ = ["Packed", "linear", "linears", "take_rows", "with_first_in_parts"]
