"""`ModelConfig`: which `config.json` files are read, how the others are refused, and the published sizes."""

import copy
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import jax
import pytest
from flax import nnx

from mtpjax.config import DEFAULT_STOP_TOKEN_IDS, FULL, LINEAR, ConfigError, ModelConfig
from mtpjax.hf_config import config_from_hf, config_to_hf
from mtpjax.model import abstract_model
from mtpjax.presets import PRESETS, preset

pytestmark = pytest.mark.fast

ROPE = {
    "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
}  # fmt: skip
# The text part of the published config.json of Qwen3.6-35B-A3B.
MOE: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_hidden_layers": 40,
    "layer_types": ([LINEAR] * 3 + [FULL]) * 10, "full_attention_interval": 4, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "attn_output_gate": True, "attention_bias": False,
    "attention_dropout": 0.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_parameters": ROPE,
    "max_position_embeddings": 262_144, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32", "output_gate_type": "swish", "num_experts": 256, "num_experts_per_tok": 8,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "router_aux_loss_coef": 0.001,
    "mlp_only_layers": [], "vocab_size": 248_320, "tie_word_embeddings": False, "eos_token_id": 248_044,
    "pad_token_id": None, "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
DENSE: dict[str, Any] = {
    **{k: v for k, v in MOE.items() if "expert" not in k and k not in ("moe_intermediate_size", "output_gate_type")},
    "model_type": "qwen3_5_text", "hidden_size": 1024, "num_hidden_layers": 24,
    "layer_types": ([LINEAR] * 3 + [FULL]) * 6, "num_attention_heads": 8, "linear_num_value_heads": 16,
    "intermediate_size": 3584, "tie_word_embeddings": True,
}  # fmt: skip


def nested(text: dict[str, Any], **top: Any) -> dict[str, Any]:
    """Return a config as the multimodal repositories publish it."""
    outer = {"model_type": text["model_type"].removesuffix("_text"), "vision_config": {"depth": 27}}
    return outer | {"text_config": text, "image_token_id": 248_056, "tie_word_embeddings": False} | top


# Reading


@pytest.mark.parametrize(("raw", "name"), [(MOE, "35b-a3b"), (DENSE, "0.8b")], ids=["moe", "dense"])
def test_published_config_is_the_preset_nested_or_flat(raw: Any, name: str) -> None:
    want = replace(PRESETS[name], output_gate_act=raw.get("output_gate_type", "silu"), stop_token_ids=(248_044,))
    assert config_from_hf(raw) == want
    assert config_from_hf(nested(raw)) == want


def test_model_type_may_stand_only_on_the_outside() -> None:
    inner = {k: v for k, v in MOE.items() if k != "model_type"}
    assert config_from_hf(nested(MOE) | {"text_config": inner}) == config_from_hf(MOE)


def test_values_inside_win_over_those_outside() -> None:
    assert config_from_hf(nested(DENSE, tie_word_embeddings=False, eos_token_id=1)).tied_embeddings
    assert config_from_hf(nested(DENSE, eos_token_id=1)).stop_token_ids == (248_044,)
    outside = {k: v for k, v in DENSE.items() if k not in ("tie_word_embeddings", "eos_token_id")}
    cfg = config_from_hf(nested(outside, tie_word_embeddings=True, eos_token_id=[7, 8]))
    assert cfg.tied_embeddings and cfg.stop_token_ids == (7, 8)


def test_absent_values_have_the_published_defaults() -> None:
    optional = (
        "layer_types", "head_dim", "rope_parameters", "attn_output_gate", "attention_bias", "hidden_act",
        "rms_norm_eps", "max_position_embeddings", "linear_conv_kernel_dim", "output_gate_type",
        "tie_word_embeddings", "eos_token_id", "full_attention_interval",
    )  # fmt: skip
    bare = {k: v for k, v in MOE.items() if k not in optional}
    assert config_from_hf(bare) == PRESETS["35b-a3b"]
    assert config_from_hf(bare).stop_token_ids == DEFAULT_STOP_TOKEN_IDS
    del bare["mtp_num_hidden_layers"]
    assert config_from_hf(bare) == PRESETS["35b-a3b"].without_mtp()


