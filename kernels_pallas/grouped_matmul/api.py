"""`fused_moe`: the routed half of a Mixture-of-Experts layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.grouped_matmul import reference, triton
from kernels_pallas.grouped_matmul.grad import with_gradient_of
from kernels_pallas.grouped_matmul.plan import drop_invalid
from kernels_pallas.grouped_matmul.reference import combine_experts
from kernels_pallas.grouped_matmul.triton_routing import Router
from kernels_pallas.grouped_matmul.triton_shared import SharedExpert
from kernels_pallas.matmul import linears_split_k
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import interpret_kernels, resolve_implementation
from kernels_pallas.weights import LayerView, QuantizedTensor, Weight

__all__ = [
    "Router",
    "SharedExpert",
    "combine_experts",
    "fused_moe",
    "fused_moe_unreduced",
    "fused_moe_with_router",
    "fused_moe_with_shared",
]


def fused_moe(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    topk_ids: Int[Array, "rows topk"],
    topk_weights: Float[Array, "rows topk"],
    valid: Bool[Array, " rows"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "rows D"]:
    """Return the weighted sum over the experts of each row, in the dtype of `x`; for the formula see `reference.py`.

    Only chosen experts are read, no row is dropped, and a row's result does not depend on the order of the others. The
    sum over the experts of a row is float32, in the order of `topk_ids`.

    Args:
        gate_up: the stack `[L, E, 2 I, D]`, I gate rows and then I up rows of each expert, plain or stored in any form.
        down: the stack `[L, E, D, I]`.
        layer: which layer of the stacks, int32.
        topk_ids: the experts of each row, int32; E for a row without experts, which costs nothing and gives zero.
        topk_weights: float32, applied after the down projection.
        valid: rows that have experts; None: those whose ids are below E.
        implementation: "xla", "triton", or None: "triton" on a CUDA device if the kernels support both stacks, else
            "xla". Plain stacks have a gradient in both.

    Raises:
        ValueError: "triton" was asked for, and the kernels do not support the stacks.
    """
    topk_ids = drop_invalid(topk_ids, valid, gate_up.shape[1])
    args = (x, gate_up, down, layer, topk_ids, topk_weights)
    if not _uses_kernel(gate_up, down, implementation):
        return reference.fused_moe(*args).astype(x.dtype)
    kernel = partial(triton.fused_moe, out_dtype=jnp.float32, interpret=interpret_kernels())
    if _any_packed(gate_up, down):
        return kernel(*args).astype(x.dtype)
    return with_gradient_of(kernel, reference.fused_moe, *args).astype(x.dtype)


def fused_moe_unreduced(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    topk_ids: Int[Array, "rows topk"],
    topk_weights: Float[Array, "rows topk"],
    valid: Bool[Array, " rows"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "rows chosen D"]:
    """Return the weighted outputs of the experts of each row, float32, for a reader that adds them itself.

    `combine_experts` adds them. The axis `chosen` is `topk` where the kernel reads packed stacks. Otherwise it is 1:
    there the sum is taken at once. The outputs of a row without experts are undefined.

    Args:
        gate_up, down, layer, topk_ids, topk_weights, valid, implementation: as for `fused_moe`.
    """
    topk_ids = drop_invalid(topk_ids, valid, gate_up.shape[1])
    args = (x, gate_up, down, layer, topk_ids, topk_weights)
    if not _uses_kernel(gate_up, down, implementation):
        return reference.fused_moe(*args)[:, None]
    interpret = interpret_kernels()
    if _any_packed(gate_up, down):
        return triton.fused_moe_unreduced(*args, interpret=interpret)[0]
    kernel = partial(triton.fused_moe, out_dtype=jnp.float32, interpret=interpret)
    return with_gradient_of(kernel, reference.fused_moe, *args)[:, None]


def fused_moe_with_shared(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    topk_ids: Int[Array, "rows topk"],
    topk_weights: Float[Array, "rows topk"],
    shared: SharedExpert,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows chosen D"], PartialSums]:
    """Return `fused_moe_unreduced`, and the down projection of the shared expert: partial sums `[P, rows, D]`.

    For few rows the kernels of packed experts make both in one launch. A row of the shared expert has the bits that
    `linears_split_k` gives it.

    Args:
        x, gate_up, down, layer, topk_ids, topk_weights, implementation: as for `fused_moe_unreduced`.
        shared: the activated hidden units of the rows, in the dtype of `x`, and the down projection.
    """
    args = (x, gate_up, down, layer, topk_ids, topk_weights)
    joins = isinstance(shared.down, QuantizedTensor | LayerView) and triton.supports(shared.down)
    if joins and _any_packed(gate_up, down) and _uses_kernel(gate_up, down, implementation):
        outputs, total = triton.fused_moe_unreduced(*args, shared, interpret=interpret_kernels())
        if total is not None:
            return outputs, PartialSums(total[None])
    else:
        outputs = fused_moe_unreduced(*args, implementation=implementation)
    return outputs, linears_split_k(shared.hidden, shared.down, implementation=implementation)[0]


def fused_moe_with_router(
    x: Float[Array, "rows D"],
    gate_up: Weight,
    down: Weight,
    layer: Int[Array, ""],
    router: Router,
    topk: int,
    shared_down: Weight,
    choose: Callable[[], tuple[Array, Array, Array]],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "rows chosen D"], PartialSums]:
    """Return `fused_moe_with_shared` for the experts with the `topk` largest logits of each row.

    For few rows the kernels of packed experts choose them, too, with the result of `kernels_pallas.topk_softmax`.

    Args:
        x, gate_up, down, layer: as for `fused_moe_unreduced`.
        router: logits of all experts, gate and up of the shared expert, and which rows count.
        topk: experts of a row.
        shared_down: the down projection of the shared expert.
        choose: called where a kernel does not choose; returns weights and ids of the experts, and the hidden units of
            the shared expert.
        implementation: as for `fused_moe_unreduced`; "xla": `choose` is always called, whatever the experts' is.
    """
    joins = isinstance(shared_down, QuantizedTensor | LayerView) and triton.supports(shared_down)
    uses_kernels = resolve_implementation(implementation) == "triton" and _uses_kernel(gate_up, down, None)
    if joins and uses_kernels and _any_packed(gate_up, down) and x.shape[0] and triton.routes(x, gate_up, topk):
        args = (x, gate_up, down, layer, router, topk, shared_down)
        outputs, total = triton.fused_moe_routed(*args, interpret=interpret_kernels())
        return outputs, PartialSums(total[None])
    weights, ids, hidden = choose()
    return fused_moe_with_shared(x, gate_up, down, layer, ids, weights, SharedExpert(hidden, shared_down))


def _any_packed(gate_up: Weight, down: Weight) -> bool:
    return isinstance(gate_up, QuantizedTensor) or isinstance(down, QuantizedTensor)


def _uses_kernel(gate_up: Weight, down: Weight, implementation: str | None) -> bool:
    supported = triton.supports(gate_up) and triton.supports(down)
    if implementation == "triton" and not supported:
        found = ", ".join(f"{type(w).__name__} {list(w.shape)}" for w in (gate_up, down))
        raise ValueError(
            "implementation 'triton' multiplies plain experts and packed experts whose last axis is a multiple of 32; "
            f"found {found}"
        )
    return resolve_implementation(implementation, supported=supported) == "triton"
