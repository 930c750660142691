"""Shapes of the published checkpoints, for abstract evaluation and random weights.

A checkpoint's own config always decides. The sizes of 2b, 4b, 122b-a10b and 397b-a17b are partly from third-party
dumps. Qwen3.8-27B has the sizes of Qwen3.5-27B (headers of its GGUF files, read by others). Qwen3.8-2.4T-A95B loads by
its config, too, but no source at hand gives all its sizes, so there is no preset of it.
"""

from __future__ import annotations

from typing import Any

from mtpjax.config import FULL, LINEAR, ConfigError, ModelConfig


def _published(
    hidden_size: int, num_layers: int, q_heads: int, kv_heads: int, linear_v_heads: int, **others: Any
) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        layer_pattern=(LINEAR, LINEAR, LINEAR, FULL),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=256,
        rotary_dim=64,
        rope_theta=1e7,
        linear_k_heads=16,
        linear_v_heads=linear_v_heads,
        linear_k_dim=128,
        linear_v_dim=128,
        conv_width=4,
        **{"vocab_size": 248_320, **others},
    )


def _moe(num_experts: int, experts_per_token: int, expert_size: int) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "expert_size": expert_size,
        "shared_expert_size": expert_size,
    }


ALIASES = {
    "qwen3.8-27b": "27b",
    "qwen3-next-80b-a3b": "next-80b-a3b",
    "qwen3-coder-next": "next-80b-a3b",
}
WITHOUT_PRESET = {
    "qwen3.8-2.4t-a95b": "model_type qwen3_5_moe_text, 92 layers, 512 experts of which 10 for a token",
}
PRESETS: dict[str, ModelConfig] = {
    "0.8b": _published(1024, 24, 8, 2, 16, mlp_size=3584, tied_embeddings=True),
    "2b": _published(2048, 24, 8, 2, 16, mlp_size=6144, tied_embeddings=True),
    "4b": _published(2560, 32, 16, 4, 32, mlp_size=9216, tied_embeddings=True),
    "9b": _published(4096, 32, 16, 4, 32, mlp_size=12288),
    "27b": _published(5120, 64, 24, 4, 48, mlp_size=17408),
    "35b-a3b": _published(2048, 40, 16, 2, 32, **_moe(256, 8, 512)),
    "122b-a10b": _published(3072, 48, 32, 2, 64, **_moe(256, 8, 1024)),
    "397b-a17b": _published(4096, 60, 32, 2, 64, **_moe(512, 10, 1024)),
    # Qwen3-Next-80B-A3B and Qwen3-Coder-Next
    "next-80b-a3b": _published(
        2048, 48, 16, 2, 32, **_moe(512, 10, 512), vocab_size=151_936, stop_token_ids=(151645, 151643)
    ),
}


def preset(name: str) -> ModelConfig:
    """Return the config of a published size, for example "35b-a3b", "Qwen3.6-35B-A3B" or "Qwen3-Next-80B-A3B".

    Raises:
        ConfigError: there is no such size; lists the names, and says so of a model that is known but not all its sizes.
    """
    lower = name.lower()
    size = ALIASES.get(lower, lower.removeprefix("qwen3.5-").removeprefix("qwen3.6-"))
    if size in PRESETS:
        return PRESETS[size]
    known = WITHOUT_PRESET.get(lower)
    why = f" ({known}; its other sizes are not known here, and its checkpoint loads by its own config)" if known else ""
    raise ConfigError(f"no preset '{name}'{why}; there are: {', '.join(PRESETS)}")