def test_layer_types_follow_the_interval_or_the_list() -> None:
    raw = {k: v for k, v in DENSE.items() if k != "layer_types"}
    three = config_from_hf(raw | {"full_attention_interval": 3})
    assert three.layer_pattern == (LINEAR, LINEAR, FULL) and three.num_superblocks == 8
    own = config_from_hf(raw | {"num_hidden_layers": 3, "layer_types": [FULL, LINEAR, FULL]})
    assert own.layer_pattern == (FULL, LINEAR, FULL) and own.num_superblocks == 1
    assert (own.linear_layers, own.full_layers) == (1, 2)
    same = config_from_hf(raw | {"num_hidden_layers": 5, "layer_types": [LINEAR] * 5})
    assert same.layer_pattern == (LINEAR,) and same.num_superblocks == 5 and same.full_layers == 0


def test_rope_values_may_stand_flat() -> None:
    flat = {k: v for k, v in MOE.items() if k != "rope_parameters"}
    cfg = config_from_hf(flat | {"rope_theta": 5e6, "partial_rotary_factor": 0.5})
    assert (cfg.rope_theta, cfg.rotary_dim) == (5e6, 128)
    mixed = config_from_hf(
        MOE | {"rope_parameters": {"rope_theta": 3e6}, "partial_rotary_factor": 0.5, "rope_theta": 1.0}
    )
    assert (mixed.rope_theta, mixed.rotary_dim) == (3e6, 128)
    assert config_from_hf(MOE | {"rope_scaling": None}) == config_from_hf(MOE)
    assert config_from_hf(MOE | {"rope_scaling": {"rope_type": "default"}}) == config_from_hf(MOE)


def test_derived_sizes() -> None:
    cfg = PRESETS["35b-a3b"]
    assert (cfg.key_size, cfg.value_size, cfg.conv_channels) == (2048, 4096, 8192)
    assert (cfg.num_superblocks, cfg.linear_per_block, cfg.full_per_block) == (10, 3, 1)
    assert (cfg.linear_layers, cfg.full_layers) == (30, 10)


# Writing


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("mtp", [1, 0])
def test_to_hf_is_read_back_equal(name: str, mtp: int) -> None:
    cfg = replace(
        PRESETS[name], mtp_layers=mtp, norm_eps=1e-5, output_gate_act="sigmoid", max_position=99, stop_token_ids=(3, 4)
    )
    before = copy.deepcopy(cfg)
    assert config_from_hf(config_to_hf(cfg)) == cfg == before
    assert config_from_hf({"model_type": "qwen3_5", "text_config": config_to_hf(cfg)}) == cfg


def test_every_rotary_size_survives_the_fraction() -> None:
    for head in (24, 64, 88, 100, 256):  # 58 / 88 * 88 < 58
        for rotary in range(2, head + 1, 2):
            cfg = replace(PRESETS["0.8b"], head_dim=head, rotary_dim=rotary)
            assert config_from_hf(config_to_hf(cfg)).rotary_dim == rotary


# Refusing

REQUIRED = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "vocab_size",
)  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "key"),
    [(MOE, k) for k in (*REQUIRED, "num_experts", "num_experts_per_tok", "moe_intermediate_size")]
    + [(MOE, "shared_expert_intermediate_size")]
    + [(DENSE, k) for k in (*REQUIRED, "intermediate_size")],
)
def test_missing_value_is_named(raw: Any, key: str) -> None:
    less = {k: v for k, v in raw.items() if k != key}
    with pytest.raises(ConfigError, match=f"^some/config.json: '{key}' is missing; .*a whole number"):
        config_from_hf(less, source="some/config.json")
    with pytest.raises(ConfigError, match=f"^config.json: text_config: '{key}' is missing"):
        config_from_hf(nested(less) | {"model_type": raw["model_type"]})


