"""`fused_moe`: every implementation against the chosen experts row by row in float64."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import (
    SharedExpert,
    combine_experts,
    fused_moe,
    fused_moe_unreduced,
    fused_moe_with_shared,
)
from kernels_pallas.grouped_matmul.reference import DENSE_MOE_ROWS
from kernels_pallas.grouped_matmul.shapes import ROWS, SHAPES, fused_moe_inputs
from kernels_pallas.grouped_matmul.triton_tiling import choose_tiling, num_parts
from kernels_pallas.matmul import linears_split_k
from kernels_pallas.matmul.tiling import OUT_TILE, Operands
from kernels_pallas.packed.formats import FORMATS
from kernels_pallas.packed.layout import pack_operands
from kernels_pallas.platform import DEVICE_KINDS, SHARED_KIB, override_platform
from kernels_pallas.row_tiles import only_proved_row_tiles
from kernels_pallas.tile_tables import Entry, ExpertsConstants, TileTable, override_table, tile_constants
from kernels_pallas.weights import FusedExperts, LayerView, QuantizedTensor, TransposedWeight
from mtpjax.presets import PRESETS
from tests.helpers.models import cpu_only
from tests.helpers.numerics import assert_close
from tests.helpers.packed_weights import dense, random_weight, rounded

LAYERS, EXPERTS, TOPK, HIDDEN, SIZE = 2, 6, 3, 160, 96
run = jax.jit(fused_moe, static_argnames="implementation")


@pytest.fixture(params=["xla", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Kernels run compiled on a CUDA device and in interpret mode everywhere else."""
    return request.param


@cache
def experts(name: str) -> tuple[Any, Any]:
    """Make the two stacks in a storage format; no size is a multiple of a tile unless the format demands it."""
    hidden, size = HIDDEN, SIZE
    if name != "plain" and (FORMATS[name].group == 128 or FORMATS[name].super_group):
        hidden = size = 256
    gate_up = random_weight(name, (LAYERS, EXPERTS, 2 * size, hidden))
    down = random_weight(name, (LAYERS, EXPERTS, hidden, size), 1)
    return (gate_up / 10, down / 10) if name == "plain" else (gate_up, down)


class Routing(NamedTuple):
    """The experts of rows, their weights, and which rows are valid."""

    topk_ids: np.ndarray
    topk_weights: np.ndarray
    valid: np.ndarray


def route(rows: int, seed: int = 0) -> Routing:
    rng = np.random.default_rng(seed)
    topk_ids = np.argsort(rng.random((rows, EXPERTS)), axis=1)[:, :TOPK].astype(np.int32)
    return Routing(topk_ids, rng.dirichlet(np.ones(TOPK), rows).astype(np.float32), rng.random(rows) < 0.8)


def inputs(rows: int, size: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, size)) / 30, dtype)


def expected(x: Any, name: str, layer: int, routing: Routing, dtype: str) -> np.ndarray:
    """Compute row by row in float64; only hidden units are rounded, as the implementations do."""
    gate_up, down = (dense(w, dtype)[layer] for w in experts(name))
    x = rounded(x, dtype)
    out = np.zeros(x.shape)
    for row, k in np.ndindex(*routing.topk_ids.shape):
        expert = routing.topk_ids[row, k]
        gate, up = np.split(gate_up[expert] @ x[row], 2)
        out[row] += routing.topk_weights[row, k] * (down[expert] @ rounded(gate / (1 + np.exp(-gate)) * up, dtype))
    return out * routing.valid[:, None]


def experts_table(**constants: int) -> TileTable:
    """Return a tile table with one entry for all experts."""
    return TileTable("", "test", {"experts": (Entry(ExpertsConstants(**constants), "measured"),)})


def check(name: str, routing: Routing, dtype: str, implementation: str, layer: int = 1) -> None:
    gate_up, down = experts(name)
    x = inputs(len(routing.valid), gate_up.shape[-1], dtype)
    got = run(x, gate_up, down, np.int32(layer), *routing, implementation=implementation)
    assert got.dtype == dtype and not np.asarray(got)[~routing.valid].any()
    assert_close(got, expected(x, name, layer, routing, dtype), dtype)


