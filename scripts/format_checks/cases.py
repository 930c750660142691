"""Formats of quantised checkpoints, packed by their own libraries on a CPU, with the values that these read back.

A library is imported when its case is made. If it is not installed, the case raises ImportError, which
`scripts/format_checks/check_formats.py` reports. Only packing and unpacking of the libraries is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from scripts.format_checks.fp8_and_nvfp4 import fine_grained, modelopt
from scripts.format_checks.gptq_and_awq import auto_round, awq, gptq
from scripts.format_checks.llm_compressor import compressed, integers, mixed, preset
from scripts.format_checks.packing import GROUP, Case

FINE_GRAINED: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8 ue8m0": {"scale_fmt": "ue8m0"},
    "fp8 tensor": {"weight_block_size": None},
}
# (symmetric, bits, group size, backend)
AUTO_ROUND = (
    (True, 4, GROUP, "auto_gptq"),
    (True, 8, 32, "auto_gptq"),
    (False, 4, GROUP, "auto_gptq"),
    (False, 4, GROUP, "exllamav2"),
    (False, 8, -1, "tritonv2"),
    (False, 4, GROUP, "gptqmodel"),
    (True, 4, -1, "auto_gptq"),
    (True, 4, GROUP, "auto_awq"),
    (False, 4, GROUP, "auto_awq"),
)
PRESETS = (
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "NVFP4A16",
    "MXFP4A16",
    "FP8_BLOCK",
    "FP8_DYNAMIC",
    "MXFP8A16",
)
INTEGERS: dict[str, dict[str, Any]] = {
    "int4 asym channel": {"num_bits": 4, "symmetric": False, "strategy": "channel"},
    "int4 group 32": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int8 asym group 128": {"num_bits": 8, "symmetric": False, "strategy": "group", "group_size": 128},
    "int8 channel": {"num_bits": 8, "strategy": "channel"},
}
MODELOPT = {
    "NVFP4": ("NVFP4_DEFAULT",),
    "W4A16_NVFP4": ("W4A16_NVFP4",),
    "FP8": ("FP8_DEFAULT",),
    "MXFP8": ("MXFP8_DEFAULT",),
    "FP8_PER_CHANNEL_PER_TOKEN": ("FP8_PER_CHANNEL_PER_TOKEN",),
    "FP8_PB_WO": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY",),
    "W8A16": ("INT8_WEIGHT_ONLY",),
    "MIXED_PRECISION, NVFP4 and FP8": ("NVFP4_DEFAULT", "FP8_DEFAULT"),
}


def _cases() -> Iterator[Case]:
    for name, settings in FINE_GRAINED.items():
        yield Case(name, "transformers", partial(fine_grained, **settings))
    for bits in (4, 8):
        for group in (GROUP, -1):
            for sym, version in ((True, "gptq"), (False, "gptq"), (False, "gptq_v2")):
                name = f"int{bits} {'sym' if sym else 'asym'} group {group} {version}"
                make = partial(gptq, bits=bits, group_size=group, sym=sym, format=version, desc_act=False)
                yield Case(name, "gptqmodel", make)
    yield Case("int4 asym gemm", "autoawq", awq)
    for sym, bits, group, backend in AUTO_ROUND:
        name = f"int{bits} {'sym' if sym else 'asym'} group {group} {backend}"
        make = partial(auto_round, backend=f"auto_round:{backend}", sym=sym, bits=bits, group=group)
        yield Case(name, "auto-round", make)
    for name in PRESETS:
        yield Case(name, "compressed-tensors", partial(compressed, groups=partial(preset, name)))
    for name, settings in INTEGERS.items():
        yield Case(name, "compressed-tensors", partial(compressed, groups=partial(integers, **settings)))
    yield Case("NVFP4A16 and FP8_BLOCK", "compressed-tensors", partial(compressed, groups=mixed))
    for name, config_names in MODELOPT.items():
        yield Case(name, "nvidia-modelopt", partial(modelopt, config_names=config_names))


CASES = tuple(_cases())
