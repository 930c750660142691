"""`config.json`: every key is used, harmless, named in a warning or an error; null is absent; overrides."""

import warnings
from typing import Any

import pytest

from checkpoints.errors import CheckpointWarning
from mtpjax import LLM
from mtpjax.config import ConfigError, RopeScaling
from mtpjax.engine.program_key import step_digest
from mtpjax.hf_config import apply_hf_overrides, config_from_hf, config_to_hf
from mtpjax.hf_config.keys import HARMLESS_AROUND, HARMLESS_IN_ROPE, HARMLESS_IN_TEXT
from tests.golden.forms import form_config
from tests.golden.weights import golden_config
from tests.helpers.models import numpy_model, tiny_config

pytestmark = pytest.mark.fast

MOE, DENSE, NEXT = golden_config("moe_r2"), golden_config("dense_r2"), form_config("next")
REQUIRED_NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "linear_num_key_heads", "vocab_size")
OPTIONAL = (
    "mtp_num_hidden_layers", "tie_word_embeddings", "head_dim", "output_gate_type", "hidden_act", "rms_norm_eps",
    "max_position_embeddings", "linear_conv_kernel_dim", "attention_bias", "attn_output_gate", "layer_types",
    "full_attention_interval", "eos_token_id", "rope_parameters", "rope_scaling", "sliding_window", "norm_topk_prob",
    "mlp_only_layers", "decoder_sparse_step", "text_config", "quantization_config", "num_nextn_predict_layers",
)  # fmt: skip


def nested(text: dict[str, Any], **around: Any) -> dict[str, Any]:
    """Return a config as multimodal repositories have it."""
    model_type = text["model_type"].removesuffix("_text")
    return {"model_type": model_type, "text_config": text, "vision_config": {"depth": 1}, **around}


# Absent values


@pytest.mark.parametrize("key", OPTIONAL)
@pytest.mark.parametrize("raw", [MOE, DENSE], ids=["moe", "dense"])
def test_null_is_absent(raw: dict[str, Any], key: str) -> None:
    absent = {name: value for name, value in raw.items() if name != key}
    want = config_from_hf(absent)
    assert config_from_hf(absent | {key: None}) == want
    if key != "text_config":
        assert config_from_hf(nested(absent | {key: None})) == want


def test_null_in_rope_parameters_is_absent() -> None:
    rope = MOE["rope_parameters"]
    given = rope | {"factor": None, "type": None, "beta_fast": None, "original_max_position_embeddings": None}
    assert config_from_hf(MOE | {"rope_parameters": given}) == config_from_hf(MOE)


