"""GGUF files of Qwen3-Next in llama.cpp's layouts, new and old, and the metadata of scaled RoPE."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from checkpoints import CheckpointError, GgufFile, SafetensorsDirectory, write_gguf
from mtpjax import LLM
from mtpjax.config import ModelConfig, RopeScaling
from mtpjax.hf_config import config_from_hf, config_to_hf
from mtpjax.loading.export import export_tensors
from mtpjax.loading.load import load_model
from mtpjax.loading.loaded_model import flatten_params
from mtpjax.loading.split_projections import split_projections
from scripts.format_checks.llama_cpp import Llama
from tests.golden.forms import ROPE_FORMS, form_config, form_tensors
from tests.helpers.golden_forms import ANSWERS, agree, write_form
from tests.helpers.models import tiny_config, whole

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out", "linear_attn.in_proj_ba": "ssm_ba", "linear_attn.in_proj_qkvz": "ssm_in",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NEXTN = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}


def to_llama_cpp(config: dict[str, Any], tensors: dict[str, np.ndarray], legacy: bool) -> dict[str, np.ndarray]:
    """Return the tensors as llama.cpp's converter (conversion/qwen.py, `Qwen3NextModel`) writes them."""
    heads, k_dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
    v_dim = config["linear_value_head_dim"] * config["linear_num_value_heads"] // heads
    written: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        stem = name.removesuffix(".weight")
        if name.endswith("norm.weight") or ".pre_fc_norm_" in name:
            x = x + (not name.endswith("linear_attn.norm.weight"))
        if stem in OUTSIDE:
            written[OUTSIDE[stem] + ".weight"] = x
            continue
        if stem.startswith("mtp.") and not stem.startswith("mtp.layers"):
            written[f"blk.{config['num_hidden_layers']}.nextn.{NEXTN[stem[4:]]}.weight"] = x
            continue
        _, _, number, inside = (f"model.{stem}" if stem.startswith("mtp.") else stem).replace("mtp.", "").split(".", 3)
        block = f"blk.{int(number) + config['num_hidden_layers'] * stem.startswith('mtp.')}"
        if inside == "linear_attn.A_log":
            written[f"{block}.ssm_a"] = -np.exp(x)
        elif inside == "linear_attn.dt_bias":
            written[f"{block}.ssm_dt.bias"] = x
        elif inside == "mlp.experts.gate_up_proj":
            for part, half in zip(("gate", "up"), np.split(x, 2, axis=1), strict=True):
                written[f"{block}.ffn_{part}_exps.weight"] = half
        elif inside == "linear_attn.in_proj_qkvz" and not legacy:
            groups = x.reshape(heads, 2 * k_dim + 2 * v_dim, -1)
            q, k, v, z = np.split(groups, [k_dim, 2 * k_dim, 2 * k_dim + v_dim], axis=1)
            flat = [part.reshape(-1, x.shape[1]) for part in (q, k, v, z)]
            written[f"{block}.attn_qkv.weight"] = np.concatenate(flat[:3])
            written[f"{block}.attn_gate.weight"] = flat[3]
        else:
            small = inside in ("linear_attn.conv1d", "mlp.shared_expert_gate")
            written[f"{block}.{NAMES[inside]}.weight"] = x.squeeze() if small else x
    return written


