"""The names of tensor types that this program does not read, for the message that refuses them."""

from __future__ import annotations

# `enum ggml_type` in ggml.h of llama.cpp.
_LLAMA_CPP = {
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    31: "Q4_0_4_4, which llama.cpp has given up",
    32: "Q4_0_4_8, which llama.cpp has given up",
    33: "Q4_0_8_8, which llama.cpp has given up",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4, which llama.cpp has given up",
    37: "IQ4_NL_4_8, which llama.cpp has given up",
    38: "IQ4_NL_8_8, which llama.cpp has given up",
    41: "Q1_0",
    42: "Q2_0",
}
# `enum ggml_type` in ggml.h of ik_llama.cpp, a fork that numbers its own types from 133 on. A type whose name ends with
# _R4, _R8 or _R16 is another one with its rows interleaved.
_IK_LLAMA_CPP = {
    133: "Q6_0",
    134: "IQ1_BN",
    135: "IQ2_BN",
    136: "Q8_K64",
    137: "IQ2_K",
    138: "IQ3_K",
    139: "IQ4_K",
    140: "IQ5_K",
    141: "IQ6_K",
    144: "IQ4_KS",
    145: "IQ2_KS",
    146: "IQ4_KSS",
    151: "Q8_KV",
    152: "IQ5_KS",
    153: "IQ2_KT",
    154: "IQ3_KT",
    155: "IQ4_KT",
    156: "IQ3_KS",
    157: "IQ2_KL",
    158: "IQ1_KT",
    202: "Q4_0_R8",
    206: "Q5_0_R4",
    208: "Q8_0_R8",
    210: "Q2_K_R4",
    211: "Q3_K_R4",
    212: "Q4_K_R4",
    213: "Q5_K_R4",
    214: "Q6_K_R4",
    216: "IQ2_XXS_R4",
    217: "IQ2_XS_R4",
    218: "IQ3_XXS_R4",
    219: "IQ1_S_R4",
    220: "IQ4_NL_R4",
    221: "IQ3_S_R4",
    222: "IQ2_S_R4",
    223: "IQ4_XS_R8",
    229: "IQ1_M_R4",
    230: "BF16_R16",
    233: "Q6_0_R4",
    335: "IQ2_BN_R4",
    337: "IQ2_K_R4",
    338: "IQ3_K_R4",
    339: "IQ4_K_R4",
    340: "IQ5_K_R4",
    344: "IQ4_KS_R4",
    352: "IQ5_KS_R4",
    398: "Q8_KV_R8",
    399: "Q8_K_R8",
}
# Forks with TurboQuant types (TURBO2_0, TURBO3_0, TURBO4_0, TQ3_1S, TQ4_1S and others) give these numbers to different
# types, and two of them are llama.cpp's own by now.
_FORKS = range(41, 64)


def describe_type(number: int) -> str:
    """Return the name of a tensor type that is not read, as far as its number tells it."""
    if number in _IK_LLAMA_CPP:
        return f"{_IK_LLAMA_CPP[number]} of ik_llama.cpp"
    in_forks = "a type of a fork of llama.cpp, such as TURBO3_0, TQ3_1S or TQ4_1S"
    if number in _LLAMA_CPP:
        return _LLAMA_CPP[number] + (f" (or {in_forks})" if number in _FORKS else "")
    return f"number {number}" + (f" ({in_forks})" if number in _FORKS else "")
