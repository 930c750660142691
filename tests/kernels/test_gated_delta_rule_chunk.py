"""`chunk_gated_delta_rule`: prompts against the recurrence in float64, and the parts of the chunked form."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gated_delta_rule import chunk_gated_delta_rule
from kernels_pallas.gated_delta_rule.inputs import DeltaInputs, causal_conv_inputs
from kernels_pallas.gated_delta_rule.reference import CHUNK, chunked_form, pad_to_chunks, solve_tril
from kernels_pallas.gated_delta_rule.shapes import ROWS, SHAPES, DeltaShape, gated_delta_rule_inputs
from kernels_pallas.gated_delta_rule.triton_chunks import supports
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import override_platform
from tests.helpers.gated_delta_rule import (
    LAYER,
    exact_conv_inputs,
    exact_inputs,
    random_args,
    select,
    step_through,
)
from tests.helpers.numerics import assert_close

SMALL = DeltaShape(layers=2, value_heads=4, key_heads=2, key_size=32, value_size=32)
run = jax.jit(chunk_gated_delta_rule, static_argnames=("layer", "dtype", "implementation"))


@pytest.fixture(params=["xla", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Kernels run compiled on a CUDA device and in interpret mode everywhere else."""
    return request.param


def prompt_args(rows: int, shape: DeltaShape = SMALL, dtype: str = "float32", equal_keys: bool = False) -> Any:
    """Two sequences; the second begins with up to seven rows of padding."""
    return random_args(shape, [0, min(7, rows - 1)], [rows, rows], rows, dtype, equal_keys=equal_keys)


def assert_steps_through(args: tuple[Any, ...], implementation: str, dtype: str = "float32") -> None:
    o, after = run(*args, dtype=dtype, implementation=implementation)
    want = step_through(exact_inputs(args), args[2].recurrent[LAYER])
    assert o.dtype == jnp.dtype(dtype) and after.recurrent.dtype == jnp.float32
    valid = np.asarray(args[-1])[..., None, None]  # what rows of padding give means nothing
    assert np.all(np.isfinite(o))
    assert_close(jnp.where(valid, o, 0), np.where(valid, want.o, 0), dtype)
    assert_close(after.recurrent[LAYER], want.states[:, -1], dtype)
    assert np.array_equal(np.float32(after.conv[LAYER]), np.float32(exact_conv_inputs(args)[:, args[-1].shape[1] :]))
    for got, before in zip(after, args[2], strict=True):
        assert np.array_equal(np.float32(got[1 - LAYER]), np.float32(before[1 - LAYER]))


class TestChunkGatedDeltaRule:
    @pytest.mark.parametrize(
        ("rows", "heads"), [(16, (2, 4, 32, 32)), (40, (1, 2, 16, 32)), (130, (2, 4, 32, 16)), (64, (2, 2, 128, 128))]
    )
    @pytest.mark.parametrize("equal_keys", [False, True])
    def test_it_steps_through_the_recurrence(
        self, rows: int, heads: tuple[int, int, int, int], equal_keys: bool, implementation: str
    ) -> None:
        """Whole chunks of three sizes, and rows that are no whole chunks."""
        key_heads, value_heads, key_size, value_size = heads
        shape = DeltaShape(2, value_heads, key_heads, key_size, value_size)
        assert_steps_through(prompt_args(rows, shape, equal_keys=equal_keys), implementation)

    def test_bfloat16(self, implementation: str) -> None:
        assert_steps_through(prompt_args(40, dtype="bfloat16"), implementation, "bfloat16")

    def test_a_sequence_of_padding_keeps_every_bit(self, implementation: str) -> None:
        args = random_args(SMALL, [64, 0], [64, 64], 64)
        _, after = run(*args, dtype="float32", implementation=implementation)
        state = args[2]
        assert np.array_equal(after.recurrent[:, 0], state.recurrent[:, 0])
        assert np.array_equal(after.conv[:, 0], state.conv[:, 0])
        assert not np.array_equal(after.recurrent[LAYER, 1], state.recurrent[LAYER, 1])

    @pytest.mark.parametrize("first", [16, 23])
    def test_a_prompt_in_two_steps_is_the_prompt_in_one(self, first: int, implementation: str) -> None:
        args = prompt_args(48)
        want_o, want = run(*args, dtype="float32", implementation=implementation)
        o, state = run(*select(args, slice(None), slice(first)), dtype="float32", implementation=implementation)
        projections, weights, _, _, _, valid = select(args, slice(None), slice(first, None))
        rest = projections, weights, state, LAYER, np.zeros(2, np.int32), valid
        more, after = run(*rest, dtype="float32", implementation=implementation)
        is_row = np.asarray(args[-1])[..., None, None]
        both = np.where(is_row, np.concatenate([o, more], axis=1), 0)
        assert_close(both, np.where(is_row, np.asarray(want_o, np.float64), 0), "float32")
        assert_close(after.recurrent, np.asarray(want.recurrent, np.float64), "float32")
        assert np.array_equal(after.conv, want.conv)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_chunks_are_counted_from_the_first_row_of_a_sequence(self, dtype: str, implementation: str) -> None:
        """Calls of 64, 64 and 22 rows, or one of 150, 192 or 217 rows with padding in front: the same bits.

        What a sequence remembers after 64 and 128 rows therefore serves any rows that follow.
        """
        step = partial(run, dtype=dtype, implementation=implementation)
        args = random_args(SMALL, [0, 0], [150, 150], 150, dtype)
        state, outputs = args[2], []
        for rows in (slice(0, 64), slice(64, 128), slice(128, 150)):
            projections, weights, _, layer, pad, valid = select(args, slice(None), rows)
            o, state = step(projections, weights, state, layer, pad, valid)
            outputs.append(o)
        want = np.concatenate([np.asarray(o, np.float32) for o in outputs], axis=1)
        for pads in ([0, 0], [42, 42], [3, 67]):
            got_o, got = step(*behind_padding(args, pads))
            for b, pad in enumerate(pads):
                assert np.array_equal(np.asarray(got_o, np.float32)[b, pad : pad + 150], want[b])
                assert np.array_equal(got.recurrent[:, b], state.recurrent[:, b])
                if pad == max(pads):  # the last inputs of the convolution are those of the last rows of the call
                    assert np.array_equal(np.float32(got.conv[:, b]), np.float32(state.conv[:, b]))


