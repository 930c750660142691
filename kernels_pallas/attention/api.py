"""Which kernel attends on which platform. Without one the model attends in plain `lax`, block by block."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from kernels_pallas.attention import triton

# (q, keys, values, layer, positions, live) -> rows; see `triton.attend_cache`
KERNELS: dict[str, Callable[..., Array]] = {"cuda": triton.attend_cache}