WRONG = [
    # key, value found, what is supported
    ("model_type", "qwen4_exp", "qwen3_5, qwen3_5_text, qwen3_5_moe, qwen3_5_moe_text, qwen3_next"),
    ("model_type", ["qwen3_5"], "qwen3_5, qwen3_5_text"),
    ("hidden_act", "gelu", "'silu'"),
    ("attention_bias", True, "False"),
    ("attn_output_gate", False, "True"),
    ("output_gate_type", "tanh", "'silu', 'swish', 'sigmoid'"),
    ("num_hidden_layers", 0, "a whole number >= 1"),
    ("num_hidden_layers", "40", "a whole number >= 1"),
    ("num_hidden_layers", 10**30, "a whole number >= 1 and <= 10,000"),
    ("hidden_size", 10**30, "a whole number >= 1 and <= 9,007,199,254,740,992"),
    ("hidden_size", 2048.0, "a whole number >= 1"),
    ("hidden_size", True, "a whole number >= 1"),
    ("vocab_size", -5, "a whole number >= 1"),
    ("linear_conv_kernel_dim", 1, "a whole number >= 2"),
    ("rms_norm_eps", 0, "a number > 0"),
    ("rms_norm_eps", float("nan"), "a number > 0"),
    ("rms_norm_eps", "1e-6", "a number > 0"),
    ("layer_types", [FULL], "a list of 40 .num_hidden_layers. of 'linear_attention' / 'full_attention'"),
    ("layer_types", ["sliding_attention"] * 40, "a list of 40"),
    ("layer_types", "full_attention", "a list of 40"),
    ("layer_types", [[FULL]] * 40, "a list of 40"),
    ("num_key_value_heads", 3, "a whole ratio"),
    ("linear_num_key_heads", 5, "a whole ratio"),
    ("mtp_num_hidden_layers", 2, "0, 1"),
    ("mtp_num_hidden_layers", -1, "a whole number >= 0"),
    ("num_experts_per_tok", 257, "at most num_experts = 256"),
    ("tie_word_embeddings", "false", "true, false"),
    ("eos_token_id", "<|im_end|>", "a whole number >= 0 or a list of them"),
    ("eos_token_id", [1, None], "a whole number >= 0 or a list of them"),
    ("eos_token_id", -2, "a whole number >= 0"),
    ("rope_parameters", [1e7], "a JSON object"),
    ("text_config", [], "a JSON object"),
]


@pytest.mark.parametrize(("key", "value", "supported"), WRONG, ids=[f"{k}-{v!r:.20}" for k, v, _ in WRONG])
def test_wrong_value_is_named_with_what_is_supported(key: str, value: object, supported: str) -> None:
    with pytest.raises(ConfigError, match="^here: ") as caught:
        config_from_hf(MOE | {key: value}, source="here")
    message = str(caught.value)
    assert key in message and "; supported: " in message
    assert repr(value) in message or f"/ {value}" in message
    assert re.search(supported, message.split("; supported: ")[1])


@pytest.mark.parametrize(
    ("rope", "key", "found"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, "rope_type", "'dynamic'"),
        ({"rope_type": "longrope"}, "rope_type", "'longrope'"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_type", "'llama3'"),
        ({"rope_theta": 0}, "rope_theta", "0"),
        ({"rope_theta": "1e7"}, "rope_theta", "'1e7'"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor", "0.0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor", "1.5"),
        ({"partial_rotary_factor": 5 / 256}, "partial_rotary_factor", "0.01953125"),
    ],
)
def test_unsupported_rope_is_named(rope: dict[str, Any], key: str, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"^here: rope_parameters: '{key}' is {re.escape(found)}; supported: "):
        config_from_hf(MOE | {"rope_parameters": ROPE | rope}, source="here")


@pytest.mark.parametrize("raw", [[], "config", None, 3])
def test_only_objects_are_read(raw: Any) -> None:
    with pytest.raises(ConfigError, match=f"^here: expected a JSON object, found {type(raw).__name__}"):
        config_from_hf(raw, source="here")


def test_unknown_type_in_a_nested_config_says_where() -> None:
    with pytest.raises(ConfigError, match="^config.json: text_config: 'model_type' is 'llama'; supported: qwen3_5, "):
        config_from_hf(nested(MOE | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match="'model_type' is None; supported: "):
        config_from_hf({})


# Presets


def sizes(cfg: ModelConfig) -> tuple[int, int]:
    """Parameters of the trunk and of the MTP head."""
    params = nnx.split(abstract_model(cfg))[1]
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    mtp = sum(leaf.size for leaf in jax.tree.leaves(params["mtp"])) if cfg.mtp_layers else 0
    return whole - mtp, mtp


def test_parameters_of_35b_are_those_of_the_specification() -> None:
    assert sizes(PRESETS["35b-a3b"]) == (34_660_610_688, 844_640_768)
    assert sizes(PRESETS["35b-a3b"].without_mtp()) == (34_660_610_688, 0)


def layer_sizes(cfg: ModelConfig) -> tuple[int, int]:
    """Parameters of a DeltaNet and of an attention layer, added up by hand."""
    d, value, heads = cfg.hidden_size, cfg.value_size, cfg.linear_v_heads
    if cfg.num_experts:
        expert = 3 * d * cfg.expert_size
        mlp = cfg.num_experts * (expert + d) + 3 * d * cfg.shared_expert_size + d
    else:
        mlp = 3 * d * cfg.mlp_size
    linear = d * (cfg.conv_channels + 2 * value + 2 * heads) + 4 * cfg.conv_channels + 2 * heads + cfg.linear_v_dim
    full = d * cfg.head_dim * (3 * cfg.q_heads + 2 * cfg.kv_heads) + 2 * cfg.head_dim
    return linear + 2 * d + mlp, full + 2 * d + mlp


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("0.8b", 0.75),
        ("2b", 1.88),
        ("4b", 4.2),
        ("9b", 8.95),
        ("27b", 26.9),
        ("122b-a10b", 122.1),
        ("397b-a17b", 396.3),
        ("next-80b-a3b", 79.7),
    ],
)
def test_parameters_of_the_other_sizes(name: str, billions: float) -> None:
    cfg = PRESETS[name]
    linear, full = layer_sizes(cfg)
    d = cfg.hidden_size
    vocabulary = cfg.vocab_size * d * (1 if cfg.tied_embeddings else 2)
    trunk = cfg.linear_layers * linear + cfg.full_layers * full + vocabulary + d
    assert sizes(cfg) == (trunk, full + 2 * d * d + 3 * d)
    assert trunk / 1e9 == pytest.approx(billions, rel=0.01)