@pytest.mark.parametrize("key", REQUIRED_NUMBERS)
def test_null_in_place_of_a_required_number_is_missing(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        config_from_hf(MOE | {key: None})


def test_a_dense_size_of_null_in_a_moe_config() -> None:
    assert config_from_hf(MOE | {"intermediate_size": None}) == config_from_hf(MOE)


# Forms


@pytest.mark.parametrize(
    ("raw", "model_type", "architecture"),
    [
        (DENSE, "qwen3_5_text", "Qwen3_5ForCausalLM"),
        (DENSE, "qwen3_5", "Qwen3_5ForConditionalGeneration"),
        (MOE, "qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
        (MOE, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    ],
)
def test_flat_and_nested_forms_are_one_model(raw: dict[str, Any], model_type: str, architecture: str) -> None:
    flat = raw | {"model_type": model_type, "architectures": [architecture], "bos_token_id": 1, "num_experts": 8}
    if raw is DENSE:
        del flat["num_experts"]
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert config_from_hf(flat) == config_from_hf(nested(flat)) == config_from_hf(flat | quantized)
    assert config_from_hf(nested(flat, **quantized)) == config_from_hf(raw)


def test_qwen3_next_is_read() -> None:
    """It is the model of `moe_r3` with another name: flat RoPE keys, no `layer_types`, no word of the MTP head."""
    want = config_from_hf(golden_config("moe_r3")).without_mtp()
    assert config_from_hf(NEXT) == want
    without = {key: value for key, value in NEXT.items() if key != "eos_token_id"}
    assert config_from_hf(without).stop_token_ids == (151645, 151643)
    assert config_from_hf(NEXT | {"num_nextn_predict_layers": 1}).mtp_layers == 1


def test_qwen4_exp_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'model_type' is 'qwen4_exp'; supported: qwen3_5, .*, qwen3_next"):
        config_from_hf(MOE | {"model_type": "qwen4_exp"})


# Keys


@pytest.mark.parametrize("raw", [MOE, DENSE, NEXT], ids=["moe", "dense", "next"])
def test_an_unknown_key_is_named_once(raw: dict[str, Any]) -> None:
    with pytest.warns(CheckpointWarning, match="^file has 1 unknown key.*'logit_scale'$"):
        config_from_hf(raw | {"logit_scale": 2.0}, source="file")
    with pytest.warns(CheckpointWarning, match="^file: text_config has 1 unknown key.*'logit_scale'$"):
        config_from_hf(nested(raw | {"logit_scale": 2.0}), source="file")
    with pytest.warns(
        CheckpointWarning, match=r"^file has 1 unknown key.*'rms_norm_epss' .did you mean 'rms_norm_eps'"
    ):
        config_from_hf(raw | {"rms_norm_epss": 1e-5}, source="file")


@pytest.mark.parametrize("key", ["rope_scaling", "rope_theta", "num_experts", "rms_norm_eps"])
def test_keys_of_the_text_model_outside_of_it_are_named(key: str) -> None:
    with pytest.warns(CheckpointWarning, match=f"^file has 1 unknown key.*'{key}'"):
        config_from_hf(nested(MOE, **{key: 1}), source="file")


def test_unknown_rope_keys_are_named() -> None:
    rope = MOE["rope_parameters"]
    for extra in ({"factor": 4.0}, {"rope_thetaa": 1e6}, {"long_factor": [1.0]}):
        with pytest.warns(CheckpointWarning, match=f"rope_parameters has 1 unknown key.*{next(iter(extra))!r}"):
            config_from_hf(MOE | {"rope_parameters": rope | extra})
    with pytest.warns(CheckpointWarning, match="rope_parameters has 1 unknown key.*'rope_theta'"):
        config_from_hf(MOE | {"rope_parameters": {"full_attention": rope, "rope_theta": 3.0}})


def test_harmless_keys_are_silent_and_have_a_reason() -> None:
    in_text = {key: 1 for key in HARMLESS_IN_TEXT if key not in MOE and key != "text_config"}
    around = {key: 1 for key in HARMLESS_AROUND if key not in ("vision_config",)}
    rope = MOE["rope_parameters"] | dict.fromkeys(HARMLESS_IN_ROPE, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from_hf(nested(MOE | in_text | {"rope_parameters": rope}, **around))
        config_from_hf(MOE | in_text)
    assert all(len(reason) > 3 for table in (HARMLESS_AROUND, HARMLESS_IN_TEXT) for reason in table.values())


CHANGES_THE_RESULT = [
    ("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("attn_output_gate", False),
    ("use_sliding_window", True), ("sliding_window", 4096), ("norm_topk_prob", False), ("decoder_sparse_step", 2),
    ("mlp_only_layers", [0]), ("mtp_use_dedicated_embeddings", True),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CHANGES_THE_RESULT, ids=[key for key, _ in CHANGES_THE_RESULT])
def test_a_value_that_makes_it_another_model_is_an_error(key: str, value: object) -> None:
    raw = {name: entry for name, entry in NEXT.items() if name != "use_sliding_window"}
    for config in (raw | {key: value}, nested(MOE | {key: value})):
        with pytest.raises(ConfigError, match=f"'{key}' is {value!r}".replace("[", r"\[").replace("]", r"\]")):
            config_from_hf(config)


def test_an_unused_sliding_window_is_harmless() -> None:
    raw = MOE | {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
    assert config_from_hf(raw) == config_from_hf(MOE)


# Any value under any key

ODD: list[Any] = [
    None, True, 0, 1, -1, 3, 0.5, -2.0, 4.0, 10**30, float("inf"), float("nan"), "", "yarn", "linear", "4", [], [1],
    [None], {}, {"rope_type": "yarn"}, {"full_attention": {}}, ["full_attention"], 64,
]  # fmt: skip
ROPE_KEYS = ("rope_type", "type", "factor", "beta_fast", "truncate", "mscale", "attention_factor")


@pytest.mark.parametrize("form", ["yarn_dense", "yarn_moe", "linear_dense", "next"])
def test_any_change_is_read_or_refused(form: str) -> None:
    """What is read is written and read back to the same; what is not is a ConfigError, at once."""
    raw, num_read = form_config(form), 0
    for key in [*raw, "rope_scaling", "text_config", "sliding_window", "original_max_position_embeddings"]:
        num_read += sum(is_read(raw | {key: value}) for value in ODD)
    for key in ROPE_KEYS if "rope_parameters" in raw else ():
        num_read += sum(is_read(raw | {"rope_parameters": raw["rope_parameters"] | {key: value}}) for value in ODD)
    assert num_read > 100


def is_read(raw: dict[str, Any]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        try:
            cfg = config_from_hf(raw)
        except ConfigError:
            return False
        assert config_from_hf(config_to_hf(cfg)) == cfg
        return True


# RoPE

YARN = {"rope_type": "yarn", "factor": 4.0}


def scaling(rope: dict[str, Any], **config: Any) -> RopeScaling | None:
    return config_from_hf(DENSE | {"rope_parameters": DENSE["rope_parameters"] | rope} | config).rope_scaling


@pytest.mark.parametrize("kind", ["mrope", "default"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_mrope_is_plain_rope_for_text(kind: str, key: str, name: str) -> None:
    base = {k: v for k, v in DENSE["rope_parameters"].items() if k != "rope_type"}
    raw = DENSE | ({key: base | {name: kind}} if key == "rope_parameters" else {key: {name: kind}})
    assert config_from_hf(raw) == config_from_hf(DENSE)


def test_defaults_of_yarn() -> None:
    want = RopeScaling(kind="yarn", factor=4.0, original_max_position=4096, attention_factor=1.138629436111989)
    assert scaling(YARN) == want
    cfg = config_from_hf(DENSE | {"rope_parameters": DENSE["rope_parameters"] | YARN})
    assert cfg.max_position == 16_384
    # `original_max_position_embeddings` of the config goes first, then that of the parameters, then the maximum.
    original = {"original_max_position_embeddings": 1024}
    assert scaling(YARN | original).original_max_position == 1024  # type: ignore[union-attr]
    assert scaling(YARN | {"original_max_position_embeddings": 9}, **original) == scaling(YARN | original)
    assert scaling({"rope_type": "yarn"} | original) == scaling(YARN | original)  # the ratio of the two


@pytest.mark.parametrize("options", [{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7}, {"truncate": False}])
def test_a_scaled_config_is_written_and_read_back(options: dict[str, Any]) -> None:
    for rope in (YARN | options | {"beta_fast": 16}, {"rope_type": "linear", "factor": 2.5}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)  # `mscale` alone has no effect, and is said so
            cfg = config_from_hf(DENSE | {"rope_parameters": DENSE["rope_parameters"] | rope})
        assert config_from_hf(config_to_hf(cfg)) == cfg
        assert hash(cfg) != hash(config_from_hf(DENSE))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "'rope_type' is 'dynamic'; supported: 'default', 'mrope', 'linear', ",
        ),
        ({"rope_type": "yarn", "factor": 0.5}, "'factor' is 0.5; supported: a number >= 1"),
        ({"rope_type": "linear"}, "'factor' is None"),
        ({"rope_type": "yarn", "factor": "4"}, "'factor' is '4'"),
        (YARN | {"attention_factor": -1.0}, "'attention_factor' is -1.0"),
        (YARN | {"beta_fast": 1, "beta_slow": 2}, "'beta_fast' is 1.0; supported: a number >= beta_slow = 2"),
        (YARN | {"truncate": "no"}, "'truncate' is 'no'"),
        (YARN | {"original_max_position_embeddings": 0}, "'original_max_position_embeddings' is 0"),
        (YARN | {"rope_theta": 1.0}, "'rope_theta' is 1.0; supported: a number > 1"),
        (YARN | {"type": "linear"}, "'rope_type' and 'type' of 'rope_parameters' is \"'yarn' and 'linear'\""),
        ({"full_attention": None}, "'full_attention' is None"),
        ({"linear_attention": {"rope_theta": 1e6}}, "'full_attention' is None"),
    ],
)
def test_impossible_scalings_are_named(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scaling(rope)
    assert message in str(caught.value)


def test_the_key_of_a_compiled_program_sees_the_scaling() -> None:
    configs = [tiny_config(moe=False, rope_scaling=s) for s in (None, scaling(YARN), scaling(YARN | {"beta_slow": 2}))]
    assert len({step_digest(config_to_hf, cfg, (), None) for cfg in configs}) == 3


# Overrides


def test_overrides_are_merged_object_by_object() -> None:
    config = {"a": 1, "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "b": [1]}}
    over = {"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "b": [2]}, "c": {"d": 1}}
    merged = apply_hf_overrides(config, over)
    rope = {"rope_type": "yarn", "rope_theta": 5.0, "factor": 2.0}
    assert merged == {"a": 1, "text_config": {"rope_parameters": rope, "b": [2]}, "c": {"d": 1}}
    assert config["text_config"] == {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "b": [1]}
    assert apply_hf_overrides(config, {}) == config


def test_text_config_reaches_a_flat_config() -> None:
    over = {"text_config": {"rope_parameters": YARN}, "rms_norm_eps": 1e-5}
    cfg = config_from_hf(apply_hf_overrides(DENSE, over))
    assert cfg.rope_scaling == scaling(YARN) and cfg.norm_eps == 1e-5
    assert config_from_hf(apply_hf_overrides(nested(DENSE), {"text_config": over["text_config"]})) == config_from_hf(
        DENSE | {"rope_parameters": DENSE["rope_parameters"] | YARN}
    )


def test_bad_overrides_are_refused() -> None:
    for bad in ("yarn", ["a"], {1: 2}):
        with pytest.raises(ValueError, match="hf_overrides is .*; expected a dictionary of keys of config.json"):
            LLM(hf_overrides=bad)  # type: ignore[arg-type]
    weights: list[dict[str, Any]] = [{"quantization_config": {}}, {"text_config": {"quantization_config": None}}]
    for quantized in weights:
        with pytest.raises(ValueError, match="hf_overrides cannot change quantization_config"):
            LLM(hf_overrides=quantized)
    with pytest.raises(ValueError, match="hf_overrides are for reading a checkpoint, but the model is already loaded"):
        LLM(numpy_model(tiny_config(moe=False)), hf_overrides={})
    with pytest.warns(CheckpointWarning, match="'hidden_sizes' .did you mean 'hidden_size'"):
        LLM(hf_overrides={"hidden_sizes": 3})
