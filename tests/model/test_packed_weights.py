"""A model whose matrices stay packed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints.quantize import quantize
from kernels_pallas.platform import override_platform
from kernels_pallas.weights import QuantizedTensor
from mtpjax.decoding.steps import forward_hidden
from mtpjax.loading.loaded_model import map_params
from mtpjax.model.cache import new_cache
from tests.helpers.models import numpy_model, tiny_config
from tests.helpers.numerics import assert_close

PACKED = ("q", "k", "v", "o", "in_qkv", "in_z", "out", "gate", "up", "down", "embedding")


def pack(path: Any, leaf: Any) -> Any:
    """Store the matrices in eight bits and leave everything else as it is."""
    values = leaf.get_value()
    if path[-1] not in PACKED:
        return values
    packed = quantize(np.asarray(values), "int8")
    return QuantizedTensor(jnp.asarray(packed.codes), jnp.asarray(packed.scale), None, "codes8", packed.group)


def dequantize(path: Any, leaf: Any) -> Any:
    packed = pack(path, leaf)
    return packed.dequantize(jnp.float32) if isinstance(packed, QuantizedTensor) else packed


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_packed_model_computes_what_its_dequantised_weights_give(platform: str) -> None:
    """Packed stacks go whole into the layers, with the index of the layer. Kernels of CUDA are interpreted."""
    cfg = tiny_config(moe=False, num_superblocks=1, hidden_size=64, linear_v_dim=16, mlp_size=64)
    model, hidden = numpy_model(cfg), []
    for change in (pack, dequantize):
        graph, params = nnx.split(nnx.merge(model.graph, map_params(model.params, change)))
        step = jax.jit(partial(forward_hidden, graph=graph))
        with override_platform(platform if change is pack else "cpu", interpret=True):
            tokens = np.arange(1, 9, dtype=np.int32)[None]
            hidden.append(np.asarray(step(params, tokens, np.zeros(1, np.int32), new_cache(cfg, 1, 256))[0]))
    assert np.isfinite(hidden[0]).all()
    assert_close(hidden[0], hidden[1].astype(np.float64), "float32")