class TestFusedMoe:
    @pytest.mark.parametrize("name", ["plain", "iq4_nl"])
    @pytest.mark.parametrize(
        ("rows", "dtype"), [(1, "float32"), (3, "bfloat16"), (17, "float32"), (64, "bfloat16"), (257, "float32")]
    )
    def test_any_number_of_rows(self, name: str, rows: int, dtype: str, implementation: str) -> None:
        check(name, route(rows), dtype, implementation, layer=rows % LAYERS)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", ["int4 g128", "int4 g16", "q4_k", "q5_k", "q6_k", "q8_0"])
    def test_storage_formats(self, name: str, dtype: str, implementation: str) -> None:
        check(name, route(17), dtype, implementation)

    def test_uneven_routing_drops_no_row(self, implementation: str) -> None:
        """Far beyond any capacity that an even share would give; some experts have no row, some have one."""
        rows, valid = 65, np.ones(65, bool)
        topk_ids, topk_weights, _ = route(rows)
        same = np.broadcast_to(np.array([3, 4, 5], np.int32), topk_ids.shape)
        one_for_all = np.where(np.arange(TOPK) == 0, 5, np.array([0, 1, 2])).astype(np.int32)
        lonely = np.broadcast_to(np.array([1, 2, 3], np.int32), topk_ids.shape).copy()
        lonely[-1] = (0, 4, 5)
        for ids in (same, np.broadcast_to(one_for_all, topk_ids.shape), lonely):
            check("plain", Routing(ids, topk_weights, valid), "float32", implementation)

    @pytest.mark.parametrize("rows", [5, 257])
    def test_rows_without_experts_touch_no_other(self, rows: int, implementation: str) -> None:
        topk_ids, topk_weights, _ = route(rows)
        valid = np.arange(rows) % 3 != 1
        x, stacks = inputs(rows, HIDDEN), (*experts("plain"), np.int32(1))
        op = partial(run, implementation=implementation)
        got = op(x, *stacks, topk_ids, topk_weights, valid)
        poisoned = jnp.where(valid[:, None], x, jnp.nan)
        np.testing.assert_array_equal(op(poisoned, *stacks, topk_ids, topk_weights, valid), got)
        by_id = np.where(valid[:, None], topk_ids, EXPERTS)
        np.testing.assert_array_equal(op(x, *stacks, by_id, topk_weights), got)
        assert not np.asarray(op(x, *stacks, topk_ids, topk_weights, np.zeros(rows, bool))).any()

    def test_a_row_does_not_depend_on_the_order_of_the_others(self, implementation: str) -> None:
        """Bit for bit."""
        x, routing, order = inputs(65, HIDDEN), route(65), np.random.default_rng(2).permutation(65)
        op = partial(run, implementation=implementation)
        a = np.asarray(op(x, *experts("plain"), np.int32(0), *routing))
        b = op(x[order], *experts("plain"), np.int32(0), *(field[order] for field in routing))
        np.testing.assert_array_equal(a[order], b)

    @pytest.mark.parametrize("name", ["plain", "iq4_nl"])
    def test_the_unreduced_outputs_add_up_to_it(self, name: str, implementation: str) -> None:
        topk_ids, topk_weights, valid = route(5)
        args = (inputs(5, HIDDEN), *experts(name), np.int32(1), topk_ids, topk_weights, valid)
        outputs = jax.jit(partial(fused_moe_unreduced, implementation=implementation))(*args)
        assert outputs.shape[1] == (TOPK if (name, implementation) == ("iq4_nl", "triton") else 1)
        got = combine_experts(outputs, jnp.asarray(valid), jnp.float32)
        np.testing.assert_array_equal(got, run(*args, implementation=implementation))


