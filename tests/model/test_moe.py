"""The Mixture-of-Experts block against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas.platform import override_platform
from mtpjax.model import Expert
from mtpjax.model.params import ONLY_LAYER
from tests.helpers.models import numpy_model, tiny_config

pytestmark = pytest.mark.fast


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_block_against_its_formula(platform: str) -> None:
    """The router keeps the K largest of a softmax over all experts and makes their sum 1; the shared expert stands
    behind a gate of its own. Kernels of the CUDA program are interpreted.
    """
    loaded, layer = numpy_model(tiny_config(moe=True, num_superblocks=1), seed=5), ONLY_LAYER
    block = nnx.merge(loaded.graph, loaded.params).decoder.blocks[0].layers[0]
    graph, experts, rest = nnx.split(block.mlp, Expert, ...)  # type: ignore[misc]
    moe = nnx.merge(graph, experts, jax.tree.map(lambda w: w[layer], rest))
    x = 2 * np.random.default_rng(6).normal(size=(2, 7, loaded.cfg.hidden_size)).astype(np.float32)
    valid = np.ones((2, 7), bool)
    valid[0, :3] = False
    with override_platform(platform, interpret=True):
        actual = jax.jit(lambda x: moe(x, layer, jnp.asarray(valid)).sum(x.dtype))(x).reshape(x.shape)

    w = {name: np.asarray(getattr(moe, name)[...], np.float64) for name in ("router", "shared_gate", "gate_up", "down")}
    shared = {name: np.asarray(getattr(moe.shared, name)[...], np.float64) for name in ("gate", "up", "down")}
    expected = np.zeros(x.shape)
    for row in np.ndindex(2, 7):
        v = x[row].astype(np.float64)
        p = np.exp(w["router"] @ v)
        best = np.argsort(-p)[: loaded.cfg.experts_per_token]
        for e in best if valid[row] else ():
            gate, up = np.split(w["gate_up"][layer, e] @ v, 2)
            expected[row] += p[e] / p[best].sum() * (w["down"][layer, e] @ (silu(gate) * up))
        shared_out = shared["down"] @ (silu(shared["gate"] @ v) * (shared["up"] @ v))
        expected[row] += shared_out / (1 + np.exp(-(w["shared_gate"] @ v)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
