"""The `config.json` of a Hugging Face checkpoint -> `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.known_keys import warn_of_unknown_keys
from mtpjax.config import DEFAULT_STOP_TOKEN_IDS, FULL, LINEAR, ConfigError, ModelConfig
from mtpjax.hf_config.keys import HARMLESS_AROUND, HARMLESS_IN_TEXT, NEUTRAL
from mtpjax.hf_config.reader import Reader
from mtpjax.hf_config.rope import read_rope

MAX_EXPERTS = 65_536  # of a layer; as many names of tensors are made
DENSE_TYPES = ("qwen3_5", "qwen3_5_text")
MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
NEXT_TYPE = "qwen3_next"  # the layers of qwen3_5_moe, with other names of the DeltaNet's projections
MODEL_TYPES = (*DENSE_TYPES, *MOE_TYPES, NEXT_TYPE)
OUTPUT_GATE_ACTS = ("silu", "swish", "sigmoid")
NEXT_STOP_TOKEN_IDS = (151645, 151643)  # <|im_end|>, <|endoftext|> of the older vocabulary


def config_from_hf(raw: Any, *, source: str = "config.json") -> ModelConfig:
    """Read a Hugging Face config, nested (`text_config`) or flat. A key whose value is null counts as absent.

    Args:
        raw: the parsed JSON, which must be an object.
        source: the file that errors and warnings name.

    Raises:
        ConfigError: unknown `model_type`, unsupported rope type or activation, missing or impossible values.

    Warns:
        CheckpointWarning: keys that this program neither uses nor knows to be harmless (`keys.py`).
    """
    outer, get = _readers(raw, source)
    model_type = get.get("model_type", outer.get("model_type"))
    if model_type not in MODEL_TYPES:
        models = "(Qwen3.6 and Qwen3.8 use the names of Qwen3.5)"
        raise get.unsupported("'model_type'", model_type, f"{', '.join(MODEL_TYPES)} {models}")
    moe = model_type not in DENSE_TYPES
    _check_neutral(get, moe)
    output_gate_act = get.choice("output_gate_type", OUTPUT_GATE_ACTS, "silu")
    num_layers = get.int("num_hidden_layers", high=10_000)  # as many entries are made of it
    layer_pattern = _shortest_pattern(_layer_types(get, num_layers))
    head_dim = get.int("head_dim", 256)
    rope = read_rope(get, head_dim)
    cfg = ModelConfig(
        hidden_size=get.int("hidden_size"),
        num_layers=num_layers,
        layer_pattern=layer_pattern,
        q_heads=get.int("num_attention_heads"),
        kv_heads=get.int("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=rope.rotary_dim,
        rope_theta=rope.rope_theta,
        rope_scaling=rope.rope_scaling,
        linear_k_heads=get.int("linear_num_key_heads"),
        linear_v_heads=get.int("linear_num_value_heads"),
        linear_k_dim=get.int("linear_key_head_dim"),
        linear_v_dim=get.int("linear_value_head_dim"),
        conv_width=get.int("linear_conv_kernel_dim", 4, low=2),
        vocab_size=get.int("vocab_size"),
        mlp_size=0 if moe else get.int("intermediate_size"),
        num_experts=get.int("num_experts", high=MAX_EXPERTS) if moe else 0,
        experts_per_token=get.int("num_experts_per_tok") if moe else 0,
        expert_size=get.int("moe_intermediate_size") if moe else 0,
        shared_expert_size=get.int("shared_expert_intermediate_size") if moe else 0,
        tied_embeddings=get.bool("tie_word_embeddings", outer.bool("tie_word_embeddings", False)),
        norm_eps=get.float("rms_norm_eps", 1e-6),
        output_gate_act=output_gate_act,
        max_position=rope.max_position,
        mtp_layers=get.int("mtp_num_hidden_layers", get.int("num_nextn_predict_layers", 0, low=0), low=0),
        stop_token_ids=_stop_token_ids(get, outer, NEXT_STOP_TOKEN_IDS if model_type == NEXT_TYPE else None),
    )
    _check_sizes(cfg, get)
    _warn_of_unknown_keys(outer, get, moe)
    return cfg


def _readers(raw: Any, source: str) -> tuple[Reader, Reader]:
    """Return a reader of the whole object, and one of the text model's part of it, which may be the same one."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, found {type(raw).__name__}")
    outer = Reader(raw, source)
    nested = outer.object("text_config")
    return outer, outer if nested is None else Reader(nested, f"{source}: text_config")


