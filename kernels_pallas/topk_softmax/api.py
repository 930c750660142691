"""`topk_softmax`: the choice of experts, and the activation of the shared expert."""

from __future__ import annotations

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool

from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import interpret_kernels, resolve_implementation
from kernels_pallas.topk_softmax import reference, triton
from kernels_pallas.topk_softmax.reference import ExpertChoice


def topk_softmax(
    logits: PartialSums,
    gate: PartialSums,
    up: PartialSums,
    valid: Bool[Array, " rows"],
    k: int,
    dtype: DTypeLike,
    *,
    implementation: str | None = None,
) -> ExpertChoice:
    """Choose the `k` experts with the largest softmax of the logits, and activate the shared expert: `silu(gate) * up`.

    The largest comes first; of equals the one with the lower number.

    Args:
        logits: of the router, `[rows, E]`, float32.
        gate, up: projections of the shared expert, `[rows, I]`, float32.
        valid: rows that count; the ids of the others are E.
        k: experts for a row.
        dtype: of `shared_hidden`.
        implementation: "xla" (the formula in `reference.py`, which has gradients), "triton", or None: the best for the
            platform.
    """
    if resolve_implementation(implementation) == "xla":
        return reference.topk_softmax(logits, gate, up, valid, k, dtype)
    return triton.topk_softmax(logits, gate, up, valid, k, dtype, interpret=interpret_kernels())
