"""Which kernel chooses the experts of rows on which platform. Without one the model does so in plain `lax`."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from kernels_pallas.topk_softmax import triton

# Platform -> kernel with the signature of `triton.choose_experts`
KERNELS: dict[str, Callable[..., tuple[Array, Array, Array]]] = {"cuda": triton.choose_experts}