class TestKernel:
    """What the kernel promises beyond the op."""

    run = staticmethod(partial(run, implementation="triton"))

    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_a_row_is_invariant_to_the_batch_bit_for_bit(self, parts: int) -> None:
        """A block for each assignment, blocks of 32 and of 64 rows, other neighbours, another place among the rows.

        Sums of eight and three steps, before their rounding to bfloat16, which hides most changes of order.
        """
        experts, topk, hidden, size = 4, 2, 512, 192
        gate_up = random_weight("plain", (1, experts, 2 * size, hidden)).astype(jnp.bfloat16)
        down = random_weight("plain", (1, experts, hidden, size), 1).astype(jnp.bfloat16)
        rng = np.random.default_rng(0)
        topk_ids = np.argsort(rng.random((130, experts)), axis=1)[:, :topk].astype(np.int32)
        topk_weights = rng.dirichlet(np.ones(topk), 130).astype(np.float32)
        x = inputs(130, hidden, "bfloat16")

        op = jax.jit(lambda *args: fused_moe_unreduced(*args, implementation="triton"))  # traced for each table

        def of(rows: Any) -> np.ndarray:
            outputs = op(x[rows], gate_up, down, np.int32(0), topk_ids[rows], topk_weights[rows])
            assert outputs.dtype == jnp.float32
            return np.asarray(outputs)

        with override_table(experts_table(gate_up_parts=parts)):
            few = of(slice(0, 21))
            assert all((of(slice(0, rows))[:21] == few).all() for rows in (64, 130))
            assert (of(slice(0, 1)) == few[:1]).all()
            assert (of(np.arange(130)[::-1])[:-22:-1] == few).all()

    @pytest.mark.parametrize("rows", [1, 5, 8, 9])
    def test_the_shared_expert_has_the_bits_of_its_own_product(self, rows: int) -> None:
        """In the launch of the routed experts where all rows fit a block of eight, or in its own launch; two layers."""
        topk_ids, topk_weights, _ = route(rows)
        hidden = inputs(rows, 512, "bfloat16")
        shared = random_weight("iq4_nl", (LAYERS, 256, 512), 5)
        stacks, choice = experts("q4_k"), map(jnp.asarray, (topk_ids, topk_weights))
        args: tuple[Any, ...] = (inputs(rows, 256, "bfloat16"), *stacks, jnp.int32(1), *choice)
        op: Any = partial(fused_moe_with_shared, implementation="triton")

        def together(layer: jax.Array) -> Any:
            return op(*args, SharedExpert(hidden, LayerView(shared, layer)))

        outputs = jax.jit(partial(fused_moe_unreduced, implementation="triton"))(*args)
        for layer in range(LAYERS):
            got, total = jax.jit(together)(np.int32(layer))
            [expected] = linears_split_k(hidden, LayerView(shared, jnp.int32(layer)), implementation="triton")
            assert expected.parts.shape[0] > 1
            np.testing.assert_array_equal(got, outputs)
            np.testing.assert_array_equal(total.sum(jnp.float32), expected.sum(jnp.float32))
        kernels = str(jax.make_jaxpr(together)(np.int32(0))).count("pallas_call")
        assert kernels == (2 if rows <= 8 else 3)

    @pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
    def test_blocks_of_several_products_give_the_same(self, capability: tuple[int, int]) -> None:
        """The strict mode keeps one shape of the tensor cores, whose rows are those of a single assignment's block."""
        topk_ids, topk_weights, valid = route(257)
        args = (inputs(257, 256, "bfloat16"), *experts("q4_k"), np.int32(1), topk_ids, topk_weights, valid)
        with override_platform("cuda", capability, interpret=True):
            usual = jax.jit(partial(fused_moe, implementation="triton"))(*args)
            with only_proved_row_tiles():
                strict = jax.jit(lambda *args: fused_moe(*args, implementation="triton"))(*args)
                tiling = choose_tiling(257, TOPK, EXPERTS, 8, jnp.bfloat16, ExpertsConstants())
        assert tiling.block_size == (128 if capability >= (9, 0) else 64)
        assert tiling.product_rows == (16 if capability >= (9, 0) else 64)
        np.testing.assert_array_equal(strict, usual)

    def test_parts_follow_the_shape_of_the_weight_alone(self) -> None:
        """Two for the 35B-A3B and one for larger experts on every card; two steps a part at least."""
        for kind in DEVICE_KINDS:
            with override_platform("cuda", device_kind=kind):
                small, large = (tile_constants("experts", *shape) for shape in ((1024, 2048), (2048, 3072)))
            assert (small.gate_up_parts, large.gate_up_parts) == (2, 1)
        assert [num_parts(steps, ExpertsConstants(gate_up_parts=8)) for steps in (16, 15, 4, 3, 1)] == [8, 4, 2, 1, 1]
        tilings = [choose_tiling(rows, 8, 256, 16, jnp.bfloat16, small) for rows in (1, 5, 9, 64, 320, 2048)]
        assert {tiling.parts for tiling in tilings} == {2}
        assert [tiling.sorted for tiling in tilings] == [False, False, True, True, True, True]
        assert [tiling.write_partials for tiling in tilings] == [True, True, False, False, False, False]

    def test_the_tile_table_decides(self) -> None:
        """Parts, blocks and stages of a call are those of the table, within the limits of the card."""
        gate_up = random_weight("iq4_nl", (1, EXPERTS, 128, 512))
        down = random_weight("iq4_nl", (1, EXPERTS, 512, 64), 1)

        def kernels(rows: int, dtype: str = "bfloat16", capability: tuple[int, int] = (9, 0), **constants: int) -> Any:
            """Shape of the result, grid and stages of both kernels."""
            ids, weights, _ = map(jnp.asarray, route(rows))
            args: Any = (inputs(rows, 512, dtype), gate_up, down, jnp.int32(0), ids, weights)
            with override_platform("cuda", capability, interpret=True), override_table(experts_table(**constants)):
                traced = jax.make_jaxpr(lambda *args: fused_moe_unreduced(*args, implementation="triton"))(*args)
            calls = [each for each in traced.eqns if each.primitive.name == "pallas_call"][-2:]
            return [(c.outvars[0].aval.shape, c.params["grid_mapping"].grid, stages(c)) for c in calls]  # type: ignore

        def stages(call: Any) -> int:
            return call.params["compiler_params"].num_stages

        for parts, per_card in ((1, 1), (2, 2), (4, 2)):  # of four steps
            first, second = kernels(5, gate_up_parts=parts, stages_few=5)
            assert first == ((per_card, 15, 128) if per_card > 1 else (15, 64), (15, 1, per_card), 5), parts
            assert second == ((15, 512), (15, 8), 5)
        for tile, blocks in ((32, 6 + 771 // 32), (64, 6 + 771 // 64), (128, 6 + 771 // 128)):
            first, second = kernels(257, block_tile=tile, stages_many=4)
            assert first == ((blocks * tile, 64), (blocks, 1, 1), 4) and second[1][0] == blocks and second[2] == 4
        # A card with little shared memory and without `wgmma`, and float32, have limits of their own.
        assert kernels(5, capability=(8, 6), stages_few=8)[0][2] == 7
        assert kernels(257, capability=(8, 6), block_tile=128)[0][0] == ((6 + 771 // 64) * 64, 64)
        first, second = kernels(257, "float32", block_tile=128, stages_many=4)
        assert first == (((6 + 771 // 16) * 16, 64), (6 + 771 // 16, 1, 1), 2) and second[2] == 2

    @pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].layout != "plain"])
    def test_what_is_prefetched_fits_every_card(self, name: str) -> None:
        """99 KiB on the smaller cards, with as many stages as a table may have."""
        constants = ExpertsConstants(stages_few=8, stages_many=8)
        weight = Operands(*pack_operands(random_weight(name, (1, 1, 2048, 1024))))
        for capability, kib in SHARED_KIB.items():
            with override_platform("cuda", capability):
                for rows in (1, 64, 2048):
                    tiling = choose_tiling(rows, 8, 256, 16, jnp.bfloat16, constants)
                    for tile in (2 * OUT_TILE, tiling.down_tile):
                        stages = tiling.compiler_params(weight, tile, jnp.bfloat16).num_stages
                        assert stages and 2 <= stages <= 8
                        assert weight.shared_bytes(tiling.block_size, tile, stages, jnp.bfloat16) <= kib * 1024

    def test_plain_experts_have_the_gradient_of_the_reference(self) -> None:
        topk_ids, topk_weights, valid = map(jnp.asarray, route(5))

        def loss(x: Any, gate_up: Any, down: Any, weights: Any, implementation: str) -> jax.Array:
            y = fused_moe(x, gate_up, down, jnp.int32(1), topk_ids, weights, valid, implementation=implementation)
            return jnp.sum(jnp.sin(y))

        args = (inputs(5, HIDDEN), *experts("plain"), topk_weights)
        gradients = (jax.grad(loss, (0, 1, 2, 3))(*args, name) for name in ("triton", "xla"))
        for actual, reference in zip(*gradients, strict=True):
            assert_close(actual, np.asarray(reference, np.float64), "float32")

    def test_weights_that_it_does_not_read(self) -> None:
        w = QuantizedTensor(
            jnp.zeros((1, 2, 24, 24), jnp.int8), jnp.ones((1, 2, 24, 1), jnp.float16), None, "codes8", 24
        )
        ids, weights = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
        with pytest.raises(ValueError, match=r"multiple of 32; found QuantizedTensor \[1, 2, 24, 24\], Quantized"):
            fused_moe(jnp.zeros((1, 24)), w, w, jnp.int32(0), ids, weights, implementation="triton")


@cpu_only
@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_experts_fused_for_a_cpu_give_the_same(rows: int) -> None:
    """By windows or all at once. An expert that no row chose counts for nothing even where its product overflows."""
    gate_up, down = experts("plain")
    fused = FusedExperts(gate_up.transpose(0, 3, 1, 2)), TransposedWeight(down.swapaxes(2, 3))
    routing = route(rows)._replace(valid=np.arange(rows) != 1)
    x = inputs(rows, HIDDEN)
    got = np.asarray(run(x, *fused, np.int32(1), *routing))
    assert_close(got, expected(x, "plain", 1, routing, "float32"), "float32")
    traced = str(jax.make_jaxpr(fused_moe)(x, *fused, np.int32(1), *routing))
    assert ("while[" in traced) == (rows not in DENSE_MOE_ROWS)
    lonely = routing._replace(topk_ids=np.broadcast_to(np.arange(TOPK, dtype=np.int32), routing.topk_ids.shape))
    broken = FusedExperts(fused[0].array.at[1, :, TOPK:].set(np.inf))
    np.testing.assert_array_equal(run(x, broken, fused[1], np.int32(1), *lonely), run(x, *fused, np.int32(1), *lonely))


def test_the_platform_decides_which_implementation_is_traced() -> None:
    topk_ids, topk_weights, _ = map(jnp.asarray, route(2))
    rest = (jnp.int32(0), topk_ids, topk_weights)

    def kernels(name: str, **how: Any) -> int:
        weights = experts(name)  # kept for other tests, so it must not be made while something is traced
        traced = jax.make_jaxpr(lambda x: fused_moe(x, *weights, *rest, **how))(inputs(2, HIDDEN))
        return str(traced).count("pallas_call")

    for platform, count in (("cpu", 0), ("cuda", 2)):
        with override_platform(platform, interpret=True):
            assert kernels("plain") == kernels("iq4_nl") == count
            assert kernels("iq4_nl", implementation="xla") == 0
            assert kernels("iq4_nl", implementation="triton") == 2


def test_the_table_has_the_shapes_of_the_published_models() -> None:
    assert {name: shape[:4] for name, shape in SHAPES.items()} == {
        name: (cfg.hidden_size, cfg.expert_size, cfg.num_experts, cfg.experts_per_token)
        for name, cfg in PRESETS.items()
        if cfg.num_experts
    }


@pytest.mark.parametrize("name", ["iq4_nl", "fp8", "bf16"])
def test_the_kernel_takes_the_real_shapes(name: str) -> None:
    for shape in SHAPES.values():
        for rows in ROWS.values():
            args = fused_moe_inputs(shape, rows, name, jnp.bfloat16)
            out = jax.eval_shape(partial(fused_moe, implementation="triton"), *args)
            assert (out.shape, out.dtype) == ((rows, shape.hidden_size), jnp.bfloat16)
