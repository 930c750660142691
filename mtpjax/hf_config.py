"""`config.json` of a Hugging Face checkpoint <-> `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtpjax.config import DEFAULT_STOP_TOKEN_IDS, FULL, LINEAR, ConfigError, ModelConfig

DENSE_TYPES = ("qwen3_5", "qwen3_5_text")
MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
ROPE_TYPES = ("default",)
OUTPUT_GATE_ACTS = ("silu", "swish", "sigmoid")


def config_from_hf(raw: Any, *, source: str = "config.json") -> ModelConfig:
    """Read a Hugging Face config, nested (`text_config`) or flat.

    Args:
        raw: the parsed JSON, which must be an object.
        source: the file that errors name.

    Raises:
        ConfigError: unknown `model_type`, unsupported rope type or activation, missing or impossible values.
    """
    outer, get = _readers(raw, source)
    model_type = get.raw.get("model_type", outer.get("model_type"))
    if model_type not in DENSE_TYPES + MOE_TYPES:
        supported = ", ".join(DENSE_TYPES + MOE_TYPES)
        raise get.unsupported("'model_type'", model_type, f"{supported} (Qwen3.6 uses these names too)")
    moe = model_type in MOE_TYPES
    get.choice("hidden_act", ("silu",), "silu")
    get.choice("attention_bias", (False,), False)
    get.choice("attn_output_gate", (True,), True)
    output_gate_act = get.choice("output_gate_type", OUTPUT_GATE_ACTS, "silu")
    num_layers = get.int("num_hidden_layers")
    layer_pattern = _shortest_pattern(_layer_types(get, num_layers))
    head_dim = get.int("head_dim", 256)
    rotary_dim, rope_theta = _rope(get, head_dim)
    tied = get.raw.get("tie_word_embeddings", outer.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise get.unsupported("'tie_word_embeddings'", tied, "true, false")
    stop_token_ids = _stop_token_ids(get, outer)
    cfg = ModelConfig(
        hidden_size=get.int("hidden_size"),
        num_layers=num_layers,
        layer_pattern=layer_pattern,
        q_heads=get.int("num_attention_heads"),
        kv_heads=get.int("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=rope_theta,
        linear_k_heads=get.int("linear_num_key_heads"),
        linear_v_heads=get.int("linear_num_value_heads"),
        linear_k_dim=get.int("linear_key_head_dim"),
        linear_v_dim=get.int("linear_value_head_dim"),
        conv_width=get.int("linear_conv_kernel_dim", 4, low=2),
        vocab_size=get.int("vocab_size"),
        mlp_size=0 if moe else get.int("intermediate_size"),
        num_experts=get.int("num_experts") if moe else 0,
        experts_per_token=get.int("num_experts_per_tok") if moe else 0,
        expert_size=get.int("moe_intermediate_size") if moe else 0,
        shared_expert_size=get.int("shared_expert_intermediate_size") if moe else 0,
        tied_embeddings=tied,
        norm_eps=get.float("rms_norm_eps", 1e-6),
        output_gate_act=output_gate_act,
        max_position=get.int("max_position_embeddings", 262_144),
        mtp_layers=get.int("mtp_num_hidden_layers", 0, low=0),
        stop_token_ids=stop_token_ids,
    )
    _check_sizes(cfg, get)
    return cfg


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """Return the flat text-only `config.json` that `config_from_hf` reads back to an equal config."""
    moe = cfg.num_experts > 0
    raw: dict[str, Any] = {
        "architectures": ["Qwen3_5MoeForCausalLM" if moe else "Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "layer_types": list(cfg.layer_pattern * cfg.num_superblocks),
        "num_attention_heads": cfg.q_heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "attn_output_gate": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": cfg.rope_theta,
            "partial_rotary_factor": cfg.rotary_dim / cfg.head_dim,
        },
        "linear_num_key_heads": cfg.linear_k_heads,
        "linear_num_value_heads": cfg.linear_v_heads,
        "linear_key_head_dim": cfg.linear_k_dim,
        "linear_value_head_dim": cfg.linear_v_dim,
        "linear_conv_kernel_dim": cfg.conv_width,
        "output_gate_type": cfg.output_gate_act,
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tied_embeddings,
        "max_position_embeddings": cfg.max_position,
        "mtp_num_hidden_layers": cfg.mtp_layers,
        "eos_token_id": list(cfg.stop_token_ids),
    }
    if moe:
        raw |= {
            "num_experts": cfg.num_experts,
            "num_experts_per_tok": cfg.experts_per_token,
            "moe_intermediate_size": cfg.expert_size,
            "shared_expert_intermediate_size": cfg.shared_expert_size,
        }
    else:
        raw["intermediate_size"] = cfg.mlp_size
    return raw


class _Reader:
    """Typed look-ups in one JSON object; every error names the key and what was found."""

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw, self.source = raw, source

    def unsupported(self, key: str, found: object, supported: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key} is {found!r}; supported: {supported}")

    def int(self, key: str, default: int | None = None, low: int = 1) -> int:
        value = self.raw.get(key, default)
        if value is None and key not in self.raw:
            raise ConfigError(f"{self.source}: '{key}' is missing; a Qwen3.5/3.6 text config has it (a whole number)")
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.unsupported(f"'{key}'", value, f"a whole number >= {low}")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.unsupported(f"'{key}'", value, "a number > 0")
        return float(value)

    def choice(self, key: str, options: tuple[object, ...], default: object) -> Any:
        value = self.raw.get(key, default)
        if value not in options:
            raise self.unsupported(f"'{key}'", value, ", ".join(map(repr, options)))
        return value


def _readers(raw: Any, source: str) -> tuple[Mapping[str, Any], _Reader]:
    """Return the whole object, and a reader of the text model's part of it."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source}: expected a JSON object, found {type(raw).__name__}")
    nested = raw.get("text_config")
    if nested is None:
        return raw, _Reader(raw, source)
    if not isinstance(nested, Mapping):
        raise _Reader(raw, source).unsupported("'text_config'", nested, "a JSON object")
    return raw, _Reader(nested, f"{source}: text_config")


