"""Weights in the form that a CPU multiplies fastest: which ones, and that they are the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.weights.transposed import FusedExperts, FusedPlaceholder, TransposedWeight
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.engine.request import Request
from mtpjax.loading.cpu_layout import SIDE_BY_SIDE, SMALL_WEIGHT, optimize_for_cpu
from mtpjax.loading.weight_map import flat
from mtpjax.model.params import Dense, Expert, Vector
from tests.helpers.models import cpu_only, make_engine, numpy_model, tiny_config

pytestmark = cpu_only


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtpjax.loading.cpu_layout.SMALL_WEIGHT", 0)
    monkeypatch.setattr("mtpjax.loading.cpu_layout.SMALL_HEAD", 0)


@pytest.mark.parametrize("moe", [False, True])
def test_every_small_matrix_is_turned(moe: bool) -> None:
    """All but the embedding, which is looked up by rows; vectors stay, weights of the same rows lie side by side."""
    model = numpy_model(tiny_config(moe=moe, tied_embeddings=True))
    before, after = flat(model.params), flat(optimize_for_cpu(model).params)
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
        if kinds[path] in (FusedExperts, TransposedWeight) and not getattr(after[path][...], "parts", ()):
            assert after[path][...].shape == leaf[...].shape
    beside = sum(kind is FusedPlaceholder for kind in kinds.values())
    layers, full = (
        model.cfg.num_layers + model.cfg.mtp_layers,
        model.cfg.num_layers // len(model.cfg.layer_pattern) + model.cfg.mtp_layers,
    )
    assert beside == 3 * (layers - full) + full + (3 if moe else 1) * layers
    numbers = sum(leaf.size for leaf in jax.tree.leaves(optimize_for_cpu(model).params))
    assert numbers == sum(leaf.size for leaf in jax.tree.leaves(model.params)) + before["embedding",][...].size
    joined = next(leaf[...] for path, leaf in after.items() if path[-1] == "in_qkv")
    assert len(joined.parts) == 1 + len(SIDE_BY_SIDE["in_qkv"])


def test_what_is_not_small_stays_as_it_is(nothing_is_small: None) -> None:
    model = numpy_model(tiny_config(moe=True, tied_embeddings=True))
    before, after = flat(model.params), flat(optimize_for_cpu(model).params)
    assert set(before) == set(after) and all(after[path][...] is leaf[...] for path, leaf in before.items())


@pytest.mark.parametrize("moe", [False, True])
def test_the_logits_are_the_same(moe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row of a prompt of three chunks, and with the experts by windows and all at once."""
    model = numpy_model(tiny_config(moe=moe, tied_embeddings=True), scale=0.15)
    prompt = np.random.default_rng(3).integers(0, model.cfg.vocab_size, 75).tolist()
    found = []
    for limit in (SMALL_WEIGHT, 0):
        monkeypatch.setattr("mtpjax.loading.cpu_layout.SMALL_WEIGHT", limit)
        monkeypatch.setattr("mtpjax.loading.cpu_layout.SMALL_HEAD", limit)
        engine = make_engine(model, num_speculative_tokens=1, max_model_len=96)
        found.append(
            np.concatenate(engine.runner.prefill([prompt], OutputRows.all(), return_logits=True)[2], axis=1)[0, -75:]
        )
    assert np.abs(found[0] - found[1]).max() <= 2e-5 * np.abs(found[1]).max()


def test_drafts_leave_the_text_of_a_model_that_is_not_small(nothing_is_small: None) -> None:
    """The way of large models through the loop, on a small one: experts by windows, weights as published."""
    model = numpy_model(tiny_config(moe=True, vocab_size=96), seed=7, scale=0.15)
    requests = [Request(i, tuple(range(3 + i, 9 + i)), 60, 0.7 * i, 5, ()) for i in range(2)]
    plain, drafted = (
        [r.tokens for r in make_engine(model, num_speculative_tokens=k, max_model_len=96).run(requests, 2)] for k in (0, 3)
    )  # fmt: skip
    assert plain == drafted and jnp.asarray(plain).shape == (2, 60)
