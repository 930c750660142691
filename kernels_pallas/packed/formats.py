"""The forms in which published checkpoints store weights, by name: shared by tests, compile checks and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.weights.quantized import FP8_BLOCK, INDEX_BITS, QuantizedTensor

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


class StorageFormat(NamedTuple):
    """How a weight is stored; names as in `QuantizedTensor`, and the layout "plain" for bfloat16.

    `super_group`: elements that share a `super_scale`, 0 for scales of one level in float16.
    """

    layout: str
    group: int = 0
    table: tuple[int, ...] | None = None
    has_offset: bool = False
    super_group: int = 0


FORMATS = {
    "iq4_nl": StorageFormat("codes4", 32, IQ4_NL),
    "iq4_xs": StorageFormat("codes4", 32, IQ4_NL, super_group=256),
    "q4_k": StorageFormat("codes4", 32, tuple(range(16)), has_offset=True, super_group=256),
    "q5_1": StorageFormat("codes5", 32, tuple(range(32)), has_offset=True),
    "q5_k": StorageFormat("codes5", 32, tuple(range(32)), has_offset=True, super_group=256),
    "q6_k": StorageFormat("codes6", 16, tuple(range(-32, 32)), super_group=256),
    "q8_0": StorageFormat("codes8", 32),
    "mixed": StorageFormat("codes8", 16, has_offset=True),  # what holds layers of several types in one array
    "nvfp4": StorageFormat("codes4", 16, FP4),
    "int4 g16": StorageFormat("codes4", 16, tuple(range(-8, 8)), has_offset=True),
    "int4 g128": StorageFormat("codes4", 128, tuple(range(16)), has_offset=True),  # AWQ, GPTQ
    "int5 g128": StorageFormat("codes5", 128, tuple(range(-16, 16))),
    "int8 g128": StorageFormat("codes8", 128, has_offset=True),
    "fp8": StorageFormat("fp8", FP8_BLOCK),
    "bf16": StorageFormat("plain"),
}


_quantized: Any = QuantizedTensor  # of shapes here, where the class is annotated with arrays


def abstract_weight(shape: Sequence[int], name: str) -> Any:
    """Return a weight `[..., O, F]` in the format `name` whose arrays are shapes only."""
    stored, spec, (*lead, size) = FORMATS[name], jax.ShapeDtypeStruct, shape
    if stored.layout == "plain":
        return spec(tuple(shape), jnp.bfloat16)
    if stored.layout == "fp8":
        *stack, outputs = lead
        scale = spec((*stack, -(-outputs // FP8_BLOCK), -(-size // FP8_BLOCK)), jnp.float32)
        return _quantized(spec(tuple(shape), jnp.float8_e4m3fn), scale, None, "fp8", stored.group)
    scale = spec((*lead, size // stored.group), jnp.int8 if stored.super_group else jnp.float16)
    super_scale = spec((*lead, size // stored.super_group), jnp.float16) if stored.super_group else None
    high_dtype = {"codes5": jnp.uint8, "codes6": jnp.uint16}.get(stored.layout)
    return _quantized(
        spec((*lead, size // 2), jnp.uint8) if stored.layout in INDEX_BITS else spec(tuple(shape), jnp.int8),
        scale,
        scale if stored.has_offset else None,
        stored.layout,
        stored.group,
        stored.table,
        high=spec((*lead, size // 8), high_dtype) if high_dtype else None,
        super_scale=super_scale,
        super_offset=super_scale if stored.has_offset else None,
    )
