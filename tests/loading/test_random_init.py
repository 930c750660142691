"""Random models: packed weights have the layout of loaded ones, and nothing sensitive is packed."""

import jax
import numpy as np
import pytest

from checkpoints.quantize import MODES, quantize
from kernels_pallas.weights.quantized import QuantizedTensor
from mtpjax import LLM, SamplingParams
from mtpjax.loading.loaded_model import LoadedModel, ParamPath, flatten_params
from mtpjax.loading.quantized_leaves import can_quantize
from mtpjax.loading.random_init import random_model
from tests.helpers.models import PACKABLE_SIZES, tiny_config


def packed_weights(model: LoadedModel) -> dict[ParamPath, QuantizedTensor]:
    weights = {path: variable[...] for path, variable in flatten_params(model.params).items()}
    return {path: weight for path, weight in weights.items() if isinstance(weight, QuantizedTensor)}


@pytest.mark.parametrize("quantization", MODES)
def test_random_packed_weights_are_like_loaded_ones(quantization: str) -> None:
    """The leaves that `load_model` would pack are packed, with its layout, shapes and dtypes.

    Their deviation is `scale`, and no matrix of a stack repeats another one.
    """
    scale = 0.02
    model = random_model(
        tiny_config(moe=True, num_superblocks=1, **PACKABLE_SIZES), quantization=quantization, scale=scale
    )
    leaves, packed = flatten_params(model.params), packed_weights(model)
    assert packed.keys() == {path for path, leaf in leaves.items() if can_quantize(path, leaf[...].shape, quantization)}
    assert any(path[-1] == "gate_up" for path in packed)
    for path, weight in packed.items():
        expected = quantize(np.ones(weight.shape, np.float32), quantization)
        assert (weight.layout, weight.group, weight.table) == (expected.layout, expected.group, expected.table)
        assert (weight.codes.shape, weight.codes.dtype) == (expected.codes.shape, expected.codes.dtype)
        assert weight.scale.shape == expected.scale.shape
        values = np.asarray(weight.dequantize())
        assert values.size < 1000 or abs(values.std() / scale - 1) < 0.15, path
        matrices = values.reshape(-1, *values.shape[-2:])
        assert len(matrices) == 1 or (matrices[0] != matrices[1]).any()
    LLM(model, num_speculative_tokens=1, max_model_len=64, max_num_seqs=1).generate(
        [[1, 2, 3]], SamplingParams(max_tokens=3)
    )


def test_packed_names_no_form_of_random_weights() -> None:
    with pytest.raises(ValueError, match="'packed', which is for GGUF files"):
        random_model(tiny_config(moe=True, num_superblocks=1, **PACKABLE_SIZES), quantization="packed")


@pytest.mark.parametrize("quantization", MODES)
def test_vectors_the_router_and_the_gates_are_never_packed(quantization: str) -> None:
    """With 32 heads the gates of DeltaNet have whole groups, so that only their names keep them from being packed."""
    sizes = {**PACKABLE_SIZES, "linear_v_heads": 32, "linear_k_heads": 16}
    model = random_model(tiny_config(moe=True, num_superblocks=1, **sizes), quantization=quantization)
    packed = {path[-1] for path in packed_weights(model)}
    never = {"a_log", "dt_bias", "conv", "in_a", "in_b", "norm", "input_norm", "router", "shared_gate"}
    assert never <= {path[-1] for path in flatten_params(model.params)}
    assert "gate_up" in packed and not packed & never


def test_programs_are_as_many_as_forms_of_leaves() -> None:
    """Layers that differ in nothing but their numbers share the program of each leaf."""
    lowered: list[str] = []

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("jaxpr_to_mlir_module_duration"):
            lowered.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        counts = []
        for num_superblocks in (1, 3):
            jax.clear_caches()
            lowered.clear()
            random_model(tiny_config(moe=True, num_superblocks=num_superblocks, **PACKABLE_SIZES), quantization="iq4nl")
            counts.append(len(lowered))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert counts[0] == counts[1] <= 24
