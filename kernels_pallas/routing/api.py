"""Which kernel chooses the experts of a few rows on which platform. Without one the model does so in plain `lax`."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from kernels_pallas.matmul.triton import FEW
from kernels_pallas.routing import triton

# (parts, live, k) -> (weights, chosen); see `triton.choose_experts`
KERNELS: dict[str, Callable[..., tuple[Array, Array]]] = {"cuda": triton.choose_experts}


def pick(platform: str, rows: int) -> Callable[..., tuple[Array, Array]] | None:
    """The kernel of a platform for so many rows, if there is one."""
    return KERNELS.get(platform) if rows <= FEW else None
