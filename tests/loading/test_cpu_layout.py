"""Weights in the order that a CPU multiplies fastest: which ones change, and that the model stays the same."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.weights import FusedExperts, FusedPlaceholder, TransposedWeight
from kernels_pallas.weights.transposed import padded_outputs
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.engine.request import Request
from mtpjax.loading.cpu_layout import MAX_WEIGHT_ELEMENTS, SHARE_INPUT, optimize_for_cpu
from mtpjax.loading.loaded_model import flatten_params
from mtpjax.model.params import Dense, Expert, Vector
from tests.helpers.models import cpu_only, make_engine, numpy_model, tiny_config

pytestmark = cpu_only


def set_max_elements(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("mtpjax.loading.cpu_layout.MAX_WEIGHT_ELEMENTS", limit)
    monkeypatch.setattr("mtpjax.loading.cpu_layout.MAX_HEAD_ELEMENTS", limit)


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    set_max_elements(monkeypatch, 0)


@pytest.mark.parametrize("moe", [False, True])
def test_small_matrices_are_transposed_and_fused(moe: bool) -> None:
    """All but the embedding, of which rows are read. Vectors stay, and weights that read the same rows are fused."""
    model = numpy_model(tiny_config(moe=moe, tied_embeddings=True))
    optimized = optimize_for_cpu(model)
    before, after = flatten_params(model.params), flatten_params(optimized.params)
    kinds = {path: type(leaf[...]) for path, leaf in after.items()}
    assert set(after) == set(before) | {("lm_head",)} and kinds["lm_head",] is TransposedWeight
    for path, leaf in before.items():
        if isinstance(leaf, Expert):
            assert kinds[path] is (FusedExperts if path[-1] == "gate_up" else TransposedWeight)
        elif isinstance(leaf, Dense) and path != ("embedding",):
            assert kinds[path] in (TransposedWeight, FusedPlaceholder)
        else:
            assert isinstance(leaf, Vector) or path == ("embedding",)
            assert after[path][...] is leaf[...]
        if kinds[path] in (FusedExperts, TransposedWeight) and not getattr(after[path][...], "output_sizes", ()):
            assert after[path][...].shape == leaf[...].shape
    attention_layers = model.cfg.full_layers + model.cfg.mtp_layers
    layers = model.cfg.num_layers + model.cfg.mtp_layers
    placeholders = sum(kind is FusedPlaceholder for kind in kinds.values())
    assert placeholders == 3 * (layers - attention_layers) + attention_layers + (3 if moe else 1) * layers
    weights = [leaf[...] for leaf in after.values()]
    num_elements = sum(math.prod(w.shape) for w in weights if not isinstance(w, FusedPlaceholder))
    copied = before["embedding",][...].size  # as the LM head
    assert num_elements == sum(leaf.size for leaf in jax.tree.leaves(model.params)) + copied
    fused = next(leaf[...] for path, leaf in after.items() if path[-1] == "in_qkv")
    assert len(fused.output_sizes) == 1 + len(SHARE_INPUT["in_qkv"])
    assert fused.array.shape[-1] == padded_outputs(sum(fused.output_sizes))
    assert fused.shape[-2] == sum(fused.output_sizes)


def test_larger_weights_stay_as_they_are(nothing_is_small: None) -> None:
    model = numpy_model(tiny_config(moe=True, tied_embeddings=True))
    before, after = flatten_params(model.params), flatten_params(optimize_for_cpu(model).params)
    assert set(before) == set(after) and all(after[path][...] is leaf[...] for path, leaf in before.items())


@pytest.mark.parametrize("moe", [False, True])
def test_the_logits_are_the_same(moe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row of a prompt of three chunks. Experts run in windows with one limit, all at once with the other."""
    model = numpy_model(tiny_config(moe=moe, tied_embeddings=True), scale=0.15)
    prompt = np.random.default_rng(3).integers(0, model.cfg.vocab_size, 75).tolist()
    logits = []
    for limit in (MAX_WEIGHT_ELEMENTS, 0):
        set_max_elements(monkeypatch, limit)
        engine = make_engine(model, num_speculative_tokens=1, max_model_len=96)
        chunks = engine.runner.prefill([prompt], OutputRows.all(), return_logits=True)[2]
        logits.append(np.concatenate(chunks, axis=1)[0, -75:])
    assert np.abs(logits[0] - logits[1]).max() <= 2e-5 * np.abs(logits[1]).max()


@pytest.mark.slow
def test_drafts_leave_the_text_of_a_model_that_is_not_small(nothing_is_small: None) -> None:
    """A small model takes the way of large ones through the loop: experts in windows, weights as published."""
    model = numpy_model(tiny_config(moe=True, vocab_size=96), seed=7, scale=0.15)
    requests = [Request(i, tuple(range(3 + i, 9 + i)), 60, 0.7 * i, 5, ()) for i in range(2)]
    engines = [make_engine(model, num_speculative_tokens=k, max_model_len=96) for k in (0, 3)]
    plain, drafted = ([result.tokens for result in engine.run(requests, 2)] for engine in engines)
    assert plain == drafted and jnp.asarray(plain).shape == (2, 60)
