"""RoPE kinds, Qwen3-Next and a tied model with a head of its own, each read from its folder, against transformers."""

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints import SafetensorsDirectory, write_safetensors_directory
from checkpoints.errors import CheckpointWarning
from mtpjax import LLM
from mtpjax.loading.load import load_model
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.model import make_positions
from mtpjax.model.cache import KV_BLOCK, new_cache
from tests.golden.forms import FORMS, MTP_FORMS, ROPE_FORMS, STORED_ROWS, TIED_FORMS, form_config, form_tensors

ANSWERS = dict(np.load(Path(__file__).parent.parent / "golden" / "forms.npz"))
TOLERANCE = 1e-4


def write_form(folder: Path, form: str, **config: Any) -> Path:
    """Write the folder of a form, its config changed by `config`."""
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in form_tensors(form).items()]
    write_safetensors_directory(folder, form_config(form) | config, entries)
    return folder


def load_form(folder: Path, form: str, **config: Any) -> LoadedModel:
    source = SafetensorsDirectory(write_form(folder, form, **config))
    with warnings.catch_warnings():
        if form in TIED_FORMS:
            warnings.simplefilter("ignore", CheckpointWarning)
        return load_model(source)


@partial(jax.jit, static_argnames="graph")
def run(params: Any, tokens: jax.Array, *, graph: Any) -> tuple[jax.Array, jax.Array]:
    """Logits of one uncached chunk, and those of the MTP head over its pairs (row t, token t + 1)."""
    model = nnx.merge(graph, params)
    zero, none = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)
    cache = new_cache(model.cfg, 1, KV_BLOCK)
    rows, cache = model.trunk(tokens[None], cache, make_positions(model.cfg, zero, len(tokens), none, kv_len=KV_BLOCK))
    hidden = model.final_norm(rows)
    pairs = make_positions(model.cfg, zero, len(tokens) - 1, none, kv_len=KV_BLOCK)
    mtp, _ = model.mtp_step(hidden[:, :-1], tokens[None, 1:], cache, pairs)
    return model.head(hidden)[0], model.head(mtp)[0]


def agree(ours: Any, form: str, name: str) -> None:
    """Stored rows within the tolerance, with the same choice in every row."""
    theirs = ANSWERS[f"{form}/{name}"]
    rows = np.asarray(ours)[STORED_ROWS]
    assert rows.shape == theirs.shape
    assert float(np.abs(rows - theirs).max()) <= TOLERANCE
    assert np.array_equal(rows.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    model = load_form(tmp_path / form, form)
    logits, mtp_logits = run(model.params, ANSWERS[f"{form}/tokens"], graph=model.graph)
    agree(logits, form, "logits")
    if form in MTP_FORMS:
        agree(mtp_logits, form, "mtp_logits")


def test_answers_of_the_kinds_differ() -> None:
    """Each form is a test of its own kind: no other kind answers like it within the tolerance."""
    first_rows = {form: ANSWERS[f"{form}/logits"][-1] for form in ROPE_FORMS}
    for one in ROPE_FORMS:
        for other in ROPE_FORMS:
            assert one == other or np.abs(first_rows[one] - first_rows[other]).max() > 100 * TOLERANCE


def test_the_engine_reads_beyond_the_original_length(tmp_path: Path) -> None:
    """Chunks, cache and `max_position`: 100 tokens of a model that was made for 32 positions, times 4."""
    llm = LLM(write_form(tmp_path, "yarn_moe"), dtype="float32", max_model_len=128, prefill_buckets=(16, 64))
    agree(llm.logits(ANSWERS["yarn_moe/tokens"].tolist()), "yarn_moe", "logits")
    with pytest.raises(ValueError, match="max_model_len is 129; .* at most 128 positions"):
        LLM(tmp_path, max_model_len=129)


@pytest.mark.parametrize("where", ["rope_scaling", "type", "by_layer_type", "override"])
def test_yarn_in_another_place_is_the_same(where: str, tmp_path: Path) -> None:
    form = "yarn_dense"
    config = form_config(form)
    parameters = config["rope_parameters"]
    plain = {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": parameters["partial_rotary_factor"]}
    overrides = None
    if where == "rope_scaling":
        config |= {"rope_parameters": plain, "rope_scaling": parameters}
    elif where == "type":
        renamed = {("type" if key == "rope_type" else key): value for key, value in parameters.items()}
        config |= {"rope_parameters": renamed}
    elif where == "by_layer_type":
        config |= {"rope_parameters": {"full_attention": parameters, "linear_attention": None}}
    else:
        config |= {"rope_parameters": plain}
        overrides = {"text_config": {"rope_parameters": parameters}}
    folder = write_form(tmp_path, form)
    (folder / "config.json").write_text(json.dumps(config))
    llm = LLM(folder, dtype="float32", max_model_len=128, prefill_buckets=(64,), hf_overrides=overrides)
    agree(llm.logits(ANSWERS[f"{form}/tokens"].tolist()), form, "logits")


def test_a_head_beside_tied_embeddings_is_used_and_named(tmp_path: Path) -> None:
    folder = write_form(tmp_path, "tied_own_head")
    with pytest.warns(CheckpointWarning, match="tie_word_embeddings is true, but 'lm_head.weight' and .* differ"):
        model = load_model(SafetensorsDirectory(folder))
    assert not model.cfg.tied_embeddings


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_head_that_is_the_embedding_is_shared(dtype: Any, tmp_path: Path) -> None:
    tensors = form_tensors("tied_own_head")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].astype(dtype)
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()]
    write_safetensors_directory(tmp_path, form_config("tied_own_head"), entries)
    model = load_model(SafetensorsDirectory(tmp_path))
    assert model.cfg.tied_embeddings and "lm_head" not in model.params
