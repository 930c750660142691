"""Caches after prompts on an emulated card: the same bits alone and together, in short and long chunks, MTP on and off.

The weights are random, of a model that is small enough for an emulator: two layers and the MTP head, whose sums are cut
into several steps and parts. All that is compiled runs as on the card, except for the tensor cores, whose order of sums
no emulator knows (`scripts/ptx_emulator/tensor_cores.py`). Races are not looked for: the kernel cases do that.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mtpjax.loading.random_init import random_model
from scripts.gpu.bits_model import BitChecks, ModelSizes
from scripts.gpu.emulated_device import EmulatedDevice
from scripts.gpu.suite_bits import TOY_CONFIG

CONFIG = replace(
    TOY_CONFIG,
    hidden_size=256,
    head_dim=32,
    rotary_dim=8,
    linear_k_dim=32,
    linear_v_dim=32,
    expert_size=64,
    shared_expert_size=64,
)
PROMPTS = (70, 64, 41, 9, 66)  # tokens; two chunks of 64 rows, one chunk, and much padding
ALONE = (0, 3)  # the prompts that are also read alone
CHUNKS = (256, 64)


class Way(NamedTuple):
    """A way to read the prompts."""

    mtp: bool
    chunk: int
    alone: bool

    def __str__(self) -> str:
        return f"{'alone' if self.alone else 'together'}, chunks of {self.chunk}, MTP {'on' if self.mtp else 'off'}"


WAYS = tuple(Way(*way) for way in product((True, False), CHUNKS, (False, True)))  # the first one is the reference
CACHES = {"caches iq4_nl": "iq4nl"}  # `quantization` of the weights


def cache_report(device: EmulatedDevice, quantization: str) -> dict[str, Any]:
    """Read the prompts in all ways; return how many numbers of the caches differ from those of the first one."""
    model = random_model(CONFIG, quantization=quantization, scale=0.3, dtype=jnp.bfloat16)
    compile_fn = partial(device.compile, find_races=False)
    sizes = ModelSizes(prompts=PROMPTS, chunks=CHUNKS, new_tokens=0)
    checks, found = BitChecks(model, jnp.bfloat16, sizes, compile_fn=compile_fn), []
    with device.active():
        reference = None
        for way in WAYS:
            start = time.perf_counter()
            prompts = ALONE if way.alone else None
            caches = checks.caches(way.mtp, (way.chunk,), one_by_one=way.alone, prompts=prompts)
            if reference is None:
                reference = caches
                continue
            expected = [reference[i] for i in prompts] if prompts else reference
            result = checks.compare_caches(str(way), expected, caches)
            found.append(result._asdict() | {"seconds": round(time.perf_counter() - start, 1)})
    assert reference is not None
    return {"reference": str(WAYS[0]), "prompts": PROMPTS, "empty": empty_arrays(reference), "checks": found}


def empty_arrays(caches: list[dict[str, np.ndarray]]) -> list[str]:
    """Return the arrays that say nothing, because they hold one number everywhere or one that is not finite."""
    return [
        f"{name} of prompt {number}"
        for number, arrays in enumerate(caches)
        for name, values in arrays.items()
        if not np.isfinite(values.astype(np.float32)).all() or (values == values.flat[0]).all()
    ]


def cache_problems(result: dict[str, Any]) -> list[str]:
    """Return every way of reading that leaves other caches than the reference, and what could not differ."""
    return [f"{array}: the same number everywhere, or one that is not finite" for array in result["empty"]] + [
        f"{check['check']}: {check['differing']} of {check['total']} numbers differ, first in {check['where']}"
        for check in result["checks"]
        if check["differing"] or not check["total"]
    ]


def show_caches(result: dict[str, Any]) -> str:
    """Return a few words about a result."""
    same = sum(check["differing"] == 0 for check in result["checks"])
    return (
        f"{same} of {len(result['checks'])} ways to read {len(PROMPTS)} prompts leave the same "
        f"{max(check['total'] for check in result['checks'])} numbers; "
        f"{result['kernels']} kernels in {result['seconds']:.0f} s"
    )
