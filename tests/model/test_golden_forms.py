"""RoPE kinds, Qwen3-Next and a tied model with a head of its own, each read from its folder, against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import SafetensorsDirectory, write_safetensors_directory
from checkpoints.errors import CheckpointWarning
from mtpjax import LLM, SamplingParams
from mtpjax.hf_config import config_from_hf
from mtpjax.loading.load import load_model
from tests.golden.forms import FORMS, MTP_FORMS, ROPE_FORMS, form_config, form_tensors
from tests.helpers.golden_forms import ANSWERS, TOLERANCE, agree, load_form, write_form
from tests.helpers.models import whole


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    model = load_form(tmp_path / form, form)
    logits, _, mtp_logits = whole(model.params, ANSWERS[f"{form}/tokens"], graph=model.graph)
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
def test_yarn_in_another_place_is_the_same_config(where: str, tmp_path: Path) -> None:
    want = form_config("yarn_dense")
    parameters = want["rope_parameters"]
    plain = {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5}
    cfg = config_from_hf(want)
    if where == "rope_scaling":
        assert config_from_hf(want | {"rope_parameters": plain, "rope_scaling": parameters}) == cfg
    elif where == "type":
        renamed = {("type" if key == "rope_type" else key): value for key, value in parameters.items()}
        assert config_from_hf(want | {"rope_parameters": renamed}) == cfg
    elif where == "by_layer_type":
        by_layer_type = {"full_attention": parameters, "linear_attention": None}
        assert config_from_hf(want | {"rope_parameters": by_layer_type}) == cfg
    else:
        folder = write_form(tmp_path, "yarn_dense", rope_parameters=plain)
        assert LLM(folder, max_model_len=32).cfg.rope_scaling is None
        overrides = {"text_config": {"rope_parameters": parameters}}
        assert LLM(folder, max_model_len=128, hf_overrides=overrides).cfg == cfg


@pytest.mark.slow
def test_qwen3_next_keeps_its_text_with_drafts(tmp_path: Path) -> None:
    folder, prompt = write_form(tmp_path, "next"), ANSWERS["next/tokens"][:40].tolist()
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    outputs = []
    for drafts in (0, 3):
        llm = LLM(folder, dtype="float32", max_model_len=64, prefill_buckets=(64,), num_speculative_tokens=drafts)
        outputs += llm.generate([prompt], params)
    assert outputs[0].token_ids == outputs[1].token_ids
    assert outputs[1].metrics.num_draft_tokens > 0


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
