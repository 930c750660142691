"""The kernel that chooses experts, in interpret mode: against the definition, and its place in the model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.quantize import quantize
from kernels_pallas.grouped_matmul import EACH_KERNELS
from kernels_pallas.grouped_matmul.triton import each_expert
from kernels_pallas.matmul import api as matmul_api
from kernels_pallas.matmul.triton import FEW, matmul_parts
from kernels_pallas.platform import platform
from kernels_pallas.topk_softmax import KERNELS
from kernels_pallas.topk_softmax.triton import choose_experts
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax.model import moe
from mtpjax.model.params import ParamFactory
from tests.helpers.models import tiny_config

_choose = jax.jit(partial(choose_experts, interpret=True), static_argnames=("k", "dtype"))


def choose(x: jax.Array, router: jax.Array, k: int, live: np.ndarray | None = None) -> tuple[jax.Array, jax.Array]:
    [parts] = matmul_parts(x, [(router, None)], [jnp.float32], interpret=True)
    gate, up = (jnp.zeros((1, len(x), 8)) for _ in range(2))
    return _choose(parts.parts, gate, up, np.ones(len(x), bool) if live is None else live, k=k, dtype="float32")[:2]


def rows_of(rows: int, experts: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    return jnp.asarray(rng.normal(size=(rows, 512)), dtype), jnp.asarray(rng.normal(size=(experts, 512)) / 12, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "experts", "k"), [(1, 256, 8), (5, 256, 8), (64, 60, 10), (3, 8, 1)])
def test_the_largest_probabilities_in_order(rows: int, experts: int, k: int, dtype: str) -> None:
    x, router = rows_of(rows, experts, dtype)
    weights, chosen = (np.asarray(a) for a in choose(x, router, k=k))
    logits = np.float64(x) @ np.float64(router).T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    want = np.argsort(-p, axis=1, kind="stable")[:, :k]
    assert (chosen == want).all() and chosen.dtype == np.int32
    best = np.take_along_axis(p, want, axis=1)
    np.testing.assert_allclose(weights, best / best.sum(axis=1, keepdims=True), rtol=1e-5)


def test_of_equals_the_first_is_chosen() -> None:
    """As `lax.top_k` does: experts 3, 5 and 6 are the same, and so are all the others. A dead row chooses none there
    is.
    """
    router = np.zeros((8, 160), np.float32)
    router[[3, 5, 6]] = 1
    weights, chosen = choose(jnp.ones((3, 160)), router, 5, np.array([True, False, True]))
    assert chosen.tolist() == [[3, 5, 6, 0, 1], [8] * 5, [3, 5, 6, 0, 1]]
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 3] == weights[:, 4]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shared_expert_is_activated(dtype: str) -> None:
    """Of a size that is no power of two, in other numbers of parts than the logits."""
    rng = np.random.default_rng(0)
    gate, up = (rng.normal(size=(parts, 5, 96)).astype(np.float32) for parts in (1, 4))
    hidden = _choose(jnp.zeros((2, 5, 16)), gate, up, np.ones(5, bool), k=2, dtype=dtype)[2]
    wide, up = (np.float64(part).sum(0) for part in (gate, up))
    assert hidden.dtype == dtype
    exact = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(np.float64(hidden), wide / (1 + np.exp(-wide)) * up, rtol=exact, atol=1e-6)


def test_a_row_is_invariant_to_the_batch_bit_for_bit() -> None:
    """Also where a call has so many rows that the parts of a sum are added up by one program."""
    x, router = rows_of(2 * FEW, 256, "bfloat16")
    whole = choose(x, router, k=8)
    for rows in (slice(0, 1), slice(7, 12), slice(10, 43), slice(20, 21 + FEW)):
        for got, want in zip(choose(x[rows], router, k=8), whole, strict=True):
            assert (np.asarray(got) == np.asarray(want[rows])).all()


def test_a_packed_model_sends_its_rows_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And computes what it computes without; where nothing is packed, gradients may be wanted, and it is not asked."""
    cfg, rng = tiny_config(moe=True, hidden_size=64), np.random.default_rng(0)
    layer = moe.Moe(cfg, ParamFactory(jnp.dtype("float32")))
    nnx.update(layer, jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), nnx.state(layer)))
    x, live = jnp.asarray(rng.normal(size=(2, 5, 64)), jnp.float32), rng.random((2, 5)) < 0.8
    monkeypatch.setitem(KERNELS, platform(), lambda *about: pytest.fail("asked"))
    assert layer(x, 0, live).parts.shape == (1, 10, 64)
    monkeypatch.undo()
    for matrix in ("gate", "up"):
        packed = quantize(np.asarray(getattr(layer.shared, matrix)[...]), "int8")
        weight = QuantizedTensor(jnp.asarray(packed.codes), jnp.asarray(packed.scale), None, "codes8", packed.group)
        setattr(layer.shared, matrix, getattr(layer.shared, matrix).replace(weight))
    plain, asked = layer(x, 0, live).sum(x.dtype), []

    def chosen(*given: Any) -> Any:
        asked.append([np.shape(a) for a in given[:5]])
        return choose_experts(*given, interpret=True)

    monkeypatch.setitem(matmul_api.KERNELS, platform(), partial(matmul_parts, interpret=True))
    monkeypatch.setitem(KERNELS, platform(), chosen)
    monkeypatch.setitem(EACH_KERNELS, platform(), partial(each_expert, interpret=True))
    np.testing.assert_allclose(layer(x, 0, live).sum(x.dtype), plain, atol=1e-5)
    hidden = [(1, 10, cfg.shared_expert_size)] * 2
    assert asked == [[(1, 10, cfg.num_experts), *hidden, (10,), ()]]
    assert KERNELS["cuda"] is choose_experts
