"""`linear` with packed weights: every implementation against products of the dequantised weight."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.matmul import fused_linears, linear, linears_split_k
from kernels_pallas.matmul.shapes import ROWS, SHAPES, SQUARE, matmul_inputs
from kernels_pallas.matmul.tiling import DECODE_ROWS, Operands, choose_tiling
from kernels_pallas.packed import layout as packed_layout
from kernels_pallas.packed.formats import FORMATS, abstract_weight
from kernels_pallas.packed.layout import PackedLayout, min_row_tile, pack_operands
from kernels_pallas.platform import SHARED_KIB, compile_options, override_platform, platform
from kernels_pallas.weights import LayerView, QuantizedTensor, TransposedWeight
from mtpjax.presets import PRESETS
from tests.helpers.numerics import BOUNDS, assert_close
from tests.helpers.packed_weights import dense, random_weight, rounded

PACKED = [name for name in FORMATS if FORMATS[name].layout != "plain"]
product = jax.jit(linear, static_argnames=("out_dtype", "implementation"))


@pytest.fixture(params=["xla", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Kernels run compiled on a CUDA device and in interpret mode everywhere else."""
    return request.param


def random_rows(rows: int, size: int, dtype: Any = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, size)), dtype)


def stored_operands(name: str, shape: tuple[int, int]) -> Operands:
    """Return the operands of a weight whose arrays are only described."""
    layouts: list[PackedLayout] = []

    def arrays(w: Any) -> tuple[jax.Array, ...]:
        layout, arrays = pack_operands(w)
        layouts.append(layout)
        return arrays

    described = jax.eval_shape(arrays, abstract_weight(shape, name))
    return Operands(layouts[0], described)


class TestLinear:
    @pytest.mark.parametrize("dtype", BOUNDS)
    @pytest.mark.parametrize("rows", [1, 3, 17, 64, 257])
    def test_any_number_of_rows(self, rows: int, dtype: str, implementation: str) -> None:
        """Neither size of the weight is a multiple of a tile."""
        x, w = random_rows(rows, 160, dtype), random_weight("iq4_nl", (72, 160))
        got = product(x, w, implementation=implementation)
        assert got.dtype == dtype
        assert_close(got, rounded(x, dtype) @ dense(w, dtype).T, dtype)

    @pytest.mark.parametrize("dtype", BOUNDS)
    @pytest.mark.parametrize("name", PACKED)
    def test_every_storage_format(self, name: str, dtype: str, implementation: str) -> None:
        x, w = random_rows(5, 768, dtype), random_weight(name, (136, 768))
        got = product(x, w, out_dtype=jnp.float32, implementation=implementation)
        assert got.dtype == jnp.float32
        assert_close(got, rounded(x, dtype) @ dense(w, dtype).T, dtype)

    def test_one_layer_of_a_stack(self, implementation: str) -> None:
        stack, x = random_weight("q8_0", (3, 64, 96)), random_rows(6, 96).reshape(2, 3, 96)
        for layer in range(3):
            got = product(x, LayerView(stack, jnp.int32(layer)), implementation=implementation)
            assert_close(got, np.float64(x) @ dense(stack, "float32")[layer].T, "float32")

    def test_no_rows(self, implementation: str) -> None:
        w = random_weight("q8_0", (64, 96))
        assert linear(jnp.zeros((2, 0, 96)), w, implementation=implementation).shape == (2, 0, 64)

    @pytest.mark.parametrize("rows", [5, 80])
    def test_several_weights_give_what_each_gives_alone(self, rows: int, implementation: str) -> None:
        """Bit for bit: in one launch, of other formats and sizes, with other numbers of splits, stacks and plain
        arrays.
        """
        weights = [
            random_weight("q5_k", (4096, 512)),
            LayerView(random_weight("iq4_nl", (3, 72, 512)), jnp.int32(2)),
            random_weight("q8_0", (512, 512)),
            random_weight("plain", (40, 512)),
        ]
        x, dtypes = random_rows(rows, 512, "bfloat16"), (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16)
        run = partial(fused_linears, out_dtypes=dtypes, implementation=implementation)
        for got, w, dtype in zip(jax.jit(run)(x, *weights), weights, dtypes, strict=True):
            alone = product(x, w, out_dtype=dtype, implementation=implementation)
            assert got.dtype == dtype and (np.asarray(got) == np.asarray(alone)).all()

    def test_partial_sums_are_those_of_the_rows(self, implementation: str) -> None:
        """Leading axes are flattened; the kernel splits the sum over the 8 steps in 4."""
        x, w = random_rows(6, 1024).reshape(2, 3, 1024), random_weight("iq4_nl", (64, 1024))
        [sums] = linears_split_k(x, w, out_dtypes=[jnp.float32], implementation=implementation)
        assert sums.parts.shape == (4 if implementation == "triton" else 1, 6, 64)
        want = product(x, w, implementation=implementation)
        assert (np.asarray(sums.sum(jnp.float32)) == np.asarray(want).reshape(6, 64)).all()


