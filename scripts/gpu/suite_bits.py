"""The part "bits" of the GPU suite: every op and whole models, bit for bit, among different neighbours.

On a CPU the programs are those of a GPU with every kernel interpreted, at a toy size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp

from kernels_pallas.platform import override_platform, platform
from mtpjax.config import FULL, LINEAR, ModelConfig
from mtpjax.loading.load import cache_dtype
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.loading.open_model import open_model
from mtpjax.loading.random_init import random_model
from scripts.gpu.bits_model import BitChecks, Difference, ModelSizes
from scripts.gpu.bits_ops import ROWS, check_op, op_cases
from scripts.gpu.cuda_cases import KernelSizes
from scripts.gpu.kernels import SMOKE
from scripts.gpu.suite_setup import Results, Setup

FORMS = ("iq4_nl", "q8_0", "fp8", "q4_k")  # of single ops
WEIGHTS = ("iq4nl", "int8", "fp8")  # of whole models
Check = tuple[str, Callable[[], Difference]]

TOY_CONFIG = ModelConfig(
    hidden_size=64,
    num_layers=2,
    layer_pattern=(LINEAR, FULL),
    q_heads=4,
    kv_heads=2,
    head_dim=16,
    rotary_dim=4,
    rope_theta=1e7,
    linear_k_heads=2,
    linear_v_heads=4,
    linear_k_dim=16,
    linear_v_dim=16,
    conv_width=4,
    vocab_size=96,
    num_experts=4,
    experts_per_token=2,
    expert_size=32,
    shared_expert_size=32,
    stop_token_ids=(95,),
)
TOY_SIZES = ModelSizes(
    prompts=(70, 33),
    chunks=(128, 64),
    mtp_prompt_tokens=16,
    windows=(1, 5),
    window_batches=(1, 2),
    drafts=(0, 3),
    batches=(1, 2),
    new_tokens=8,
)


def model_checks(model: LoadedModel, sizes: ModelSizes, dtype: Any = jnp.bfloat16) -> Iterator[Check]:
    """Yield the checks of one model: prompts, then windows, then texts."""
    checks = BitChecks(model, cache_dtype(dtype), sizes)
    for kind in (checks.prompt_checks, checks.window_checks, checks.text_checks):
        yield from kind()


def all_checks(smoke: bool) -> Iterator[Check]:
    """Yield every check: ops in the order of a layer, then models."""
    size, rows = (SMOKE, (1, 5, 20, 70)) if smoke else (KernelSizes(layers=1), ROWS)
    for name, case in op_cases(size, FORMS[:1] if smoke else FORMS, rows=rows):
        yield name, partial(check_op, name, case)
    for weights in ("int8",) if smoke else WEIGHTS:
        if smoke:
            model = random_model(TOY_CONFIG, quantization=weights, scale=0.3, dtype=jnp.bfloat16)
        else:
            model = open_model(None, dtype="bfloat16", quantization=weights, mtp=True, tokenizer=None).model
        for name, check in model_checks(model, TOY_SIZES if smoke else ModelSizes()):
            yield f"{weights}: {name}", check


def bits(setup: Setup, results: Results) -> None:
    """Run all checks, and name what differs."""
    interpreted = (
        override_platform("cuda", (9, 0), interpret=True) if platform() != "cuda" else contextlib.nullcontext()
    )
    failed = []
    with interpreted:
        for name, check in all_checks(setup.smoke):
            if not setup.go_on(name):
                continue
            found = check()
            results.add(found._asdict() | {"check": name})
            verdict = "the same" if found.same else f"{found.differing} of {found.total} DIFFER, first in {found.where}"
            print(f"{name:44} {verdict}", flush=True)
            failed += [] if found.same else [f"{name} ({found.where})"]
    if failed:
        print(f"the first that differs: {failed[0]}", flush=True)
    results.finish(failed)