def behind_padding(args: tuple[Any, ...], pads: list[int]) -> tuple[Any, ...]:
    """Return the arguments with `pads[b]` rows of noise, which are padding, in front of sequence b."""
    projections, weights, state, layer, _, valid = args
    batch, rows = valid.shape
    total = rows + max(pads)
    rng = np.random.default_rng(1)

    def move(sums: PartialSums) -> PartialSums:
        parts = np.asarray(sums.parts.astype(jnp.float32)).reshape(len(sums.parts), batch, rows, -1)
        moved = rng.normal(size=(len(parts), batch, total, parts.shape[3])).astype(np.float32)
        for b, pad in enumerate(pads):
            moved[:, b, pad : pad + rows] = parts[:, b]
        return PartialSums(jnp.asarray(moved.reshape(len(parts), batch * total, -1), sums.parts.dtype))

    start = np.array(pads, np.int32)
    place = np.arange(total)
    moved_valid = (place >= start[:, None]) & (place < start[:, None] + rows)
    moved_projections = type(projections)(*map(move, projections))
    return moved_projections, weights, state, layer, jnp.asarray(start), jnp.asarray(moved_valid)


class TestImplementations:
    def test_unsupported_shapes_raise_if_the_kernels_were_asked_for(self) -> None:
        with pytest.raises(
            ValueError, match="chunks of 64 rows of heads of 24 x 32; expected sizes that are powers of"
        ):
            chunk_gated_delta_rule(
                *prompt_args(8, SMALL._replace(key_size=24)), dtype="float32", implementation="triton"
            )

    def test_supported_shapes(self) -> None:
        assert supports(64, 128, 128)
        for chunk, key_size, value_size in ((8, 128, 128), (64, 24, 128), (64, 128, 8)):
            assert not supports(chunk, key_size, value_size)

    @pytest.mark.parametrize(("key_size", "uses_kernels"), [(32, True), (24, False)])
    def test_a_cuda_device_uses_the_kernels_where_they_support_the_shapes(
        self, key_size: int, uses_kernels: bool
    ) -> None:
        args = prompt_args(15, SMALL._replace(key_size=key_size))
        for name, expected in (("cuda", uses_kernels), ("cpu", False)):
            with override_platform(name, (9, 0)):
                program = str(jax.make_jaxpr(partial(chunk_gated_delta_rule, dtype="float32"))(*args))
            assert ("pallas_call" in program) == expected

    @pytest.mark.parametrize("size", ["0.8b", "35b-a3b", "397b-a17b"])
    def test_real_shapes(self, size: str) -> None:
        shape, rows = SHAPES[size], ROWS["prefill"]
        op = partial(chunk_gated_delta_rule, dtype=jnp.bfloat16, implementation="triton")
        args = gated_delta_rule_inputs(shape, rows, jnp.bfloat16)
        o, after = jax.eval_shape(op, *args)
        assert o.shape == (1, rows, shape.value_heads, shape.value_size) and o.dtype == jnp.bfloat16
        assert after == args[2]


