"""Attention and the cache update before it: every implementation against float64, and bit for bit in any batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.attention import KV_BLOCK, CosSin, QkvProjections, attention, norm_rope_update_cache
from kernels_pallas.attention.shapes import (
    NUM_PARTIAL_SUMS,
    ROWS,
    SHAPES,
    AttentionShape,
    attention_inputs,
    norm_rope_update_cache_inputs,
)
from kernels_pallas.partial_sums import PartialSums
from kernels_pallas.platform import override_platform
from mtpjax.config import FULL
from mtpjax.model import make_positions
from mtpjax.model.rope import rope_angles
from mtpjax.presets import PRESETS
from scripts.benchmarks.dataflow import arrays
from tests.helpers.attention import exact_attention, first_rows, random_inputs
from tests.helpers.models import numpy_model, tiny_config
from tests.helpers.numerics import as_float64, assert_close

DTYPES = ["float32", "bfloat16"]
EPS = 1e-6
update = jax.jit(norm_rope_update_cache, static_argnames=("eps", "dtype", "implementation"))
attend = jax.jit(attention, static_argnames="implementation")


@pytest.fixture(params=["xla", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Kernels run compiled on a CUDA device and in interpret mode everywhere else."""
    return request.param


class TestNormRopeUpdateCache:
    SHAPE = AttentionShape(layers=2, q_heads=4, kv_heads=2, head_dim=16, rotary_dim=6, kv_len=64, batch=3)
    ROWS = 5
    POSITIONS = np.arange(5) + np.array([[3], [20], [61]])
    VALID = np.array([[False, True, True, True, True], [True] * 5, [True, True, True, False, False]])

    def inputs(self, dtype: str, query_rows: int = ROWS) -> tuple[Any, ...]:
        """Keys and values in four partial sums; queries of the last rows."""
        specs = norm_rope_update_cache_inputs(self.SHAPE, self.ROWS, dtype, num_partial_sums=4)
        projections, k_norm, q_norm, _, cache, *rows = random_inputs(specs, self.POSITIONS, self.VALID)
        first = self.ROWS - query_rows
        q_gate = first_rows(projections.q_gate, 3, slice(None), slice(first, None)) if query_rows else None
        rope = rope_angles(jnp.asarray(self.POSITIONS), self.SHAPE.rotary_dim, 100.0)
        return projections._replace(q_gate=q_gate), k_norm, q_norm, rope, cache, *rows

    def heads(self, sums: PartialSums, norm: Any, dtype: str, rows: slice) -> np.ndarray:
        """Float64 heads `[B, T, heads, H]` of a projection; normalised and rotated if there is a norm weight."""
        x = as_float64(sums.sum(dtype)).reshape(3, -1, sums.parts.shape[-1] // 16, 16)
        if norm is None:
            return x
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * (1 + as_float64(norm))
        half = self.SHAPE.rotary_dim // 2
        angle = self.POSITIONS[:, rows, None, None] * 100.0 ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return np.concatenate([*turned, x[..., 2 * half :]], axis=-1)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("query_rows", [ROWS, 2, 0])
    def test_queries_and_cache(self, query_rows: int, dtype: str, implementation: str) -> None:
        """Queries of all rows, of the last ones and of none; padding, and rows beyond the end of the cache."""
        args = self.inputs(dtype, query_rows)
        projections, k_norm, q_norm, _, cache, *_ = args
        q, after = update(*args, eps=EPS, dtype=dtype, implementation=implementation)
        if query_rows:
            last = slice(self.ROWS - query_rows, None)
            width = projections.q_gate.parts.shape[-1]
            queries = projections.q_gate.parts.reshape(1, -1, 4, 2, 16)[:, :, :, 0].reshape(1, -1, width // 2)
            assert q.dtype == dtype
            assert_close(q, self.heads(PartialSums(queries), q_norm, dtype, last) / 4, dtype)
        else:
            assert q is None
        every = slice(None)
        new = self.heads(projections.k, k_norm, dtype, every), self.heads(projections.v, None, dtype, every)
        for array, before, heads in zip(after, cache, new, strict=True):
            want = as_float64(before)
            for b, t in zip(*self.VALID.nonzero(), strict=True):
                want[1, b, :, self.POSITIONS[b, t]] = heads[b, t]
            assert_close(array, want, dtype)
            changed = (np.asarray(array) != np.asarray(before)).any(axis=(2, 4))  # [layer, sequence, position]
            expected = np.zeros_like(changed)
            expected[1, 0, 4:8] = expected[1, 1, 20:25] = expected[1, 2, 61:] = True
            assert (changed == expected).all()

    def test_a_row_is_invariant_to_the_batch_bit_for_bit(self) -> None:
        projections, k_norm, q_norm, rope, cache, layer, positions, valid = self.inputs("float32")
        how: Any = {"eps": EPS, "dtype": "float32", "implementation": "triton"}
        q, after = update(projections, k_norm, q_norm, rope, cache, layer, positions, valid, **how)
        sequence, rows = slice(1, 2), slice(2, 4)
        alone, alone_after = update(
            QkvProjections(*(first_rows(sums, 3, sequence, rows) for sums in projections)),
            k_norm,
            q_norm,
            CosSin(*(angle[sequence, rows] for angle in rope)),
            tuple(array[:, sequence] for array in cache),
            layer,
            positions[sequence, rows],
            valid[sequence, rows],
            **how,
        )
        assert (np.asarray(alone) == np.asarray(q[sequence, rows])).all()
        for array, whole in zip(alone_after, after, strict=True):
            assert (np.asarray(array)[:, :, :, 22:24] == np.asarray(whole)[:, sequence, :, 22:24]).all()


class TestAttention:
    SHAPE = AttentionShape(layers=2, q_heads=8, kv_heads=2, head_dim=32, kv_len=1280, batch=3)

    def inputs(self, rows: int, dtype: str, shape: AttentionShape = SHAPE) -> tuple[Any, ...]:
        """One long, one short and one idle sequence; the first rows of the short one are padding."""
        positions = np.arange(rows) + np.array([[1200], [100 - rows // 2], [0]])
        valid = np.stack([np.ones(rows, bool), np.arange(rows) >= rows // 2, np.zeros(rows, bool)])
        q, *rest = random_inputs(attention_inputs(shape, rows, dtype), positions, valid, seed=rows)
        return (q * shape.head_dim**-0.5).astype(dtype), *rest

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 5, 40])
    def test_the_softmax_over_the_cache(self, rows: int, dtype: str, implementation: str) -> None:
        args = self.inputs(rows, dtype)
        got = attend(*args, implementation=implementation)
        assert got.dtype == dtype
        assert_close(got, exact_attention(args), dtype)
        assert not np.asarray(got[2]).any()  # an idle sequence

    @pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
    def test_lengths_on_both_sides_of_every_block_border(
        self, q_heads: int, kv_heads: int, implementation: str
    ) -> None:
        """In one batch; large numbers after each sequence's end must not be seen."""
        kv_len, rows = 3 * KV_BLOCK, 5
        ends = [0, 1, 7, KV_BLOCK - 4, KV_BLOCK - 3, KV_BLOCK - 1, KV_BLOCK, KV_BLOCK + 1, 2 * KV_BLOCK - 2, kv_len - 5]
        pads = np.array([0, 1, 5, 0, 2, 0, 5, 0, 3, 0])
        shape = AttentionShape(2, q_heads, kv_heads, head_dim=16, kv_len=kv_len, batch=len(ends))
        positions = np.array(ends)[:, None] - pads[:, None] + np.arange(rows)
        valid = np.arange(rows) >= pads[:, None]
        q, keys, values, *rest = random_inputs(attention_inputs(shape, rows, "float32"), positions, valid)
        beyond = np.arange(kv_len) > np.max(np.where(valid, positions, -1), axis=1)[:, None]
        keys, values = (jnp.where(beyond[None, :, None, :, None], 1e4, array) for array in (keys, values))
        args = (q / 2, keys, values, *rest)
        got = np.asarray(attend(*args, implementation=implementation))
        assert np.abs(got - exact_attention(args)).max() <= 3e-6

    def test_longer_neighbours_change_no_bit(self, implementation: str) -> None:
        """Blocks in which a row sees no key are passed over exactly."""
        q, keys, values, layer, positions, valid, gates = self.inputs(5, "float32")
        beside = attend(q, keys, values, layer, positions, valid, gates, implementation=implementation)
        shorter = positions.at[0].add(-1190)
        short = attend(q, keys, values, layer, shorter, valid, gates, implementation=implementation)
        assert np.array_equal(beside[1:], short[1:]) and not np.array_equal(beside[0], short[0])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_is_invariant_to_the_batch_bit_for_bit(self, dtype: str) -> None:
        """A row of a window of five alone in its window, and without the other sequences."""
        q, keys, values, layer, positions, valid, gates = self.inputs(5, dtype)
        got = attend(q, keys, values, layer, positions, valid, gates, implementation="triton")
        for row in (0, 4):
            only = np.s_[:, row : row + 1]
            its_gates = first_rows(gates, 3, slice(None), slice(row, row + 1))
            alone = attend(
                q[only], keys, values, layer, positions[only], valid[only], its_gates, implementation="triton"
            )
            assert (np.asarray(alone) == np.asarray(got[only])).all()
        its_gates = first_rows(gates, 3, slice(1), slice(None))
        first = attend(
            q[:1], keys[:, :1], values[:, :1], layer, positions[:1], valid[:1], its_gates, implementation="triton"
        )
        assert (np.asarray(first) == np.asarray(got[:1])).all()

    def test_a_static_number_of_blocks_makes_it_differentiable(self) -> None:
        """Inside a jitted function, too. The gradient is that of a softmax over the whole cache."""
        q, keys, values, layer, positions, _, gates = self.inputs(5, "float32")
        valid = jnp.ones(positions.shape, bool)

        def loss(q: Any, keys: Any, values: Any) -> Any:
            out = attention(q, keys, values, layer, positions, valid, gates, num_kv_blocks=5, implementation="xla")
            return jnp.sum(jnp.sin(out))

        def plain_loss(q: Any, keys: Any, values: Any) -> Any:
            k, v = (jnp.repeat(x[layer], 4, axis=1) for x in (keys, values))
            mask = jnp.arange(keys.shape[3]) <= positions[:, None, :, None]
            score = jnp.where(mask, jnp.einsum("bthd,bhsd->bhts", q, k), -jnp.inf)
            gate = jax.nn.sigmoid(gates.sum(q.dtype).reshape(*q.shape[:3], 2, -1)[..., 1, :])
            return jnp.sum(jnp.sin(gate * jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(score), v)))

        got = jax.jit(jax.grad(jax.jit(loss), (0, 1, 2)))(q, keys, values)
        want = jax.jit(jax.grad(plain_loss, (0, 1, 2)))(q, keys, values)
        for gradient, plain in zip(got, want, strict=True):
            assert np.asarray(plain).any()
            assert_close(gradient, as_float64(plain), "float32")

    def test_memory_grows_with_rows_times_a_block_and_never_with_rows_times_the_context(self) -> None:
        shape, rows = AttentionShape(2, 4, 2, head_dim=16, kv_len=12 * KV_BLOCK), 48
        specs = attention_inputs(shape, rows, "float32")

        def plain(q: Any, keys: Any, values: Any, layer: Any, positions: Any, valid: Any, gates: Any) -> Any:
            k, v = (jnp.repeat(x[1], 2, axis=1) for x in (keys, values))
            score = jnp.einsum("bthd,bhsd->bhts", q, k)
            seen = jnp.arange(shape.kv_len) <= positions[:, None, :, None]
            return jnp.einsum("bhts,bhsd->bthd", jax.nn.softmax(jnp.where(seen, score, -jnp.inf)), v)

        def large_arrays(fn: Any) -> list[Any]:
            program = jax.make_jaxpr(fn)(*specs)
            return [a for a in arrays(program) if a.size >= rows * shape.kv_len and a.shape != specs[1].shape]

        assert large_arrays(plain)
        assert not large_arrays(lambda *args: attention(*args, implementation="xla"))

    def test_heads_of_the_published_size(self, implementation: str) -> None:
        """The heads of the 35B-A3B, with a short cache."""
        shape = SHAPES["35b-a3b"]._replace(layers=1, kv_len=1280, batch=3)
        args = self.inputs(ROWS["decode"], "bfloat16", shape)
        assert_close(attend(*args, implementation=implementation), exact_attention(args), "bfloat16")


def test_the_platform_and_the_shapes_decide_which_implementation_is_traced() -> None:
    def program(head_dim: int, kv_len: int, **how: Any) -> int:
        """Kernels in the program of both ops: one of the cache update, two of the attention of few rows."""
        shape = AttentionShape(1, 2, 1, head_dim, rotary_dim=4, kv_len=kv_len)
        inputs, update_inputs = (
            attention_inputs(shape, 5, "float32"),
            norm_rope_update_cache_inputs(shape, 5, "float32"),
        )

        def both_ops(inputs: Any, update_inputs: Any) -> Any:
            return attention(*inputs, **how), norm_rope_update_cache(*update_inputs, eps=EPS, dtype="float32", **how)

        return str(jax.make_jaxpr(both_ops)(inputs, update_inputs)).count("pallas_call")

    with override_platform("cpu"):
        assert program(256, 512) == 0 and program(256, 512, implementation="triton") == 3
    with override_platform("cuda", interpret=True):
        assert program(256, 512) == 3 and program(256, 512, implementation="xla") == 0
        assert program(24, 512) == program(256, 500) == program(8, 512) == 0
        with pytest.raises(ValueError, match="head size 24 must be a power of two .* length 100 a multiple of 64"):
            program(24, 100, implementation="triton")
        with pytest.raises(ValueError, match="implementation is 'cuda'; expected one of"):
            program(256, 512, implementation="cuda")


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_has_the_shapes_of_the_published_models(name: str, implementation: str) -> None:
    shape, cfg = SHAPES[name], PRESETS[name]
    assert shape[:5] == (cfg.full_layers, cfg.q_heads, cfg.kv_heads, cfg.head_dim, cfg.rotary_dim)
    for regime, rows in ROWS.items():
        args = attention_inputs(shape, rows, jnp.bfloat16)
        out = jax.eval_shape(lambda *args: attention(*args, implementation=implementation), *args)
        assert out.shape == args[0].shape and out.dtype == jnp.bfloat16
        args = norm_rope_update_cache_inputs(shape, rows, jnp.bfloat16, num_partial_sums=NUM_PARTIAL_SUMS[regime])
        q, cache = jax.eval_shape(
            lambda *args: norm_rope_update_cache(*args, eps=EPS, dtype=jnp.bfloat16, implementation=implementation),
            *args,
        )
        assert q.shape == (1, rows, cfg.q_heads, cfg.head_dim) and q.dtype == jnp.bfloat16
        assert [(a.shape, a.dtype) for a in cache] == [(a.shape, a.dtype) for a in args[4]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_output_rows", [6, 2, 0])
def test_a_layer_of_the_model_gives_the_same_with_both_implementations(num_output_rows: int, dtype: str) -> None:
    """Queries of all rows, of the last ones and of none; padding, an idle sequence, and rows beyond the cache."""
    kv_len, rows = 256, 6
    cfg = tiny_config(moe=False, head_dim=16, rotary_dim=4, q_heads=4, kv_heads=2, layer_pattern=(FULL,), num_layers=1)
    model = numpy_model(cfg, seed=3, scale=0.3)
    graph, weights = nnx.split(nnx.merge(model.graph, model.params).decoder.blocks[0].layers[0].mixer)
    layer = nnx.merge(graph, jax.tree.map(lambda w: w[0], weights))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, rows, cfg.hidden_size)), dtype)
    cache = tuple(jnp.asarray(rng.normal(size=(2, 3, 2, kv_len, 16)), dtype) for _ in range(2))

    def run(implementation: str) -> Any:
        start, pad = jnp.array([40, kv_len - 3, 0]), jnp.array([0, 1, rows])
        positions = make_positions(cfg, start, rows, pad, kv_len=kv_len, implementation=implementation)
        return jax.jit(lambda x, cache: layer(x, cache, 1, positions, num_output_rows))(x, cache)

    (plain, plain_cache), (got, got_cache) = run("xla"), run("triton")
    assert got.parts.shape == (1, 3 * num_output_rows, cfg.hidden_size)
    for one, other in zip((got.parts, *got_cache), (plain.parts, *plain_cache), strict=True):
        if one.size:
            assert_close(one, np.asarray(other, np.float64), dtype)
    for after, before in zip(got_cache, cache, strict=True):
        changed = (np.asarray(after) != np.asarray(before)).any(axis=(2, 4))  # [layer, sequence, position]
        want = np.zeros_like(changed)
        want[1, 0, 40 : 40 + rows] = want[1, 1, kv_len - 3 :] = True
        assert (changed == want).all()