def _check_neutral(get: Reader, moe: bool) -> None:
    """Raise ConfigError for a value that would make it another model than the one that is computed."""
    for key, value in NEUTRAL.items():
        if key == "hidden_act":
            get.choice(key, ("silu", "swish"), value)
        elif moe or key not in ("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"):
            get.choice(key, (value,), value)
        else:
            get.used.add(key)  # a dense model has no experts
    window = get.get("sliding_window")
    if window is not None and "use_sliding_window" not in get.raw:
        raise get.unsupported("'sliding_window'", window, 'null, or any value beside "use_sliding_window": false')


def _layer_types(get: Reader, num_layers: int) -> tuple[str, ...]:
    """Read the type of each layer: `layer_types`, or every `full_attention_interval`-th layer is attention."""
    types = get.get("layer_types")
    if types is None:
        interval = get.int("full_attention_interval", 4)
        types = [FULL if (i + 1) % interval == 0 else LINEAR for i in range(num_layers)]
    if not isinstance(types, list | tuple) or len(types) != num_layers or any(t not in (LINEAR, FULL) for t in types):
        supported = f"a list of {num_layers} (num_hidden_layers) of '{LINEAR}' / '{FULL}'"
        raise get.unsupported("'layer_types'", types, supported)
    return tuple(types)


def _shortest_pattern(types: tuple[str, ...]) -> tuple[str, ...]:
    """Return the shortest run of layer types whose repetition is `types`."""
    lengths = (n for n in range(1, len(types) + 1) if len(types) % n == 0)
    return next(types[:n] for n in lengths if types[:n] * (len(types) // n) == types)


def _stop_token_ids(get: Reader, outer: Reader, default: tuple[int, ...] | None) -> tuple[int, ...]:
    """Read `eos_token_id`, an id or a list of ids, from the text config or the object around it."""
    eos = get.get("eos_token_id", outer.get("eos_token_id"))
    ids = tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (eos,))
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise get.unsupported("'eos_token_id'", eos, "a whole number >= 0 or a list of them")
    return ids or default or DEFAULT_STOP_TOKEN_IDS


def _check_sizes(cfg: ModelConfig, get: Reader) -> None:
    """Raise ConfigError where values that are possible each for itself do not fit together."""
    for heads, shared, keys in (
        (cfg.q_heads, cfg.kv_heads, "num_attention_heads / num_key_value_heads"),
        (cfg.linear_v_heads, cfg.linear_k_heads, "linear_num_value_heads / linear_num_key_heads"),
    ):
        if heads % shared:
            raise get.unsupported(f"'{keys}'", f"{heads} / {shared}", "a whole ratio")
    if cfg.mtp_layers > 1:
        raise get.unsupported("'mtp_num_hidden_layers'", cfg.mtp_layers, "0, 1 (all published checkpoints have 1)")
    if cfg.experts_per_token > cfg.num_experts:
        supported = f"at most num_experts = {cfg.num_experts}"
        raise get.unsupported("'num_experts_per_tok'", cfg.experts_per_token, supported)


def _warn_of_unknown_keys(outer: Reader, get: Reader, moe: bool) -> None:
    harmless = dict(HARMLESS_IN_TEXT)
    if moe:
        harmless["intermediate_size"] = "of dense layers, and every layer has experts"
    warn_of_unknown_keys(f"{get.source} has", get.raw, get.used, harmless)
    if outer is not get:
        warn_of_unknown_keys(f"{outer.source} has", outer.raw, outer.used, HARMLESS_AROUND)
