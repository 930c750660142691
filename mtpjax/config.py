"""`ModelConfig`: the one frozen, hashable description of a Qwen3.5 / Qwen3.6 text model.

Letters of array axes in all packages; a letter has one meaning:

    B   sequences of the batch            S   length of the KV cache (positions)
    T   token rows of a step              N   key/value heads
    W   rows of a verify window (k + 1)   Q   query heads
    R   output rows of a step             G   query heads of a key/value head (Q / N)
    k   drafts of a step                  H   size of an attention head
    D   hidden size                       J   DeltaNet key heads
    V   vocabulary                        M   DeltaNet value heads
    E   experts                           Dk  size of a DeltaNet key head
    I   hidden units of an expert / MLP   Dv  size of a DeltaNet value head
    O   output features of a matrix       C   channels of the DeltaNet convolution
    F   input features of a matrix        A   attention layers of the trunk
    P   partial sums of a split-K product L   layers of a stack; in the cache the DeltaNet layers

Axes without a letter have a word: `rows` (token rows of all sequences, B * T), `topk` (experts chosen for a token), `chunk`
(token rows of a DeltaNet chunk), `group` (values of a quantised matrix that share a scale), `width` (taps of the convolution).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

LINEAR, FULL = "linear_attention", "full_attention"
DENSE_TYPES = ("qwen3_5", "qwen3_5_text")
MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
ROPE_TYPES = ("default",)
GATES = ("silu", "swish", "sigmoid")
STOP_TOKENS = (248046, 248044)  # <|im_end|>, <|endoftext|>: the config's own eos is not the chat stop token


class ConfigError(ValueError):
    """A `config.json` that this program cannot run; names the key, what was found and what is supported."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one text model (`config.json`'s `text_config`); hashable, so usable as a static argument.

    `pattern` is the shortest repeating run of layer types and `repeats` how often it stands in the model. `experts == 0`
    means a dense SwiGLU MLP of `mlp_size` hidden units in every layer.
    """

    hidden_size: int
    layers: int
    pattern: tuple[str, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    linear_k_heads: int
    linear_v_heads: int
    linear_k_dim: int
    linear_v_dim: int
    conv_width: int
    vocab_size: int
    mlp_size: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    tied_embeddings: bool = False
    norm_eps: float = 1e-6
    z_gate: str = "silu"
    max_position: int = 262_144
    mtp_layers: int = 1
    stop_tokens: tuple[int, ...] = STOP_TOKENS

    @property
    def repeats(self) -> int:
        return self.layers // len(self.pattern)

    @property
    def linear_per_block(self) -> int:
        return self.pattern.count(LINEAR)

    @property
    def full_per_block(self) -> int:
        return self.pattern.count(FULL)

    @property
    def linear_layers(self) -> int:
        return self.repeats * self.linear_per_block

    @property
    def full_layers(self) -> int:
        return self.repeats * self.full_per_block

    @property
    def key_size(self) -> int:
        return self.linear_k_heads * self.linear_k_dim

    @property
    def value_size(self) -> int:
        return self.linear_v_heads * self.linear_v_dim

    @property
    def conv_size(self) -> int:
        return 2 * self.key_size + self.value_size

    def without_mtp(self) -> ModelConfig:
        return replace(self, mtp_layers=0)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face config, nested (`text_config`) or flat.

        Raises:
            ConfigError: unknown `model_type`, unsupported rope type or activation, missing or impossible values.
        """
        return _from_hf(raw, where)

    def to_hf(self) -> dict[str, Any]:
        """The flat text-only `config.json` that `from_hf` reads back to an equal config."""
        moe = self.experts > 0
        out: dict[str, Any] = {
            "architectures": ["Qwen3_5MoeForCausalLM" if moe else "Qwen3_5ForCausalLM"],
            "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "layer_types": list(self.pattern * self.repeats),
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "attn_output_gate": True,
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_dim / self.head_dim,
            },
            "linear_num_key_heads": self.linear_k_heads,
            "linear_num_value_heads": self.linear_v_heads,
            "linear_key_head_dim": self.linear_k_dim,
            "linear_value_head_dim": self.linear_v_dim,
            "linear_conv_kernel_dim": self.conv_width,
            "output_gate_type": self.z_gate,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied_embeddings,
            "max_position_embeddings": self.max_position,
            "mtp_num_hidden_layers": self.mtp_layers,
            "eos_token_id": list(self.stop_tokens),
        }
        if moe:
            out |= {
                "num_experts": self.experts,
                "num_experts_per_tok": self.experts_per_token,
                "moe_intermediate_size": self.expert_size,
                "shared_expert_intermediate_size": self.shared_expert_size,
            }
        else:
            out["intermediate_size"] = self.mlp_size
        return out


