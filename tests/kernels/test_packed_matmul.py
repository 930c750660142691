"""The GPU kernels in interpret mode against dequantised weights and plain products, and the seam that picks them."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from checkpoints.packed_array import pack4, pack_high
from kernels_pallas.grouped_matmul import api as experts_api
from kernels_pallas.grouped_matmul import expert_mlp
from kernels_pallas.grouped_matmul.plan import plan_blocks, plan_each
from kernels_pallas.grouped_matmul.triton import grouped_mlp
from kernels_pallas.matmul import api as linear_api
from kernels_pallas.matmul import linear
from kernels_pallas.matmul.triton import FEW, matmul, matmul_parts
from kernels_pallas.packed import dequantize as packed_words
from kernels_pallas.packed.dequantize import few_rows, words
from kernels_pallas.platform import compile_options, override_platform, platform
from kernels_pallas.weights.layer_view import LayerView
from kernels_pallas.weights.quantized import INDICES, QuantizedTensor
from mtpjax.loading.loaded_model import map_params
from tests.helpers.models import numpy_model, tiny_config

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMS = {  # layout, group, table, offset, super group
    "iq4_nl": ("codes4", 32, IQ4_NL, False, 0),
    "awq": ("codes4", 128, tuple(range(16)), True, 0),
    "halves": ("codes4", 16, tuple(range(-8, 8)), True, 0),
    "q4_k": ("codes4", 32, tuple(range(16)), True, 128),
    "iq4_xs": ("codes4", 32, IQ4_NL, False, 256),
    "q5_1": ("codes5", 32, tuple(range(32)), True, 0),
    "q5_k": ("codes5", 32, tuple(range(32)), True, 256),
    "q6_k": ("codes6", 16, tuple(range(-32, 32)), False, 256),
    "q8_0": ("codes8", 32, None, False, 0),
    "mixed": ("codes8", 16, None, True, 0),
    "gptq_8": ("codes8", 128, None, True, 0),
    "differences": ("codes5", 128, tuple(range(-16, 16)), False, 0),
    "fp8": ("fp8", 128, None, False, 0),
}
OTHERS = [name for name in FORMS if name != "iq4_nl"]
ROWS = (1, 3, 16, 17, 64, 257)
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}


@cache
def packed(name: str, shape: tuple[int, ...], seed: int = 0) -> QuantizedTensor:
    """Random codes and scales; values of about unit size."""
    layout, group, table, with_offset, super_group = FORMS[name]
    rng = np.random.default_rng(seed)
    *lead, size = shape
    if layout == "fp8":
        codes: Any = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
        blocks = (*lead[:-1], -(-lead[-1] // 128), -(-size // 128))
        return QuantizedTensor(codes, rng.uniform(0.5, 1.5, blocks).astype(np.float32), None, layout, 128, None)
    steps = table if table else np.arange(-128, 128)
    scale = rng.uniform(0.5, 1.5, (*lead, size // group)).astype(np.float16) / np.float16(np.std(steps))
    offset = rng.normal(size=scale.shape).astype(np.float16) if with_offset else None
    outer: dict[str, Any] = {}
    if super_group:
        unit = rng.uniform(0.5, 1.5, (*lead, size // super_group)) / np.std(steps)
        scale = rng.integers(-32, 64, scale.shape).astype(np.int8)
        outer["super_scale"] = (unit / 32).astype(np.float16)
        if offset is not None:
            offset = rng.integers(0, 64, scale.shape).astype(np.int8)
            outer["super_offset"] = (-unit).astype(np.float16)
    if layout in INDICES:
        codes = pack4(indices := rng.integers(0, len(steps), shape))
        if layout != "codes4":
            outer["high"] = pack_high(indices, INDICES[layout] - 4)
    else:
        codes = rng.integers(-128, 128, shape).astype(np.int8)
    return QuantizedTensor(codes, scale, offset, layout, group, table, **outer)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values of x as `dtype` holds them."""
    return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)).astype(np.float64)


def dense(w: Any, dtype: str) -> np.ndarray:
    return rounded(np.asarray(w.dequantize(jnp.float32)) if isinstance(w, QuantizedTensor) else w, dtype)