class TestKernel:
    """What the kernel promises beyond the op."""

    run = staticmethod(partial(product, implementation="triton"))

    @pytest.mark.parametrize("rows", [5, 80])
    @pytest.mark.parametrize("name", ["iq4_nl", "q6_k", "q8_0", "fp8"])
    def test_splits_that_are_not_of_one_length(self, name: str, rows: int) -> None:
        """20 steps in 8 splits of 3, as with 2,560 channels: what lies behind the end of a row does not count."""
        x, w = random_rows(rows, 2560), random_weight(name, (128, 2560))
        assert_close(self.run(x, w), np.float64(x) @ dense(w, "float32").T, "float32")

    @pytest.mark.parametrize(("kind", "capability"), [("RTX 3090", (8, 6)), ("H100", (9, 0))])
    @pytest.mark.parametrize("inputs", [512, 2048, 2560, 4608])
    def test_a_row_is_invariant_to_the_batch_bit_for_bit(
        self, inputs: int, kind: str, capability: tuple[int, int]
    ) -> None:
        """Few rows split the sum over programs, many rows do not: the order of the sum is the same.

        2,560 inputs are 20 steps in 8 splits, the last of 2 steps and none; 4,608 are 36 in 16. Sums are compared
        before they are rounded to bfloat16, which would hide most changes of their order.
        """
        run = jax.jit(partial(linear, out_dtype=jnp.float32, implementation="triton"))  # traced for each capability
        x, w = random_rows(257, inputs, "bfloat16"), random_weight("int4 g128", (72, inputs))
        here = platform()
        with override_platform(here, capability, device_kind=kind, interpret=here != "cuda"):
            alone = np.asarray(run(x[:1], w))
            for rows in (5, DECODE_ROWS, DECODE_ROWS + 1, 129, 257):
                among_others = np.asarray(run(jnp.roll(x[:rows], rows // 2, axis=0), w))[rows // 2]
                assert (among_others == alone[0]).all(), rows

    def test_splits_follow_the_weight_and_tiles_the_rows(self) -> None:
        """Projections of the 35B-A3B, on a card with little shared memory and on one with much."""
        for capability, many_stages in (((8, 6), 2), ((9, 0), 3)):
            with override_platform("cuda", capability):
                for (inputs, outputs), splits in {(2048, 8192): 4, (4096, 2048): 16, (512, 2048): 2}.items():
                    weight = stored_operands("iq4_nl", (outputs, inputs))
                    assert weight.num_splits == splits
                few, some, many = (choose_tiling(rows, [weight], jnp.bfloat16) for rows in (5, 64, 65))
                assert few == (min_row_tile(), 64, 4, 2, True) and some == (64, 64, 4, 2, True)
                assert many == choose_tiling(4096, [weight], jnp.bfloat16) == (128, 128, 8, many_stages, False)
                assert choose_tiling(4096, [weight], jnp.float32).row_tile == 16

    @pytest.mark.parametrize("name", PACKED)
    def test_what_is_prefetched_fits_every_card(self, name: str) -> None:
        """99 KiB on the smaller cards."""
        weight = stored_operands(name, (2048, 4096))
        for capability, kib in SHARED_KIB.items():
            with override_platform("cuda", capability):
                for rows in (1, 64, 512):
                    row_tile, out_tile, _, stages, _ = choose_tiling(rows, [weight], jnp.bfloat16)
                    assert weight.shared_bytes(row_tile, out_tile, stages, jnp.bfloat16) <= kib * 1024

    @pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
    @pytest.mark.parametrize("k_values", [2, 4])
    @pytest.mark.parametrize("name", ["iq4_nl", "int4 g16", "q6_k", "q8_0", "fp8"])
    def test_the_orders_of_all_tensor_cores_give_the_same(
        self, name: str, k_values: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which order is the fast one depends on the card and on the compiler."""
        monkeypatch.setattr(packed_layout, "k_values_per_thread", lambda: k_values)
        x, w = random_rows(5, 256, "bfloat16"), random_weight(name, (136, 256))
        with override_platform(platform(), capability):
            assert pack_operands(w)[0].k_values_per_thread == k_values
            assert min_row_tile() == (16 if capability == (9, 0) else 8)
            got = linear(x, w, implementation="triton")
        assert_close(got, rounded(x, "bfloat16") @ dense(w, "bfloat16").T, "bfloat16")

    def test_consumer_cards_have_the_older_tensor_core_instructions(self) -> None:
        """Of the Blackwell generation, too: 12.0 is a higher number than 9.0, and has no `wgmma`."""
        for capability, rows in {(8, 9): 8, (9, 0): 16, (10, 0): 16, (12, 0): 8}.items():
            with override_platform("cuda", capability):
                assert min_row_tile() == rows

    def test_weights_that_it_does_not_read(self) -> None:
        w = QuantizedTensor(jnp.zeros((4, 24), jnp.int8), jnp.ones((4, 1), jnp.float16), None, "codes8", 24)
        with pytest.raises(ValueError, match=r"\[4, 24\]: the last axis must be a multiple of 32"):
            pack_operands(w)
        for weight, found in ((w, r"QuantizedTensor \[4, 24\]"), (TransposedWeight(jnp.zeros((24, 4))), "Transposed")):
            with pytest.raises(ValueError, match=rf"'triton' multiplies .* multiple of 32; found {found}"):
                linear(jnp.zeros((1, 24)), weight, implementation="triton")
            with override_platform("cuda"):
                assert linear(jnp.zeros((1, 24)), weight).shape == (1, 4)  # by XLA


def test_the_platform_decides_which_implementation_is_traced() -> None:
    x, packed = jnp.ones((2, 96)), LayerView(random_weight("iq4_nl", (3, 64, 96)), jnp.int32(1))

    def kernels(w: Any, **how: Any) -> int:
        return str(jax.make_jaxpr(lambda x: linear(x, w, **how))(x)).count("pallas_call")

    for name, count in (("cpu", 0), ("cuda", 1)):
        with override_platform(name, interpret=True):
            assert ("compiler_options" in compile_options()) == (name == "cuda")
            assert kernels(packed) == count
            assert kernels(jnp.ones((64, 96))) == 0  # cuBLAS does this
            assert kernels(packed, implementation="xla") == 0
            assert kernels(packed, implementation="triton") == kernels(jnp.ones((64, 96)), implementation="triton") == 1


def test_the_table_has_the_shapes_of_the_published_models() -> None:
    assert {name: shape[:2] for name, shape in SHAPES.items()} == {
        name: (cfg.hidden_size, cfg.conv_channels) for name, cfg in PRESETS.items()
    }
    assert SQUARE[:2] == (PRESETS["35b-a3b"].hidden_size,) * 2


@pytest.mark.parametrize("name", ["iq4_nl", "fp8", "bf16"])
def test_the_kernel_takes_the_real_shapes(name: str) -> None:
    for shape in SHAPES.values():
        for rows in ROWS.values():
            x, stack, layer = matmul_inputs(shape, rows, name, jnp.bfloat16)

            def run(x: Any, stack: Any, layer: Any) -> jax.Array:
                w = LayerView(stack, layer) if isinstance(stack, QuantizedTensor) else stack[layer]
                return linear(x, w, implementation="triton")

            assert jax.eval_shape(run, x, stack, layer).shape == (rows, shape.outputs)
