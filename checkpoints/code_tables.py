"""Tables of 4-bit code values that several file formats share: entry i is the value of code i before scaling."""

# The non-uniform levels of IQ4_NL and IQ4_XS: `kvalues_iq4nl` in ggml-common.h of llama.cpp.
IQ4_NL_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

# Four-bit integers whose zero point is 8: Q4_0, and GPTQ or compressed-tensors with `sym: true`.
INT4_TABLE = tuple(range(-8, 8))

# Four-bit integers whose zero point is in the offset: Q4_1, Q4_K, GPTQ and AWQ with zero points.
UINT4_TABLE = tuple(range(16))

# Twice the values of an E2M1 float (OCP Microscaling Formats specification v1.0): MXFP4 and NVFP4. Doubled because
# 0.5 and 1.5 are no integers; the scale is halved in return.
DOUBLED_E2M1_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
