"""`fused_moe_with_router`: experts chosen in the launch of gate and up, against the choice in a launch of its own."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import Router, SharedExpert, fused_moe_with_router, fused_moe_with_shared
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import override_platform
from kernels_pallas.topk_softmax import topk_softmax
from tests.helpers.packed_weights import random_weight

EXPERTS, TOPK, HIDDEN, SIZE, SHARED, MOST = 12, 3, 512, 96, 160, 20


@cache
def stacks() -> tuple[Any, Any, Any]:
    shapes = (1, EXPERTS, 2 * SIZE, HIDDEN), (1, EXPERTS, HIDDEN, SIZE), (HIDDEN, SHARED)
    gate_up, down, shared = (random_weight("iq4_nl", shape, seed) for seed, shape in enumerate(shapes))
    return gate_up, down, shared


@pytest.fixture(autouse=True)
def made_outside_of_traces() -> None:
    stacks()


def rows_of(rows: slice) -> tuple[jax.Array, Router]:
    """Rows, and what the router's launch leaves. Every fourth row does not count; row 1 has equal logits."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(MOST, HIDDEN)), jnp.bfloat16)
    logits = rng.normal(size=(4, MOST, EXPERTS)).astype(np.float32)
    logits[:, 1] = np.round(logits[:, 1])
    gate, up = rng.normal(size=(2, 2, MOST, SHARED)).astype(np.float32)
    valid = jnp.asarray(np.arange(MOST) % 4 != 3)[rows]
    of_logits, of_gate, of_up = (PartialSums(jnp.asarray(parts[:, rows])) for parts in (logits, gate, up))
    return x[rows], Router(of_logits, of_gate, of_up, valid)


def chosen(router: Router) -> tuple[jax.Array, jax.Array, jax.Array]:
    return topk_softmax(*router, TOPK, jnp.bfloat16, implementation="triton")[:3]


@jax.jit
def together(x: jax.Array, router: Router) -> tuple[jax.Array, jax.Array]:
    gate_up, down, shared = stacks()
    args = x, gate_up, down, jnp.int32(0), router, TOPK, shared, lambda: chosen(router)
    outputs, total = fused_moe_with_router(*args)
    return outputs, total.sum(jnp.bfloat16).astype(jnp.float32)  # as its reader rounds it


@jax.jit
def apart(x: jax.Array, router: Router) -> tuple[jax.Array, jax.Array]:
    gate_up, down, shared = stacks()
    weights, ids, hidden = chosen(router)
    outputs, total = fused_moe_with_shared(
        x, gate_up, down, jnp.int32(0), ids, weights, SharedExpert(hidden, shared), implementation="triton"
    )
    return outputs, total.sum(jnp.bfloat16).astype(jnp.float32)  # as its reader rounds it


def kernels(fn: Any, *args: Any) -> int:
    return str(jax.make_jaxpr(fn)(*args)).count("pallas_call")


class TestFusedMoeWithRouter:
    @pytest.mark.parametrize("rows", [1, 5, 16, 20])
    def test_it_has_the_bits_of_a_choice_in_a_launch_of_its_own(self, rows: int) -> None:
        """Twenty rows have more assignments than get a block each: then a plan needs all of the experts first."""
        x, router = rows_of(slice(0, rows))
        with override_platform("cuda", (9, 0), interpret=True):
            got, want = together(x, router), apart(x, router)
            launches = kernels(together, x, router), kernels(apart, x, router)
        counts = np.asarray(router.valid)
        np.testing.assert_array_equal(got[0][counts], want[0][counts])
        np.testing.assert_array_equal(got[1], want[1])
        assert launches == (2, 3) if rows <= 16 else launches[0] == launches[1]

    def test_a_row_is_invariant_to_the_batch_bit_for_bit(self) -> None:
        with override_platform("cuda", (9, 0), interpret=True):
            outputs, total = map(np.asarray, together(*rows_of(slice(0, MOST))))
            for rows in (1, 2, 5, 9, 16):
                few = together(*rows_of(slice(0, rows)))
                counts = np.arange(rows) % 4 != 3
                np.testing.assert_array_equal(few[0][counts], outputs[:rows][counts])
                np.testing.assert_array_equal(few[1], total[:rows])

    def test_rows_that_do_not_count_touch_no_other(self) -> None:
        x, router = rows_of(slice(0, 5))
        nan = jnp.where(router.valid[:, None], x, jnp.nan)
        with override_platform("cuda", (9, 0), interpret=True):
            got, want = together(nan, router)[0], together(x, router)[0]
        np.testing.assert_array_equal(got[:3], want[:3])

    def test_where_no_kernel_chooses_it_asks(self) -> None:
        """On a CPU, and where gradients are wanted."""
        x, router = rows_of(slice(0, 5))
        gate_up, down, shared = stacks()

        def calls(**how: Any) -> int:
            seen = []

            def choose() -> Any:
                seen.append(1)
                return chosen(router)

            args = x, gate_up, down, jnp.int32(0), router, TOPK, shared, choose
            jax.eval_shape(lambda: fused_moe_with_router(*args, **how))
            return len(seen)

        assert calls() == 1
        with override_platform("cuda", (9, 0), interpret=True):
            assert calls() == 0 and calls(implementation="xla") == 1