def random_inputs(rows: int, ratio: int, seed: int = 0) -> tuple[DeltaInputs, np.ndarray]:
    """Inputs as the layer makes them, memories from one row to hundreds, and a state as large as its updates."""
    rng = np.random.default_rng(seed)
    batch, key_heads, key_size, value_size = 2, 2, 16, 24
    heads = key_heads * ratio

    def unit(*shape: int) -> np.ndarray:
        x = rng.normal(size=shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    memory = np.exp(rng.uniform(np.log(1e-3), np.log(2.0), heads))
    inputs: Any = {
        "q": unit(batch, rows, key_heads, key_size) * np.float32(key_size**-0.5),
        "k": unit(batch, rows, key_heads, key_size),
        "v": rng.normal(size=(batch, rows, heads, value_size)).astype(np.float32),
        "beta": rng.uniform(size=(batch, rows, heads)).astype(np.float32),
        "g": (-memory * rng.uniform(0.2, 2.0, (batch, rows, heads))).astype(np.float32),
    }
    return DeltaInputs(**inputs), rng.normal(size=(batch, heads, key_size, value_size)).astype(np.float32)


def max_error(got: Any, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(np.asarray(got, np.float64) - want).max(initial=0))


class TestChunkedForm:
    """The formula behind "xla", which takes any number of rows and heads of any size."""

    run = staticmethod(jax.jit(chunked_form, static_argnums=2))

    @pytest.mark.parametrize("ratio", [1, 2, 3])
    @pytest.mark.parametrize("rows", [1, 5, 63, 64, 65, 150, 200])
    def test_chunks_are_the_recurrence(self, rows: int, ratio: int) -> None:
        inputs, state = random_inputs(rows, ratio)
        want, padded = step_through(inputs, state), pad_to_chunks(inputs)
        padding = padded.q.shape[1] - rows
        got = self.run(padded, state, CHUNK)
        assert max_error(got.o[:, :rows], want.o) <= 3e-6
        assert max_error(got.delta[:, :rows], want.delta) <= 1e-5
        assert max_error(got.state, want.states[:, -1]) <= 1e-5
        chunks = [
            np.cumsum(np.asarray(padded.g)[:, i : i + CHUNK], 1, np.float64) for i in range(0, rows + padding, CHUNK)
        ]
        assert max_error(got.decay, np.concatenate(chunks, 1)) <= 1e-4

    def test_rows_without_effect_keep_every_bit(self) -> None:
        inputs, state = random_inputs(CHUNK, 2)
        no_effect = inputs._replace(**{name: np.zeros_like(getattr(inputs, name)) for name in ("k", "beta", "g")})
        got = self.run(no_effect, state, CHUNK)
        assert np.array_equal(got.state, state) and not np.any(got.delta)

    @pytest.mark.parametrize("size", [1, 2, 5, 16, 17, 29, 32, 50, 64])
    def test_inverse_of_unit_lower_triangles(self, size: int) -> None:
        n = np.tril(np.random.default_rng(size).normal(size=(2, 3, size, size)) / np.sqrt(size), -1)
        want = np.linalg.inv(np.eye(size) + n)
        got = jax.jit(solve_tril)(n.astype(np.float32))
        assert max_error(got / np.abs(want).max(), want / np.abs(want).max()) <= 2e-6
        assert np.array_equal(np.triu(got, 1), np.zeros_like(want))


def test_convolution_inputs_stand_behind_the_padding() -> None:
    before = np.arange(1.0, 7, dtype=np.float32).reshape(1, 3, 2).repeat(4, axis=0)
    x = np.arange(11.0, 21, dtype=np.float32).reshape(1, 5, 2).repeat(4, axis=0)
    pad = np.array([0, 2, 4, 5])
    valid = np.arange(5) >= pad[:, None]
    qkv = PartialSums(jnp.asarray(x.reshape(1, 20, 2)))
    got = causal_conv_inputs(qkv, jnp.asarray(before), jnp.asarray(pad), jnp.asarray(valid), "float32")
    for b, p in enumerate(pad):
        assert np.array_equal(got[b], np.concatenate([np.zeros((p, 2)), before[b], x[b, p:]]))
