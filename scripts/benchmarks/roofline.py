"""The least time that a device needs: bytes over its copy bandwidth or operations over its matmul rate, both measured here."""

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
from mtpjax.loading.loaded_model import flatten_params

# Sizes for `measure_ceilings` that leave the caches behind.
CEILINGS = {"cpu": {"megabytes": 256, "size": 2048}, "cuda": {"megabytes": 2048, "size": 8192}}


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to do."""

    bytes_per_second: float  # a large copy, bytes read and bytes written
    flops_per_second: float  # a large matmul in `dtype`
    dtype: str

    def floor(self, moved: float, flops: float) -> float:
        """Seconds below which no program gets that moves so many bytes and does so many operations."""
        return max(moved / self.bytes_per_second, flops / self.flops_per_second)

    def limit(self, moved: float, flops: float) -> str:
        """Which of the two it is."""
        return "bytes" if moved / self.bytes_per_second >= flops / self.flops_per_second else "operations"


def seconds(run: Callable[[], Any], runs: int) -> list[float]:
    """Of each run after the first, which is dropped; the device is waited for."""
    found = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return found[1:]


def measure_ceilings(dtype: Any, *, megabytes: int, size: int, runs: int = 9) -> Ceilings:
    """Copy bandwidth over an array of `megabytes`, read and written in place, and the rate of a matmul of random numbers,
    `size` x `size` x `size`.

    The fastest run counts: a ceiling is what the device can do, not what it did while it was busy.
    """
    big = jax.random.bits(jax.random.key(0), (megabytes * 2**18,), jnp.uint32)
    size_in_bytes, copy = big.nbytes, jax.jit(lambda x: x ^ 1, donate_argnums=0)

    def in_place() -> jax.Array:  # fresh memory would be timed with the operating system's handing it out
        nonlocal big
        big = copy(big)
        return big

    moved = 2 * size_in_bytes / min(seconds(in_place, runs))
    a = jax.random.normal(jax.random.key(1), (size, size), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None  # as the model's float32 products
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return Ceilings(moved, 2 * size**3 / min(seconds(partial(product, a, a), runs)), jnp.dtype(dtype).name)


def distinct(cfg: ModelConfig, rows: float) -> float:
    """Experts that `rows` rows of evenly spread routing touch in one layer, on average."""
    return cfg.num_experts * (1 - (1 - cfg.experts_per_token / cfg.num_experts) ** rows)


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and operations that must be done at the least."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Work:
        return Work(self.bytes * times, self.flops * times)


def weights_work(cfg: ModelConfig, params: Any, rows: int, *, mtp: bool, head_rows: int) -> Work:
    """Weights of the trunk (or of one step of the MTP head, `mtp`) for `rows` rows: each matrix read once, of the experts
    those that are chosen; and the LM head for `head_rows`."""
    total = Work(0.0, 0.0)
    for path, variable in flatten_params(params).items():
        leaf, name = variable[...], path[-1]
        size, elements = leaf.nbytes, math.prod(leaf.shape)
        if name in ("embedding", "lm_head"):
            is_head = name == "lm_head" or cfg.tied_embeddings
            if is_head and head_rows:
                total += Work(size, 2.0 * elements * head_rows)
        elif (path[0] == "mtp") != mtp or len(leaf.shape) < 2:
            continue
        elif name in ("gate_up", "down") and len(leaf.shape) == 4:
            share = distinct(cfg, rows) / cfg.num_experts
            total += Work(size * share, 2.0 * elements / cfg.num_experts * cfg.experts_per_token * rows)
        else:
            total += Work(size, 2.0 * elements * rows)
    return total


def attention_work(cfg: ModelConfig, layers: int, rows: int, context: int, itemsize: int, batch: int = 1) -> Work:
    """`rows` rows of each of `batch` sequences attend to `context` slots in so many layers."""
    read = 2 * layers * batch * context * cfg.kv_heads * cfg.head_dim * itemsize
    return Work(read, 4.0 * layers * batch * rows * context * cfg.q_heads * cfg.head_dim)


def state_work(cfg: ModelConfig, rows: int, batch: int = 1) -> Work:
    """The recurrent states of all DeltaNet layers, read and written once; rank-one updates and reads of `rows` rows each."""
    size = cfg.linear_layers * batch * cfg.linear_v_heads * cfg.linear_k_dim * cfg.linear_v_dim
    return Work(2 * 4 * size, 8.0 * size * rows)


def round_work(cfg: ModelConfig, params: Any, draft: int, batch: int, context: int, itemsize: int) -> dict[str, Work]:
    """A decoding round by part: `draft`, `verify` and `commit`, which holds the sync of the head's cache."""
    rows = batch * (draft + 1)
    step = weights_work(cfg, params, batch, mtp=True, head_rows=batch)
    step += attention_work(cfg, 1, 1, context, itemsize, batch)
    verify = weights_work(cfg, params, rows, mtp=False, head_rows=rows)
    verify += attention_work(cfg, cfg.full_layers, draft + 1, context, itemsize, batch)
    state = state_work(cfg, draft + 1, batch)
    # Verifying reads the states, committing writes them; the sync's weights are a part of the head's, small beside it.
    return {
        "draft": step * draft,
        "verify": verify + Work(state.bytes / 2, state.flops),
        "commit": Work(state.bytes / 2, 0),
    }


def chunk_work(cfg: ModelConfig, params: Any, rows: int, context: int, itemsize: int) -> Work:
    """A prompt chunk of one sequence that ends at `context`, without output rows; the MTP head's part is left out."""
    work = weights_work(cfg, params, rows, mtp=False, head_rows=0) + state_work(cfg, rows)
    return work + attention_work(cfg, cfg.full_layers, rows, context - rows // 2, itemsize)
