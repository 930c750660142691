"""Verify windows one after the other: what is accepted of each enters the memory, by the next window or by a replay."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gated_delta_rule import (
    DeltaState,
    PendingDeltaUpdates,
    accept_updates,
    no_updates,
    recurrent_gated_delta_rule,
    replay_updates,
    updates_between_windows,
)
from kernels_pallas.gated_delta_rule.shapes import DeltaShape
from kernels_pallas.platform import override_platform
from tests.helpers.gated_delta_rule import (
    LAYER,
    LAYERS,
    exact_conv_inputs,
    exact_inputs,
    random_args,
    select,
    step_through,
)
from tests.helpers.numerics import assert_close

STATIC = ("layer", "dtype", "implementation")
run = jax.jit(recurrent_gated_delta_rule, static_argnames=STATIC)
# Where bits count: LLVM merges products and additions as it comes, but not for a processor without that instruction; at
# the tests' usual level 0 it also orders sums as it comes.
BITS: Any = {"compiler_options": {"xla_cpu_max_isa": "AVX", "xla_backend_optimization_level": 3}}
run_bits = jax.jit(recurrent_gated_delta_rule, static_argnames=STATIC, **BITS)


@pytest.fixture(params=["xla", "triton"], scope="module")
def implementation(request: pytest.FixtureRequest) -> str:
    """Kernels run compiled on a CUDA device and in interpret mode everywhere else."""
    return request.param


class Window(NamedTuple):
    """Arguments of a window that follows others: all but the memory and the updates; and how many rows count."""

    projections: Any
    pad: Any
    valid: Any
    accepted: np.ndarray


def shape_of(ratio: int) -> DeltaShape:
    return DeltaShape(layers=LAYERS, value_heads=2 * ratio, key_heads=2, key_size=16, value_size=32)


def windows_of(counts: np.ndarray, rows: int, shape: DeltaShape) -> tuple[Any, DeltaState, list[Window]]:
    """Return weights, the first memory, and windows of which `counts[i, b]` rows count. -1: the window is idle."""
    windows = []
    for number, accepted in enumerate(counts):
        pad = np.where(accepted < 0, rows, 0)
        args = random_args(shape, pad.tolist(), [rows] * len(pad), rows)
        shifted = jax.tree.map(lambda x, by=number: x.at[...].set(np.roll(x, 7 * by + 1, axis=-1)), args[0])
        windows.append(Window(shifted, args[4], args[5], np.maximum(accepted, 0).astype(np.int32)))
    return args[1], args[2], windows


def exact_walk(weights: Any, state: DeltaState, windows: list[Window]) -> tuple[list[np.ndarray], Any]:
    """Return o of each window and the memory of layer `LAYER` after all accepted rows, in float64."""
    conv, recurrent = (np.array(x, np.float64) for x in state)
    exact: Any = DeltaState
    outputs = []
    for window in windows:
        args = window.projections, weights, exact(conv, recurrent), LAYER, window.pad, window.valid
        inputs, want = exact_conv_inputs(args), step_through(exact_inputs(args), recurrent[LAYER])
        outputs.append(want.o)
        for b, n in enumerate(window.accepted):
            if n:
                conv[LAYER, b] = inputs[b, n : n + conv.shape[2]]
                recurrent[LAYER, b] = want.states[b, n]
    return outputs, exact(conv[LAYER], recurrent[LAYER])


def walk(
    weights: Any,
    state: DeltaState,
    windows: list[Window],
    implementation: str,
    *,
    op: Any = run,
    pages: int = 2,
    replay_each: bool = False,
) -> tuple[list[jax.Array], DeltaState]:
    """Run the windows as a loop does; return each o and the memory of the layer after them.

    `replay_each`: replay the accepted rows after each window, not only after the last one.
    """
    rows, outputs = windows[0].valid.shape[1], []
    replay = jax.jit(partial(replay_updates, implementation=implementation), **(BITS if op is run_bits else {}))
    pending: PendingDeltaUpdates | None = None
    for window in windows:
        pending = no_updates(state, rows, pages=pages) if pending is None else pending
        o, state, pending = op(
            window.projections,
            weights,
            state,
            pending,
            LAYER,
            window.pad,
            window.valid,
            dtype="float32",
            implementation=implementation,
        )
        state, pending = accept_updates(state, pending, jnp.asarray(window.accepted))
        outputs.append(o)
        if replay_each:
            state, pending = replay(state, pending), None
    return outputs, DeltaState(*(x[LAYER] for x in replay(state, pending)))


COUNTS = np.array([[0, 5, 3, 1, -1], [4, 1, -1, 5, 2], [2, -1, 5, 3, 1], [5, -1, 1, 2, 4]])


class TestWindowsInTurn:
    @pytest.mark.parametrize(("ratio", "batch", "pages"), [(1, 5, 2), (2, 2, 2), (3, 1, 2), (2, 5, 1)])
    def test_each_window_follows_the_accepted_rows_of_those_before(
        self, ratio: int, batch: int, pages: int, implementation: str
    ) -> None:
        """Every count 0...W, idle sequences in between, and sequences that are idle from some window on."""
        weights, state, windows = windows_of(COUNTS[:, :batch], 5, shape_of(ratio))
        outputs, after = walk(weights, state, windows, implementation, pages=pages)
        wanted, want = exact_walk(weights, state, windows)
        for window, got, exact in zip(windows, outputs, wanted, strict=True):
            valid = np.asarray(window.valid)
            assert_close(got[valid], exact[valid], "float32")
        assert_close(after.recurrent, want.recurrent, "float32")
        assert_close(after.conv, want.conv, "float32")

    def test_windows_of_one_row(self, implementation: str) -> None:
        """As the loop decodes without drafts: a sequence takes part, pauses, and goes on."""
        weights, state, windows = windows_of(np.array([[1, 1], [1, -1], [-1, 1], [1, 0]]), 1, shape_of(2))
        outputs, after = walk(weights, state, windows, implementation)
        wanted, want = exact_walk(weights, state, windows)
        assert_close(outputs[2][1], wanted[2][1], "float32")
        assert_close(outputs[3][0], wanted[3][0], "float32")
        assert_close(after.recurrent, want.recurrent, "float32")

    def test_a_sequence_of_which_nothing_is_accepted_keeps_every_bit(self, implementation: str) -> None:
        counts = np.array([[3, -1, 0], [5, -1, 0], [1, -1, 0]])
        weights, state, windows = windows_of(counts, 5, shape_of(2))
        _, after = walk(weights, state, windows, implementation)
        for got, before in zip(after, state, strict=True):
            assert np.array_equal(got[1:], before[LAYER, 1:]) and not np.array_equal(got[0], before[LAYER, 0])


class TestBits:
    """Of the kernels. XLA makes another loop for every number of rows."""

    def test_a_replay_after_each_window_is_what_the_next_window_does(self) -> None:
        weights, state, windows = windows_of(COUNTS, 5, shape_of(2))
        results = [
            walk(weights, state, windows, "triton", op=run_bits, replay_each=replay_each)
            for replay_each in (False, True)
        ]
        for a, b in zip(*map(jax.tree.leaves, results), strict=True):
            assert np.array_equal(a, b)

    def test_a_text_in_windows_of_one_row_has_the_memory_and_outputs_of_one_in_windows_of_five(self) -> None:
        """So bits do not depend on the number of drafts."""
        weights, state, windows = windows_of(np.array([[5, 5], [2, 2], [5, 5]]), 5, shape_of(3))
        whole, after = walk(weights, state, windows, "triton", op=run_bits)
        single = []
        for window in windows:
            for t in range(window.accepted[0]):
                args = window.projections, weights, state, LAYER, window.pad, window.valid
                one = select(args, slice(None), slice(t, t + 1))
                single.append(Window(one[0], one[4], one[5], np.ones(2, np.int32)))
        outputs, after_single = walk(weights, state, single, "triton", op=run_bits)
        rows = [o[:, : w.accepted[0]] for o, w in zip(whole, windows, strict=True)]
        assert np.array_equal(np.concatenate(outputs, axis=1), np.concatenate(rows, axis=1))
        for a, b in zip(after, after_single, strict=True):
            assert np.array_equal(a, b)


class TestWhereUpdatesWait:
    def test_on_a_cpu_they_do_not(self) -> None:
        _, state, _ = windows_of(np.array([[1]]), 1, shape_of(1))
        with override_platform("cpu"):
            assert updates_between_windows(state, 5) is None
            assert updates_between_windows(state, 5, implementation="triton") is not None
        with override_platform("cuda", (9, 0)):
            pending = updates_between_windows(state, 5)
            assert pending is not None and pending.delta.shape == (2 * LAYERS, 1, 5, 2, 32)

    def test_a_replay_of_nothing(self) -> None:
        _, state, _ = windows_of(np.array([[1]]), 1, shape_of(1))
        assert replay_updates(state, None) is state

    def test_unsupported_shapes_raise_if_the_kernel_was_asked_for(self) -> None:
        _, state, _ = windows_of(np.array([[1]]), 1, shape_of(1))
        with pytest.raises(ValueError, match="17 rows of heads of 16 x 32; expected at most 16 rows"):
            replay_updates(state, no_updates(state, 17, pages=2), implementation="triton")