def test_expert_share_of_35b_by_the_same_sum() -> None:
    linear, full = layer_sizes(PRESETS["35b-a3b"])
    mlp = 805_306_368 + 524_288 + 3_145_728 + 2_048  # routed, router, shared, its gate
    assert (linear - mlp, full - mlp) == (33_722_560, 27_267_584)


@pytest.mark.parametrize("alias", ["35b-a3b", "35B-A3B", "Qwen3.5-35B-A3B", "qwen3.6-35b-a3b"])
def test_preset_names(alias: str) -> None:
    assert preset(alias) is PRESETS["35b-a3b"]


def test_qwen3_next_and_qwen3_8_have_presets() -> None:
    assert preset("Qwen3-Next-80B-A3B") is PRESETS["next-80b-a3b"]
    assert preset("Qwen3-Coder-Next") is PRESETS["next-80b-a3b"]
    assert preset("Qwen3.8-27B") is PRESETS["27b"]


def test_unknown_preset_lists_the_names() -> None:
    with pytest.raises(ConfigError, match="no preset '7b'; there are: 0.8b, 2b, .*397b-a17b"):
        preset("7b")


def test_a_model_without_a_preset_says_what_is_known() -> None:
    name = "Qwen3.8-2.4T-A95B"
    with pytest.raises(ConfigError, match=rf"no preset '{name}' \(model_type qwen3_5_moe_text, 92 layers, 512 experts"):
        preset(name)
    with pytest.raises(ConfigError, match="no preset 'Qwen3.8-35B-A3B'; there are"):
        preset("Qwen3.8-35B-A3B")  # Qwen3.8 has no such size
    with pytest.raises(ConfigError, match="no preset 'Qwen3-4B'; there are"):
        preset("Qwen3-4B")


def test_config_is_a_value() -> None:
    one, other = config_from_hf(MOE), config_from_hf(nested(MOE))
    assert hash(one) == hash(other) and len({one, other, one.without_mtp()}) == 2
    for cfg in PRESETS.values():
        hash(cfg)
    with pytest.raises(FrozenInstanceError):
        one.num_layers = 1  # type: ignore[misc]
    # A static argument of a jitted function: an equal config is the same program.
    traces: list[ModelConfig] = []

    def add_layers(x: int, cfg: ModelConfig) -> int:
        traces.append(cfg)
        return x + cfg.num_layers

    f = jax.jit(add_layers, static_argnums=1)
    assert f(1, one) == f(1, other) == 41 and len(traces) == 1