def assert_close(got: Any, want: np.ndarray, dtype: str) -> None:
    got = np.asarray(got).astype(np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= BOUNDS[dtype] * np.abs(want).max()


product = jax.jit(partial(matmul, interpret=True))
mlp = jax.jit(partial(grouped_mlp, interpret=True))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", ROWS)
def test_matmul_is_that_of_the_dequantised_weight(rows: int, dtype: str) -> None:
    w = packed("iq4_nl", (72, 160))  # neither is a multiple of a tile
    x = np.random.default_rng(rows).normal(size=(rows, 160))
    assert_close(product(jnp.asarray(x, dtype), w), rounded(x, dtype) @ dense(w, dtype).T, dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", OTHERS)
def test_matmul_of_every_layout(name: str, dtype: str) -> None:
    w = packed(name, (136, 768))
    x = np.random.default_rng(1).normal(size=(5, 768))
    assert_close(product(jnp.asarray(x, dtype), w), rounded(x, dtype) @ dense(w, dtype).T, dtype)


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
@pytest.mark.parametrize("run", [2, 4])
@pytest.mark.parametrize("name", ["iq4_nl", "halves", "q6_k", "q8_0", "fp8"])
def test_products_in_the_orders_of_all_tensor_cores(
    name: str, run: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which order is the fast one depends on the card and on the compiler; all give the same."""
    monkeypatch.setattr(packed_words, "neighbours", lambda: run)
    x, w = np.random.default_rng(1).normal(size=(5, 256)), packed(name, (136, 256))
    with override_platform(platform(), capability):
        assert words(w)[0].run == run and few_rows() == (16 if capability == (9, 0) else 8)
        got = matmul(jnp.asarray(x, jnp.bfloat16), w, interpret=True)
    assert_close(got, rounded(x, "bfloat16") @ dense(w, "bfloat16").T, "bfloat16")


def test_matmul_reads_one_layer_of_a_stack() -> None:
    stack = packed("iq4_nl", (3, 64, 96))
    x = np.random.default_rng(1).normal(size=(4, 96)).astype(np.float32)
    for layer in range(3):
        assert_close(product(x, stack, np.int32(layer)), x @ dense(stack, "float32")[layer].T, "float32")


@pytest.mark.parametrize("rows", [5, 80])
@pytest.mark.parametrize("name", ["iq4_nl", "q6_k", "q8_0", "fp8"])
def test_matmul_whose_splits_are_not_of_one_length(name: str, rows: int) -> None:
    """20 steps in 8 splits of 3, as in models of 2,560 channels: what lies behind the end of a row is no part of it."""
    w = packed(name, (128, 2560))
    x = np.random.default_rng(rows).normal(size=(rows, 2560)).astype(np.float32)
    assert_close(product(x, w), x.astype(np.float64) @ dense(w, "float32").T, "float32")


@pytest.mark.parametrize("rows", [5, 80])
def test_several_weights_in_one_launch_give_what_each_gives_alone(rows: int) -> None:
    """Bit for bit: of other forms and sizes, with other numbers of splits, a stack, and a plain array among them."""
    plain = np.random.default_rng(2).normal(size=(40, 2048)).astype(np.float32)
    weights = [
        (packed("q5_k", (4096, 2048)), None), (packed("iq4_nl", (3, 72, 2048)), np.int32(2)), (packed("q8_0", (512, 2048)), None),
        (plain, None),
    ]  # fmt: skip
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 2048)), "bfloat16")
    dtypes = [jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16]
    together = jax.jit(lambda x, w: matmul_parts(x, w, dtypes, interpret=True))(x, weights)
    for product, (w, layer), dtype in zip(together, weights, dtypes, strict=True):
        got = product.sum(dtype)
        alone = jax.jit(partial(matmul, out_dtype=dtype, interpret=True))(x, w, layer)
        assert got.dtype == dtype and (np.asarray(got) == np.asarray(alone)).all()


def test_matmul_is_invariant_to_the_batch_bit_for_bit() -> None:
    """Few rows split the sum over programs, many rows do not: the same order all the same."""
    w = packed("awq", (64, 2048))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(257, 2048)), "bfloat16")
    alone = np.asarray(product(x[:1], w))
    assert all((np.asarray(product(x[:rows], w))[:1] == alone).all() for rows in (FEW, FEW + 1, 257))
    moved = np.asarray(product(jnp.roll(x, 100, axis=0), w))
    assert (moved[100] == alone[0]).all()


# Experts

LAYERS, EXPERTS, CHOSEN, HIDDEN, SIZE = 2, 6, 3, 160, 96


@cache
def stacks(name: str) -> tuple[Any, Any]:
    shapes = (LAYERS, EXPERTS, 2 * SIZE, HIDDEN), (LAYERS, EXPERTS, HIDDEN, SIZE)
    if name == "plain":
        rng = np.random.default_rng(0)
        return tuple(rng.normal(size=shape).astype(np.float32) / 10 for shape in shapes)  # type: ignore[return-value]
    _, group, _, _, super_group = FORMS[name]
    if group == 128 or super_group:  # the sizes of this test are no multiple
        shapes = (LAYERS, EXPERTS, 512, 256), (LAYERS, EXPERTS, 256, 256)
    return packed(name, shapes[0]), packed(name, shapes[1], 1)


def route(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((rows, EXPERTS)), axis=1)[:, :CHOSEN].astype(np.int32)
    return chosen, rng.dirichlet(np.ones(CHOSEN), rows).astype(np.float32), rng.random(rows) < 0.8


def expected(x: np.ndarray, name: str, layer: int, chosen: np.ndarray, share: np.ndarray, live: Any, dtype: str) -> Any:
    """Row by row in float64; only the hidden rows are rounded, as the kernels do."""
    up, down = (dense(w, dtype)[layer] for w in stacks(name))
    x, out = rounded(x, dtype), np.zeros(x.shape)
    for n, k in np.ndindex(*chosen.shape):
        gate, linear_half = np.split(up[chosen[n, k]] @ x[n], 2)
        hidden = rounded(gate / (1 + np.exp(-gate)) * linear_half, dtype)
        out[n] += share[n, k] * (down[chosen[n, k]] @ hidden)
    return out * live[:, None]


def check_experts(rows: int, name: str, dtype: str, routing: Any = None) -> None:
    chosen, share, live = routing or route(rows)
    size = stacks(name)[0].shape[-1]
    x = np.random.default_rng(rows).normal(size=(rows, size)) / 30
    got = mlp(jnp.asarray(x, dtype), *stacks(name), np.int32(1), chosen, share, live)
    assert_close(got, expected(x, name, 1, chosen, share, live, dtype), dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", ROWS)
def test_experts_are_those_of_the_dequantised_weights(rows: int, dtype: str) -> None:
    check_experts(rows, "iq4_nl", dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", ["awq", "halves", "q4_k", "q5_k", "q6_k", "q8_0", "plain"])
def test_experts_of_every_layout(name: str, dtype: str) -> None:
    check_experts(17, name, dtype)


def test_experts_without_rows_and_one_expert_with_all_rows() -> None:
    rows = 257
    chosen, share, live = route(rows)
    everybody = np.ones(rows, bool)
    some = np.where(chosen >= 4, chosen - 4, chosen)  # nobody chooses experts 4 and 5
    check_experts(rows, "iq4_nl", "bfloat16", (some, share, everybody))
    check_experts(rows, "iq4_nl", "bfloat16", (np.full_like(chosen, 3), share, everybody))
    check_experts(rows, "iq4_nl", "bfloat16", (chosen, share, np.zeros(rows, bool)))


def test_experts_are_invariant_to_the_batch_bit_for_bit() -> None:
    """Blocks of 16 and of 64 rows, other neighbours, another place among the rows of the expert.

    Sums of eight and three steps, and twenty-one rows: bfloat16 results hide most changes of order, and two steps all.
    """
    hidden, size = 1024, 384
    weights = packed("iq4_nl", (1, EXPERTS, 2 * size, hidden)), packed("iq4_nl", (1, EXPERTS, hidden, size), 1)
    chosen, share, _ = route(257)
    live = np.ones(257, bool)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(257, hidden)) / 30, "bfloat16")

    def run(rows: Any) -> np.ndarray:
        some = mlp(x[rows], *weights, np.int32(0), chosen[rows], share[rows], live[rows])
        return np.asarray(some.astype(jnp.float32))

    few = run(slice(0, 21))
    assert all((run(slice(0, rows))[:21] == few).all() for rows in (64, 257))
    assert (run(slice(0, 1)) == few[:1]).all()
    assert (run(np.arange(257)[::-1])[:-22:-1] == few).all()


def test_dead_rows_take_no_blocks() -> None:
    """Neither where every assignment has a block of its own nor where rows of an expert share blocks."""
    chosen, _, live = route(40)
    each = plan_each(chosen, live, EXPERTS, 16)
    assert ((np.asarray(each.expert).reshape(chosen.shape) < EXPERTS) == live[:, None]).all()
    full, half = (int(plan_blocks(chosen, rows, EXPERTS, 16).count) for rows in (np.ones(40, bool), np.arange(40) < 8))
    assert full == sum(-(-n // 16) for n in np.bincount(chosen.ravel()))
    assert half == sum(-(-n // 16) for n in np.bincount(chosen[:8].ravel(), minlength=EXPERTS))


def test_a_packed_weight_needs_whole_blocks() -> None:
    w = QuantizedTensor(np.zeros((4, 24), np.int8), np.ones((4, 1), np.float16), None, "codes8", 24, None)
    with pytest.raises(ValueError, match=r"\[4, 24\].*multiple of 32"):
        matmul(jnp.zeros((1, 24)), w, interpret=True)


# The seam


def traced(fn: Any, *args: Any) -> str:
    return str(jax.make_jaxpr(lambda *a: fn(*a))(*args))


def test_the_target_picks_the_kernels() -> None:
    x, w = jnp.ones((2, 96)), packed("iq4_nl", (3, 64, 96))
    one = LayerView(w, jnp.int32(1))
    chosen, share, live = route(2)
    routed = (jnp.ones((2, HIDDEN)), *stacks("plain"), jnp.int32(0), chosen, share, live)
    if platform() == "cpu":
        assert "pallas_call" not in traced(linear, x, one) + traced(expert_mlp, *routed)
        assert compile_options() == {}
    with override_platform("cuda"):
        assert platform() == "cuda" and "compiler_options" in compile_options()
        assert "pallas_call" in traced(linear, x, one)
        assert "pallas_call" in traced(expert_mlp, *routed)
        assert "pallas_call" not in traced(linear, x, jnp.ones((64, 96)))  # cuBLAS does this


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, in interpret mode, where plain `lax` would run."""
    monkeypatch.setitem(experts_api.KERNELS, platform(), partial(grouped_mlp, interpret=True))
    monkeypatch.setitem(linear_api.KERNELS, platform(), partial(matmul_parts, interpret=True))


def test_linear_takes_a_layer_of_a_packed_stack(interpreted: None) -> None:
    w, x = packed("q8_0", (3, 64, 96)), np.random.default_rng(0).normal(size=(2, 3, 96)).astype(np.float32)
    got = linear(jnp.asarray(x), LayerView(w, jnp.int32(2)))
    assert_close(got, x @ dense(w, "float32")[2].T, "float32")


def test_plain_experts_have_the_gradient_of_the_loop(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, share, live = route(5)
    x = np.random.default_rng(1).normal(size=(5, HIDDEN)).astype(np.float32)

    def loss(x: Any, up: Any, down: Any, share: Any) -> Any:
        return jnp.sum(jnp.sin(expert_mlp(x, up, down, jnp.int32(1), chosen, share, live)))

    got = jax.grad(loss, (0, 1, 2, 3))(x, *stacks("plain"), share)
    monkeypatch.delitem(experts_api.KERNELS, platform())
    for mine, plain in zip(got, jax.grad(loss, (0, 1, 2, 3))(x, *stacks("plain"), share), strict=True):
        assert_close(mine, np.asarray(plain), "float32")


def test_a_model_with_packed_matrices_is_the_dequantised_one(interpreted: None) -> None:
    """Packed stacks go whole into the layers, with the index of their one layer."""
    from mtpjax.decoding.steps import forward_hidden
    from mtpjax.model.cache import new_cache

    cfg = tiny_config(moe=False, num_superblocks=1, hidden_size=64, linear_v_dim=16, mlp_size=64)
    model = numpy_model(cfg)

    def pack(path: Any, leaf: Any) -> Any:
        """8-bit, the largest of a group of 16 to 127."""
        if path[-1] not in ("q", "k", "v", "o", "in_qkv", "in_z", "out", "gate", "up", "down", "embedding"):
            return leaf.get_value()
        values = np.asarray(leaf.get_value()).reshape(*leaf.shape[:-1], -1, 16)
        scale = (np.abs(values).max(-1) / 127).astype(np.float16)
        codes = np.round(values / scale[..., None].astype(np.float32)).clip(-128, 127).astype(np.int8)
        return QuantizedTensor(codes.reshape(leaf.shape), scale, None, "codes8", 16, None)

    def widen(path: Any, leaf: Any) -> Any:
        whole = pack(path, leaf)
        return whole.dequantize(jnp.float32) if isinstance(whole, QuantizedTensor) else whole

    tokens = np.arange(1, 9, dtype=np.int32)[None]
    rows = []
    for make in (pack, widen):
        graph, params = nnx.split(nnx.merge(model.graph, map_params(model.params, make)))
        cache = new_cache(cfg, 1, 256)
        step = jax.jit(partial(forward_hidden, graph=graph))
        rows.append(np.asarray(step(params, tokens, np.zeros(1, np.int32), cache)[0]))
    assert np.isfinite(rows[0]).all()
    assert_close(rows[0], rows[1].astype(np.float64), "float32")


def test_packed_experts_on_the_lax_path() -> None:
    chosen, share, live = route(17)
    x = np.random.default_rng(17).normal(size=(17, HIDDEN)).astype(np.float32) / 30
    got = jax.jit(expert_mlp)(x, *stacks("iq4_nl"), np.int32(1), chosen, share, live)
    assert_close(got, expected(x, "iq4_nl", 1, chosen, share, live, "float32"), "float32")
