"""Which kernels run the recurrence on which platform. Without one the model does so in plain `lax`."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from kernels_pallas.gated_delta_rule import triton
from kernels_pallas.gated_delta_rule import triton_chunks as chunks

Window = Callable[..., tuple[Array, Array, Array, Array]]

Chunks = Callable[..., tuple[Array, Array]]

# Platform -> kernels with the signatures of `triton.delta_window` and `chunks.delta_chunks`
KERNELS: dict[str, Window] = {"cuda": triton.delta_window}
CHUNK_KERNELS: dict[str, Chunks] = {"cuda": chunks.delta_chunks}


def pick(platform: str, rows: int, key_size: int, value_size: int) -> Window | None:
    """The kernel of a platform for windows of so many rows and heads of these sizes, if there is one."""
    return KERNELS.get(platform) if triton.takes(rows, key_size, value_size) else None


def pick_chunks(platform: str, chunk: int, key_size: int, value_size: int) -> Chunks | None:
    """The kernels of a platform for chunks of so many rows and heads of these sizes, if there are any."""
    return CHUNK_KERNELS.get(platform) if chunks.takes(chunk, key_size, value_size) else None