def write_file(path: Path, legacy: bool, quantized: bool = False) -> None:
    config = form_config("next")
    writer = gguf.GGUFWriter(path, "qwen3next")
    writer.add_block_count(config["num_hidden_layers"] + 1)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_nextn_predict_layers(1)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, x in to_llama_cpp(config, form_tensors("next"), legacy).items():
        x = np.ascontiguousarray(x, np.float32)
        if quantized and name.endswith(("attn_qkv.weight", "attn_gate.weight", "ssm_in.weight")):
            writer.add_tensor(name, gguf.quants.quantize(x, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("legacy", [False, True], ids=["attn_qkv", "ssm_in"])
def test_a_file_in_llama_cpps_layout_is_the_model_of_the_folder(legacy: bool, tmp_path: Path) -> None:
    write_file(tmp_path / "m.gguf", legacy)
    from_file = load_model(GgufFile(tmp_path / "m.gguf"))
    from_folder = load_model(SafetensorsDirectory(write_form(tmp_path / "hf", "next")))
    want, found = (flatten_params(model.params) for model in (from_folder, from_file))
    assert found.keys() == want.keys()
    for path, leaf in want.items():
        changed = str(path[-1]).endswith("norm") or path[-1] == "a_log"  # 1 + w and -exp(w) round
        tolerance = 1e-6 if changed else 0
        np.testing.assert_allclose(found[path][...], leaf[...], atol=tolerance, rtol=tolerance, err_msg=str(path))
    assert from_file.cfg == from_folder.cfg
    logits, _, mtp_logits = whole(from_file.params, ANSWERS["next/tokens"], graph=from_file.graph)
    agree(logits, "next", "logits")
    agree(mtp_logits, "next", "mtp_logits")


def test_packed_rows_of_a_fused_tensor_are_those_of_split_ones(tmp_path: Path) -> None:
    sources = []
    for legacy in (False, True):
        write_file(tmp_path / f"{legacy}.gguf", legacy, quantized=True)
        file = GgufFile(tmp_path / f"{legacy}.gguf")
        sources.append(split_projections(file, config_from_hf(file.config)))
    for part in ("qkv", "z"):
        name = f"layers.0.linear_attn.in_proj_{part}.weight"
        split, fused = (source.read_packed(name) for source in sources)  # type: ignore[attr-defined]
        assert split is not None and fused is not None
        for field, array in split.arrays.items():
            np.testing.assert_array_equal(fused.arrays[field], array)


# RoPE

YARN = RopeScaling(
    kind="yarn", factor=4.0, original_max_position=64, attention_factor=1.25, beta_fast=16.0, beta_slow=2.0
)
LINEAR = RopeScaling(kind="linear", factor=3.0, original_max_position=64)


def rope_file(path: Path, scaling: dict[str, Any], cfg: ModelConfig | None = None) -> GgufFile:
    """Write and open a file whose metadata have `scaling` under `rope.scaling`, beside what its config needs."""
    cfg = cfg or tiny_config(moe=False, max_position=64)
    extra = {f"qwen35.rope.scaling.{key}": value for key, value in scaling.items()}
    embedding = np.zeros((cfg.vocab_size, cfg.hidden_size), np.float32)
    write_gguf(path, config_to_hf(cfg), [("embed_tokens.weight", lambda: embedding)], "f32", extra)
    return GgufFile(path)


@pytest.mark.parametrize("scaling", [YARN, LINEAR], ids=["yarn", "linear"])
def test_a_scaling_survives_a_file(scaling: RopeScaling, tmp_path: Path) -> None:
    cfg = tiny_config(moe=False, max_position=scaling.max_position, rope_scaling=scaling)
    file = rope_file(tmp_path / "m.gguf", {}, cfg)
    read = config_from_hf(file.config)
    assert read.max_position == cfg.max_position
    assert read.rope_scaling is not None
    assert read.rope_scaling.attention_factor == pytest.approx(scaling.attention_factor, rel=1e-6)
    assert {**vars(read.rope_scaling), "attention_factor": 0} == {**vars(scaling), "attention_factor": 0}


@pytest.mark.parametrize(
    ("metadata", "want"),
    [
        ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_attn_factor": 1.5, "attn_factor": 2.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 3.0},
        ),
        ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": -1.0}, {"rope_type": "yarn", "factor": 4.0}),
        ({"type": "longrope"}, {"rope_type": "longrope", "factor": 1.0}),
    ],
)
def test_metadata_have_llama_cpps_meaning(metadata: dict[str, Any], want: dict[str, Any], tmp_path: Path) -> None:
    rope = rope_file(tmp_path / "m.gguf", metadata).config["rope_parameters"]
    assert {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")} == want


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"type": 3}, "qwen35.rope.scaling.type is 3, expected a text"),
        ({"type": "yarn", "factor": "4"}, "qwen35.rope.scaling.factor is '4', expected a number"),
        ({"type": "yarn", "factor": 4.0, "yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5, which is not supported"),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
    ],
)
def test_values_without_a_counterpart_are_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        rope_file(tmp_path / "m.gguf", metadata)


# llama.cpp itself

LIBLLAMA = os.environ.get("MTPJAX_LIBLLAMA")
needs_llama_cpp = pytest.mark.skipif(
    LIBLLAMA is None, reason="MTPJAX_LIBLLAMA names no libllama.so; see scripts/format_checks/check_llama_cpp.py"
)
LLAMA_TOLERANCE = 1e-3  # of logits up to 12; its sums are those of its own kernels


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True], ids=["attn_qkv", "ssm_in"])
def test_llama_cpp_computes_the_same_from_these_files(legacy: bool, tmp_path: Path) -> None:
    write_file(tmp_path / "m.gguf", legacy)
    llama, tokens = Llama(Path(str(LIBLLAMA))), ANSWERS["next/tokens"].tolist()
    llama.load(tmp_path / "m.gguf")
    agree(llama.logits(tokens)[0], "next", "logits", LLAMA_TOLERANCE)
    hidden = LLM(tmp_path / "m.gguf", dtype="float32", max_model_len=128).hidden_states(tokens)
    mtp_logits = llama.mtp_logits(tokens[1:], np.asarray(hidden).reshape(len(tokens), -1)[:-1])
    assert mtp_logits is not None, "this libllama has no MTP"
    agree(mtp_logits, "next", "mtp_logits", LLAMA_TOLERANCE)


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in ROPE_FORMS if form != "yarn_options"])
def test_llama_cpp_scales_positions_alike(form: str, tmp_path: Path) -> None:
    model = load_model(SafetensorsDirectory(write_form(tmp_path / "hf", form)))
    tensors = [(name.removeprefix("model."), read) for name, _, _, read in export_tensors(model)]
    architecture = "qwen35moe" if model.cfg.num_experts else "qwen35"
    vocabulary = {"tokenizer.ggml.model": "none", f"{architecture}.vocab_size": model.cfg.vocab_size}
    write_gguf(tmp_path / "m.gguf", config_to_hf(model.cfg), tensors, "f32", vocabulary)
    llama = Llama(Path(str(LIBLLAMA)))
    llama.load(tmp_path / "m.gguf")
    agree(llama.logits(ANSWERS[f"{form}/tokens"].tolist())[0], form, "logits", LLAMA_TOLERANCE)
    assert config_from_hf(GgufFile(tmp_path / "m.gguf").config).max_position == model.cfg.max_position


def test_yarn_that_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    cfg = config_from_hf(form_config("yarn_options"))
    with pytest.raises(CheckpointError, match="GGUF cannot hold YaRN with 'truncate': false"):
        write_gguf(tmp_path / "m.gguf", config_to_hf(cfg), [], "f32")
    assert not list(tmp_path.iterdir())
