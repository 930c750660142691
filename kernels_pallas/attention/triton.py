"""Attention over a cache as one or two Pallas kernels, through the Triton lowering, whatever the context length.

As a loop of XLA operations, attention over 32k cache positions is a hundred iterations of a dozen kernels, and the host
waits for every iteration. For verify windows the cache is split (`triton_decode`); for prompts one program reads all
that its rows see (`triton_prefill`). Within either kind, a row's result does not depend on the other rows, bit for bit.
"""

from __future__ import annotations

from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention.triton_decode import decode_attention
from kernels_pallas.attention.triton_prefill import prefill_attention
from kernels_pallas.partial_sums import PartialSums

MIN_HEAD_DIM = 16  # the smallest size that tensor cores contract over
KV_MULTIPLE = 64  # the largest tile of cache positions that a kernel reads whole
DECODE_ROWS = 16  # rows of a window up to which the cache is split


def supports(head_dim: int, kv_len: int) -> bool:
    """Return whether the kernels support heads of this size and a cache of this length."""
    return head_dim >= MIN_HEAD_DIM and head_dim & (head_dim - 1) == 0 and kv_len % KV_MULTIPLE == 0


def attention(
    q: Float[Array, "B T Q H"],
    keys: Float[Array, "A B N S H"],
    values: Float[Array, "A B N S H"],
    layer: Int[Array, ""] | int,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    gates: PartialSums,
    *,
    is_prompt: bool = False,
    interpret: bool = False,
) -> Float[Array, "B T Q H"]:
    """See `kernels_pallas.attention.attention`. Nothing beyond the last valid row of a sequence is read.

    Args:
        interpret: run the kernels in interpret mode, on any device.
    """
    attend = decode_attention if q.shape[1] <= DECODE_ROWS and not is_prompt else prefill_attention
    return attend(q, keys, values, layer, positions, valid, gates, interpret=interpret)
