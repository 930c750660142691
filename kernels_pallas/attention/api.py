"""Which kernel attends on which platform. Without one the model attends in plain `lax`, block by block."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from kernels_pallas.attention import triton

# (q, keys, values, layer, positions, live) -> rows; see `triton.attend_cache`
KERNELS: dict[str, Callable[..., Array]] = {"cuda": triton.attend_cache}


def pick(platform: str, size: int, slots: int) -> Callable[..., Array] | None:
    """The kernel of a platform for heads of `size` and a cache of `slots`, if there is one."""
    return KERNELS.get(platform) if triton.takes(size, slots) else None
