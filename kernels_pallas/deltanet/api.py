"""Which kernel takes the rows of a verify window on which platform. Without one the model does so in plain `lax`."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from kernels_pallas.deltanet import triton

Window = Callable[..., tuple[Array, Array, Array, Array]]

# Platform -> kernel with the signature of `triton.delta_window`
KERNELS: dict[str, Window] = {"cuda": triton.delta_window}


def pick(platform: str, rows: int, key_size: int, value_size: int) -> Window | None:
    """The kernel of a platform for windows of so many rows and heads of these sizes, if there is one."""
    return KERNELS.get(platform) if triton.takes(rows, key_size, value_size) else None
