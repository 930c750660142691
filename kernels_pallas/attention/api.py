"""Which kernels attend on which platform. Without them the model attends in plain `lax`, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from kernels_pallas.attention import triton
from kernels_pallas.attention import triton_qkv as entering


class AttentionKernels(NamedTuple):
    """Kernels with the signatures of `entering.enter_cache` and `triton.attend_cache`."""

    enter: Callable[..., tuple[Any, tuple[Array, Array]]]
    attend: Callable[..., Array]


KERNELS: dict[str, AttentionKernels] = {"cuda": AttentionKernels(entering.enter_cache, triton.attend_cache)}


def pick(platform: str, size: int, slots: int) -> AttentionKernels | None:
    """The kernels of a platform for heads of `size` and a cache of `slots`, if there are any."""
    return KERNELS.get(platform) if triton.takes(size, slots) else None