def _shortest_pattern(types: tuple[str, ...]) -> tuple[str, ...]:
    return next(
        types[:n] for n in range(1, len(types) + 1) if len(types) % n == 0 and types[:n] * (len(types) // n) == types
    )


class _Reader:
    """Typed look-ups in one JSON object; every error names the key and what was found."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def fail(self, key: str, found: object, want: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} is {found!r}; supported: {want}")

    def int(self, key: str, default: int | None = None, low: int = 1) -> int:
        value = self.raw.get(key, default)
        if value is None and key not in self.raw:
            raise ConfigError(f"{self.where}: '{key}' is missing; a Qwen3.5/3.6 text config has it (a whole number)")
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.fail(f"'{key}'", value, f"a whole number >= {low}")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.fail(f"'{key}'", value, "a number > 0")
        return float(value)

    def choice(self, key: str, options: tuple, default: object) -> Any:
        value = self.raw.get(key, default)
        if value not in options:
            raise self.fail(f"'{key}'", value, ", ".join(map(repr, options)))
        return value


def _from_hf(raw: Mapping[str, Any], where: str) -> ModelConfig:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    nested = raw.get("text_config")
    if nested is not None and not isinstance(nested, Mapping):
        raise _Reader(raw, where).fail("'text_config'", nested, "a JSON object")
    text = raw if nested is None else nested
    get = _Reader(text, f"{where}: text_config" if text is nested else where)

    supported = DENSE_TYPES + MOE_TYPES
    model_type = text.get("model_type", raw.get("model_type"))
    if model_type not in supported:
        raise get.fail("'model_type'", model_type, ", ".join(supported) + " (Qwen3.6 uses these names too)")
    moe = model_type in MOE_TYPES

    get.choice("hidden_act", ("silu",), "silu")
    get.choice("attention_bias", (False,), False)
    get.choice("attn_output_gate", (True,), True)
    z_gate = get.choice("output_gate_type", GATES, "silu")

    layers = get.int("num_hidden_layers")
    types = text.get("layer_types")
    if types is None:
        every = get.int("full_attention_interval", 4)
        types = [FULL if (i + 1) % every == 0 else LINEAR for i in range(layers)]
    if not isinstance(types, list | tuple) or len(types) != layers or any(t not in (LINEAR, FULL) for t in types):
        raise get.fail("'layer_types'", types, f"a list of {layers} (num_hidden_layers) of '{LINEAR}' / '{FULL}'")

    head_dim = get.int("head_dim", 256)
    rope_raw = text.get("rope_parameters")
    if rope_raw is not None and not isinstance(rope_raw, Mapping):
        raise get.fail("'rope_parameters'", rope_raw, "a JSON object")
    rope = _Reader(text if rope_raw is None else rope_raw, get.where + ": rope_parameters")
    rope.choice("rope_type", ROPE_TYPES, "default")
    scaling = text.get("rope_scaling")
    if isinstance(scaling, Mapping):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise get.fail("'rope_scaling' type", kind, ", ".join(ROPE_TYPES))
    factor = rope.float("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
    rotary_dim = int(head_dim * factor + 1e-6)  # a factor such as 58 / 88 must not lose a dimension to rounding
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise rope.fail("'partial_rotary_factor'", rotary_dim / head_dim, "an even number of rotary dims in head_dim")

    tied = text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise get.fail("'tie_word_embeddings'", tied, "true, false")
    eos = text.get("eos_token_id", raw.get("eos_token_id"))
    stops = tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (eos,))
    if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in stops):
        raise get.fail("'eos_token_id'", eos, "a whole number >= 0 or a list of them")
    cfg = ModelConfig(
        hidden_size=get.int("hidden_size"),
        layers=layers,
        pattern=_shortest_pattern(tuple(types)),
        q_heads=get.int("num_attention_heads"),
        kv_heads=get.int("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=rope.float("rope_theta", text.get("rope_theta", 1e7)),
        linear_k_heads=get.int("linear_num_key_heads"),
        linear_v_heads=get.int("linear_num_value_heads"),
        linear_k_dim=get.int("linear_key_head_dim"),
        linear_v_dim=get.int("linear_value_head_dim"),
        conv_width=get.int("linear_conv_kernel_dim", 4, low=2),
        vocab_size=get.int("vocab_size"),
        mlp_size=0 if moe else get.int("intermediate_size"),
        experts=get.int("num_experts") if moe else 0,
        experts_per_token=get.int("num_experts_per_tok") if moe else 0,
        expert_size=get.int("moe_intermediate_size") if moe else 0,
        shared_expert_size=get.int("shared_expert_intermediate_size") if moe else 0,
        tied_embeddings=tied,
        norm_eps=get.float("rms_norm_eps", 1e-6),
        z_gate=z_gate,
        max_position=get.int("max_position_embeddings", 262_144),
        mtp_layers=get.int("mtp_num_hidden_layers", 0, low=0),
        stop_tokens=stops or STOP_TOKENS,
    )
    for whole, part, names in (
        (cfg.q_heads, cfg.kv_heads, "num_attention_heads / num_key_value_heads"),
        (cfg.linear_v_heads, cfg.linear_k_heads, "linear_num_value_heads / linear_num_key_heads"),
    ):
        if whole % part:
            raise get.fail(f"'{names}'", f"{whole} / {part}", "a whole ratio")
    if cfg.mtp_layers > 1:
        raise get.fail("'mtp_num_hidden_layers'", cfg.mtp_layers, "0, 1 (all published checkpoints have 1)")
    if moe and cfg.experts_per_token > cfg.experts:
        raise get.fail("'num_experts_per_tok'", cfg.experts_per_token, f"at most num_experts = {cfg.experts}")
    return cfg


def _published(
    hidden: int, layers: int, q: int, kv: int, v_heads: int, *, tied: bool = False, **mlp: Any
) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden, layers=layers, pattern=(LINEAR, LINEAR, LINEAR, FULL), q_heads=q, kv_heads=kv, head_dim=256,
        rotary_dim=64, rope_theta=1e7, linear_k_heads=16, linear_v_heads=v_heads, linear_k_dim=128, linear_v_dim=128,
        conv_width=4, vocab_size=248_320, tied_embeddings=tied, **mlp,
    )  # fmt: skip


def _moe(experts: int, per_token: int, size: int) -> dict[str, Any]:
    return {"experts": experts, "experts_per_token": per_token, "expert_size": size, "shared_expert_size": size}


PRESETS: dict[str, ModelConfig] = {
    "0.8b": _published(1024, 24, 8, 2, 16, tied=True, mlp_size=3584),
    "2b": _published(2048, 24, 8, 2, 16, tied=True, mlp_size=6144),
    "4b": _published(2560, 32, 16, 4, 32, tied=True, mlp_size=9216),
    "9b": _published(4096, 32, 16, 4, 32, mlp_size=12288),
    "27b": _published(5120, 64, 24, 4, 48, mlp_size=17408),
    "35b-a3b": _published(2048, 40, 16, 2, 32, **_moe(256, 8, 512)),
    "122b-a10b": _published(3072, 48, 32, 2, 64, **_moe(256, 8, 1024)),
    "397b-a17b": _published(4096, 60, 32, 2, 64, **_moe(512, 10, 1024)),
}
"""Shapes of the published checkpoints, for abstract evaluation; a checkpoint's own config always decides. The sizes of
2b, 4b, 122b-a10b and 397b-a17b are partly from third-party dumps."""


def preset(name: str) -> ModelConfig:
    """The published size `name`, e.g. "35b-a3b". Raises ConfigError that lists the names."""
    try:
        return PRESETS[name.lower().removeprefix("qwen3.5-").removeprefix("qwen3.6-")]
    except KeyError:
        raise ConfigError(f"no preset '{name}'; there are: {', '.join(PRESETS)}") from None
