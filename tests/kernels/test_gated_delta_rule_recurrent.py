"""`recurrent_gated_delta_rule`: one verify window against the recurrence in float64."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.gated_delta_rule import GatedNorm, no_updates, recurrent_gated_delta_rule, replay_updates
from kernels_pallas.gated_delta_rule.shapes import (
    NUM_PARTIAL_SUMS,
    ROWS,
    SHAPES,
    DeltaShape,
    gated_delta_rule_inputs,
    with_updates,
)
from kernels_pallas.gated_delta_rule.triton import DECODE_ROWS, supports
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import override_platform
from kernels_pallas.tile_tables import Entry, GatedDeltaRuleConstants, TileTable, override_table
from mtpjax.presets import PRESETS
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

SMALL = DeltaShape(layers=2, value_heads=4, key_heads=2, key_size=32, value_size=64)
STATIC = ("layer", "dtype", "implementation")
jitted = jax.jit(recurrent_gated_delta_rule, static_argnames=STATIC)
# Where bits count; see `BITS` in `test_gated_delta_rule_updates.py`.
BITS: Any = {"xla_cpu_max_isa": "AVX", "xla_backend_optimization_level": 3}
exact = jax.jit(recurrent_gated_delta_rule, static_argnames=STATIC, compiler_options=BITS)


@pytest.fixture(params=["xla", "triton"], scope="module")
def implementation(request: pytest.FixtureRequest) -> str:
    """Kernels run compiled on a CUDA device and in interpret mode everywhere else."""
    return request.param


def window_args(rows: int, shape: DeltaShape = SMALL, dtype: str = "float32") -> tuple[Any, ...]:
    """Three sequences; the second begins with padding and ends beyond the cache, the third is idle."""
    pad, end = [0, rows // 2, rows], [rows, max(rows - 1, rows // 2), rows]
    return random_args(shape, pad, end, rows, dtype)


def results(
    args: tuple[Any, ...], implementation: str, dtype: str = "float32", op: Any = jitted
) -> tuple[jax.Array, ...]:
    """o, delta, k, log decay and convolution inputs. The memory of all layers, and the updates of others, stay."""
    projections, weights, state, *where, valid = args
    room = no_updates(state, valid.shape[1], pages=2)  # this window gets the second page
    o, after, pending = op(projections, weights, state, room, *where, valid, dtype=dtype, implementation=implementation)
    for got, before in zip(after, state, strict=True):
        assert np.array_equal(np.float32(got), np.float32(before))
    at = LAYERS + LAYER
    assert not any(np.float32(np.delete(stack, at, axis=0)).any() for stack in pending[:4])
    return o, *(stack[at] for stack in (pending.delta, pending.k, pending.decay, pending.conv))


def exact_results(args: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
    inputs = exact_inputs(args)
    want = step_through(inputs, args[2].recurrent[LAYER])
    return want.o, want.delta, np.asarray(inputs.k), np.asarray(inputs.g), exact_conv_inputs(args)


class TestRecurrentGatedDeltaRule:
    @pytest.mark.parametrize(
        ("rows", "shape"),
        [
            (1, SMALL),
            (5, SMALL),
            (9, DeltaShape(layers=2, value_heads=2, key_heads=2, key_size=16, value_size=16)),
            (16, DeltaShape(layers=2, value_heads=3, key_heads=1, key_size=64, value_size=32)),
        ],
    )
    def test_it_steps_through_the_recurrence(self, rows: int, shape: DeltaShape, implementation: str) -> None:
        args = window_args(rows, shape)
        for got, want in zip(results(args, implementation), exact_results(args), strict=True):
            assert_close(got, want, "float32")

    def test_bfloat16_is_rounded_where_the_formula_says(self, implementation: str) -> None:
        args = window_args(5, dtype="bfloat16")
        o, *others, conv = results(args, implementation, "bfloat16")
        assert o.dtype == conv.dtype == jnp.bfloat16 and all(other.dtype == jnp.float32 for other in others)
        for got, want in zip((o, *others, conv), exact_results(args), strict=True):
            assert_close(got, want, "bfloat16")
            off = np.abs(np.float64(got) - want) > (2**-8 if got.dtype == o.dtype else 1e-4) * np.abs(want).max()
            assert off.mean() < 0.02  # where the last bit of a convolution falls the other way

    @given(
        ranges=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted), min_size=3, max_size=3),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=15, deadline=None)
    def test_padding_changes_nothing(self, ranges: list[Sequence[int]], seed: int, implementation: str) -> None:
        """Any rows may be valid. The projections of the other rows do not matter, bit for bit."""
        args = random_args(SMALL, [start for start, _ in ranges], [end for _, end in ranges], 4)
        got = results(args, implementation)
        for one, want in zip(got, exact_results(args), strict=True):
            assert_close(one, want, "float32")
        projections, *others, valid = args
        rng, is_padding = np.random.default_rng(seed), ~valid.reshape(-1, 1)
        noisy = jax.tree.map(lambda x: jnp.where(is_padding, rng.normal(size=x.shape), x).astype(x.dtype), projections)
        again = results((noisy, *others, valid), implementation)
        for one, other in zip(got, again, strict=True):
            assert np.array_equal(one, other)

    @pytest.mark.slow
    def test_a_window_is_invariant_to_later_rows_and_to_the_batch_bit_for_bit(self) -> None:
        """A property of the kernel, which is one program for any number of rows. XLA makes other loops for one row."""
        args = window_args(5)
        *_, whole_conv = whole = results(args, "triton", op=exact)
        for rows in (2, 3):
            first = results(select(args, slice(None), slice(rows)), "triton", op=exact)
            for got, want in zip(first[:-1], whole, strict=False):
                assert np.array_equal(got, want[:, :rows])
        sequence = slice(1, 2)
        for got, want in zip(results(select(args, sequence, slice(None)), "triton", op=exact), whole, strict=True):
            assert np.array_equal(got, want[sequence])
        assert whole_conv.shape[1] == 5 + 3

    @pytest.mark.parametrize("gate", ["silu", "sigmoid"])
    def test_the_outputs_are_normalised_and_gated(self, gate: str, implementation: str) -> None:
        """In the same kernel, two tiles of rows; and rows 0 and 1 have the bits that they have in a window of two."""
        rows, heads, size = 9, SMALL.value_heads, SMALL.value_size
        args, rng = window_args(rows), np.random.default_rng(1)
        z = jnp.asarray(rng.normal(size=(3, 3, rows, heads * size)), jnp.float32)
        weight = jnp.asarray(rng.normal(size=size), jnp.float32)

        def op(*args: Any, **how: Any) -> Any:
            logits = PartialSums(z[:, : args[-1].shape[0], : args[-1].shape[1]].reshape(3, -1, heads * size))
            return recurrent_gated_delta_rule(*args, norm=GatedNorm(logits, weight, 1e-6, gate), **how)

        y = results(args, implementation, op=jax.jit(op, static_argnames=STATIC, compiler_options=BITS))[0]
        o, wide_z = exact_results(args)[0], np.asarray(z, np.float64).sum(0).reshape(3, rows, heads, size)
        activation = (1 if gate == "sigmoid" else wide_z) / (1 + np.exp(-wide_z))
        rms = np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6)
        valid = np.asarray(args[-1])  # outputs of padding are near 0, and their norm magnifies what is left
        assert_close(y[valid], (o / rms * np.asarray(weight, np.float64) * activation)[valid], "float32")
        if implementation == "triton":
            jitted_again = jax.jit(op, static_argnames=STATIC, compiler_options=BITS)
            two = results(select(args, slice(0, 1), slice(2)), implementation, op=jitted_again)[0]
            assert np.array_equal(two, y[:1, :2])
            with override_platform("cuda", (9, 0), interpret=True):
                call = partial(op, dtype="float32")
                assert str(jax.make_jaxpr(call)(*with_updates(args))).count("pallas_call") == 1

    def test_a_window_may_be_longer_than_the_kernel_supports(self) -> None:
        args = window_args(DECODE_ROWS + 60)
        for got, want in zip(results(args, "xla"), exact_results(args), strict=True):
            assert_close(got, want, "float32")


class TestImplementations:
    def test_unsupported_shapes_raise_if_the_kernel_was_asked_for(self) -> None:
        with pytest.raises(ValueError, match="17 rows of heads of 32 x 64; expected at most 16 rows"):
            results(window_args(17), "triton")

    def test_an_unknown_implementation_raises(self) -> None:
        with pytest.raises(ValueError, match="implementation is 'mosaic'"):
            results(window_args(1), "mosaic")

    def test_supported_shapes(self) -> None:
        assert supports(5, 128, 128)
        for rows, key_size, value_size in ((17, 128, 128), (5, 24, 128), (5, 128, 8)):
            assert not supports(rows, key_size, value_size)

    @pytest.mark.parametrize(("rows", "uses_kernel"), [(5, True), (17, False)])
    def test_a_cuda_device_uses_the_kernel_where_it_supports_the_shapes(self, rows: int, uses_kernel: bool) -> None:
        args = with_updates(window_args(rows))
        for name, expected in (("cuda", uses_kernel), ("cpu", False)):
            with override_platform(name, (9, 0)):
                program = str(jax.make_jaxpr(partial(recurrent_gated_delta_rule, dtype="float32"))(*args))
            assert ("pallas_call" in program) == expected

    @pytest.mark.parametrize("columns", [8, 32, 64])
    def test_the_tile_table_has_the_columns_of_a_program(self, columns: int) -> None:
        """Of the window and of the replay; all of a head that has fewer."""
        entry = Entry(GatedDeltaRuleConstants(state_columns=columns), "measured")
        for value_size in (16, 64):
            shape = SMALL._replace(value_size=value_size)
            args = with_updates(gated_delta_rule_inputs(shape, 5, jnp.float32))

            def run(*args: Any) -> Any:
                window = recurrent_gated_delta_rule(*args, dtype=jnp.float32, implementation="triton")
                return window, replay_updates(args[2], args[3], implementation="triton")

            with override_table(TileTable("", "test", {"gated_delta_rule": (entry,)})):
                calls = [each for each in jax.make_jaxpr(run)(*args).eqns if each.primitive.name == "pallas_call"]
            programs = value_size // min(columns, value_size)
            grids = [call.params["grid_mapping"].grid for call in calls]
            assert grids == [(shape.value_heads,), (shape.layers, shape.value_heads, programs)]

    def test_other_columns_change_no_result(self) -> None:
        """Beyond the order of a sum."""
        args = window_args(5)
        for columns in (16, 32):
            entry = Entry(GatedDeltaRuleConstants(state_columns=columns), "measured")
            with override_table(TileTable("", "test", {"gated_delta_rule": (entry,)})):
                op = jax.jit(
                    lambda *args, **options: recurrent_gated_delta_rule(*args, **options), static_argnames=STATIC
                )
                for got, want in zip(results(args, "triton", op=op), exact_results(args), strict=True):
                    assert_close(got, want, "float32")

    @pytest.mark.parametrize("size", SHAPES)
    def test_real_shapes(self, size: str) -> None:
        shape, cfg = SHAPES[size], PRESETS[size]
        assert shape == DeltaShape(
            cfg.linear_layers,
            cfg.linear_v_heads,
            cfg.linear_k_heads,
            cfg.linear_k_dim,
            cfg.linear_v_dim,
            cfg.conv_width,
        )
        assert shape.channels == cfg.conv_channels
        rows, num_partial_sums = ROWS["decode"], NUM_PARTIAL_SUMS["decode"]
        args = with_updates(gated_delta_rule_inputs(shape, rows, jnp.bfloat16, num_partial_sums=num_partial_sums))
        op = partial(recurrent_gated_delta_rule, dtype=jnp.bfloat16, implementation="triton")
        o, state, pending = jax.eval_shape(op, *args)
        assert o.shape == (1, rows, shape.value_heads, shape.value_size)
        assert state == args[2] and pending == args[3]
        assert pending.delta.shape == (2 * shape.layers, *o.shape)
        assert pending.conv.shape == (2 * shape.layers, 1, rows + shape.conv_width - 1, shape.channels)
