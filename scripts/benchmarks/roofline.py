"""Roofline: the least time a device needs is bytes ÷ copy bandwidth or operations ÷ matmul rate; both are measured
here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mtpjax.config import ModelConfig
from mtpjax.loading.weight_map import flat

# Sizes for `measure_ceilings` that are larger than the caches.
CEILINGS = {"cpu": {"megabytes": 256, "size": 2048}, "cuda": {"megabytes": 2048, "size": 8192}}


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of the device."""

    bytes_per_second: float  # of a large copy, bytes read plus bytes written
    flops_per_second: float  # of a large matmul in `dtype`
    dtype: str

    def floor(self, num_bytes: float, flops: float) -> float:
        """Return the least seconds of a program that moves so many bytes and does so many operations."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)

    def limit(self, num_bytes: float, flops: float) -> str:
        """Return which of the two decides: "bytes" or "operations"."""
        return "bytes" if num_bytes / self.bytes_per_second >= flops / self.flops_per_second else "operations"


def measure_seconds(run: Callable[[], Any], runs: int) -> list[float]:
    """Measure `runs` runs, each until the device is done, after one that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure_ceilings(dtype: Any, *, megabytes: int, size: int, runs: int = 9) -> Ceilings:
    """Measure the copy bandwidth and the matmul rate.

    The copy reads and writes an array of `megabytes` in place; the matmul multiplies random numbers, `size` x `size` x
    `size`. The fastest run counts: a ceiling is what the device can do, not what it did while it was busy.
    """
    array = jax.random.bits(jax.random.key(0), (megabytes * 2**18,), jnp.uint32)
    size_in_bytes, copy = array.nbytes, jax.jit(lambda x: x ^ 1, donate_argnums=0)

    def copy_in_place() -> jax.Array:  # with fresh memory, the time of its allocation would be measured, too
        nonlocal array
        array = copy(array)
        return array

    bandwidth = 2 * size_in_bytes / min(measure_seconds(copy_in_place, runs))
    a = jax.random.normal(jax.random.key(1), (size, size), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None  # like the model's float32 products
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    rate = 2 * size**3 / min(measure_seconds(partial(product, a, a), runs))
    return Ceilings(bandwidth, rate, jnp.dtype(dtype).name)


def expected_distinct_experts(cfg: ModelConfig, rows: float) -> float:
    """Return how many experts of a layer `rows` token rows use together on average, if routing is uniform."""
    return cfg.num_experts * (1 - (1 - cfg.experts_per_token / cfg.num_experts) ** rows)


@dataclass(frozen=True)
class Work:
    """The least number of bytes to move and of operations to do."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.bytes * times, self.flops * times)


def weights_work(cfg: ModelConfig, params: Any, rows: int, *, mtp: bool, head_rows: int) -> Work:
    """Return the work of the weights of the trunk, or with `mtp` of one step of the MTP head, for `rows` token rows.

    Each matrix is read once; of the experts, the expected number of chosen ones. The LM head runs for `head_rows` rows.
    """
    total = Work(0.0, 0.0)
    for path, variable in flat(params).items():
        leaf, name = variable[...], path[-1]
        size, elements = leaf.nbytes, math.prod(leaf.shape)
        if name in ("embedding", "lm_head"):
            is_head = name == "lm_head" or cfg.tied_embeddings
            if is_head and head_rows:
                total += Work(size, 2.0 * elements * head_rows)
        elif (path[0] == "mtp") != mtp or len(leaf.shape) < 2:
            continue
        elif name in ("gate_up", "down") and len(leaf.shape) == 4:
            share = expected_distinct_experts(cfg, rows) / cfg.num_experts
            total += Work(size * share, 2.0 * elements / cfg.num_experts * cfg.experts_per_token * rows)
        else:
            total += Work(size, 2.0 * elements * rows)
    return total


def attention_work(cfg: ModelConfig, layers: int, rows: int, context: int, itemsize: int, batch: int = 1) -> Work:
    """Return the work of `rows` rows of each of `batch` sequences that attend to `context` positions in each layer."""
    num_bytes = 2 * layers * batch * context * cfg.kv_heads * cfg.head_dim * itemsize
    return Work(num_bytes, 4.0 * layers * batch * rows * context * cfg.q_heads * cfg.head_dim)


def state_work(cfg: ModelConfig, rows: int, batch: int = 1) -> Work:
    """Return the work on the recurrent states of all DeltaNet layers.

    Each state is read and written once; each of `rows` rows makes a rank-one update and a read.
    """
    size = cfg.linear_layers * batch * cfg.linear_v_heads * cfg.linear_k_dim * cfg.linear_v_dim
    return Work(2 * 4 * size, 8.0 * size * rows)


def round_work(cfg: ModelConfig, params: Any, draft: int, batch: int, context: int, itemsize: int) -> dict[str, Work]:
    """Return the work of a decoding round by part: "draft", "verify" and "commit" with the sync of the head's cache."""
    rows = batch * (draft + 1)
    step = weights_work(cfg, params, batch, mtp=True, head_rows=batch)
    step += attention_work(cfg, 1, 1, context, itemsize, batch)
    verify = weights_work(cfg, params, rows, mtp=False, head_rows=rows)
    verify += attention_work(cfg, cfg.full_layers, draft + 1, context, itemsize, batch)
    state = state_work(cfg, draft + 1, batch)
    # "verify" reads the states, "commit" writes them. The sync reads a small part of the head's weights, not counted.
    return {
        "draft": step * draft,
        "verify": verify + Work(state.bytes / 2, state.flops),
        "commit": Work(state.bytes / 2, 0),
    }


def chunk_work(cfg: ModelConfig, params: Any, rows: int, context: int, itemsize: int) -> Work:
    """Return the work of a prompt chunk of one sequence that ends at `context`, without output rows and MTP head."""
    work = weights_work(cfg, params, rows, mtp=False, head_rows=0) + state_work(cfg, rows)
    return work + attention_work(cfg, cfg.full_layers, rows, context - rows // 2, itemsize)