def _layer_types(get: _Reader, num_layers: int) -> tuple[str, ...]:
    """Read the type of each layer: `layer_types`, or every `full_attention_interval`-th layer is attention."""
    types = get.raw.get("layer_types")
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


def _rope(get: _Reader, head_dim: int) -> tuple[int, float]:
    """Read the rotary dimensions of a head and theta: from `rope_parameters`, in older files from the config itself."""
    nested = get.raw.get("rope_parameters")
    if nested is not None and not isinstance(nested, Mapping):
        raise get.unsupported("'rope_parameters'", nested, "a JSON object")
    rope = _Reader(get.raw if nested is None else nested, get.source + ": rope_parameters")
    rope.choice("rope_type", ROPE_TYPES, "default")
    scaling = get.raw.get("rope_scaling")
    if isinstance(scaling, Mapping):
        scaling_type = scaling.get("rope_type", scaling.get("type", "default"))
        if scaling_type not in ROPE_TYPES:
            raise get.unsupported("'rope_scaling' type", scaling_type, ", ".join(ROPE_TYPES))
    factor = rope.float("partial_rotary_factor", get.raw.get("partial_rotary_factor", 0.25))
    rotary_dim = int(head_dim * factor + 1e-6)  # a factor such as 58 / 88 must not lose a dimension to rounding
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        supported = "an even number of rotary dims in head_dim"
        raise rope.unsupported("'partial_rotary_factor'", rotary_dim / head_dim, supported)
    return rotary_dim, rope.float("rope_theta", get.raw.get("rope_theta", 1e7))


def _stop_token_ids(get: _Reader, outer: Mapping[str, Any]) -> tuple[int, ...]:
    """Read `eos_token_id`, an id or a list of ids, from the text config or the object around it."""
    eos = get.raw.get("eos_token_id", outer.get("eos_token_id"))
    ids = tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (eos,))
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise get.unsupported("'eos_token_id'", eos, "a whole number >= 0 or a list of them")
    return ids or DEFAULT_STOP_TOKEN_IDS


def _check_sizes(cfg: ModelConfig, get: _Reader) -> None:
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
