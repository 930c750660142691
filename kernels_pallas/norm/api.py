"""Which kernels add and normalise rows on which platform. Without them the model does so in plain `lax`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from kernels_pallas.norm import triton
from kernels_pallas.norm.triton import MoeOutput

__all__ = ["MoeOutput", "NormKernels", "pick"]


class NormKernels(NamedTuple):
    """Kernels with the signatures of `triton.add_norm` and `triton.gated_norm`."""

    add: Callable[..., tuple[Array, Array]]
    gated: Callable[..., Array]


KERNELS: dict[str, NormKernels] = {"cuda": NormKernels(triton.add_norm, triton.gated_norm)}


def pick(platform: str) -> NormKernels | None:
    """The kernels of a platform, if there are any."""
    return KERNELS.get(platform)
