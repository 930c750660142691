"""Which kernel finds the tokens of top-k and top-p on which platform. Without one it is done in plain `lax`."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from kernels_pallas.top_k_top_p import triton

# Platform -> (logits, first, heat, top_k, top_p) -> the least logit that stays; see `triton.top_k_top_p_threshold`
KERNELS: dict[str, Callable[..., Array]] = {"cuda": triton.top_k_top_p_threshold}
