"""Cases of `check_cuda` for kernels that do the work of several ops: they are compiled, and their bits compared with
those of the ops in `tests/kernels`.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp

from kernels_pallas.gated_delta_rule import GatedNorm
from kernels_pallas.gated_delta_rule.shapes import SHAPES as DELTA_SHAPES
from kernels_pallas.gated_delta_rule.shapes import gated_delta_rule_inputs, with_updates
from kernels_pallas.gated_delta_rule.triton import recurrent_gated_delta_rule
from kernels_pallas.grouped_matmul import Router
from kernels_pallas.grouped_matmul.shapes import SHAPES as MOE_SHAPES
from kernels_pallas.grouped_matmul.shapes import fused_moe_inputs
from kernels_pallas.grouped_matmul.triton import fused_moe_routed
from kernels_pallas.packed.formats import abstract_weight
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.topk_softmax.shapes import HIDDEN_PARTS, LOGIT_PARTS
from kernels_pallas.topk_softmax.shapes import SHAPES as ROUTER_SHAPES
from scripts.gpu.cuda_cases import MODEL, Case

QKV_PARTS, GATE_PARTS, BETA_PARTS = 4, 8, 16  # partial sums of a DeltaNet layer's projections with few rows


def fused_cases(rows: int = 5) -> dict[str, Case]:
    """Return a case for each kernel, for so many rows of bfloat16."""
    spec = cast(Any, jax.ShapeDtypeStruct)

    def sums(parts: int, size: int) -> PartialSums:
        return PartialSums(spec((parts, rows, size), jnp.float32))

    def window_case() -> tuple[Any, tuple[Any, ...]]:
        shape = DELTA_SHAPES[MODEL]
        args = gated_delta_rule_inputs(shape, rows, jnp.bfloat16, num_partial_sums=BETA_PARTS)
        projections, *others, pad, _ = with_updates(args)
        projections = projections._replace(qkv=sums(QKV_PARTS, shape.channels))
        z, weight = sums(GATE_PARTS, shape.value_heads * shape.value_size), spec((shape.value_size,), jnp.float32)

        def window(z: PartialSums, weight: jax.Array, *args: Any) -> Any:
            norm = GatedNorm(z, weight, 1e-6, "silu")
            return recurrent_gated_delta_rule(*args, norm=norm, dtype=jnp.bfloat16)

        return jax.jit(window), (z, weight, projections, *others, pad, pad)

    def routed_case() -> tuple[Any, tuple[Any, ...]]:
        shape, sizes = MOE_SHAPES[MODEL], ROUTER_SHAPES[MODEL]
        x, gate_up, down, layer, *_, valid = fused_moe_inputs(shape, rows, "iq4_nl", jnp.bfloat16)
        hidden = sums(HIDDEN_PARTS, sizes.shared_expert_size)
        router = Router(sums(LOGIT_PARTS, sizes.num_experts), hidden, hidden, valid)
        shared = abstract_weight((shape.hidden_size, sizes.shared_expert_size), "iq4_nl")

        def routed(x: Any, gate_up: Any, down: Any, layer: Any, router: Router, shared: Any) -> Any:
            return fused_moe_routed(x, gate_up, down, layer, router, shape.experts_per_token, shared)

        return jax.jit(routed), (x, gate_up, down, layer, router, shared)

    return {"window with its norm decode": window_case, "experts with their choice decode": routed_case}
