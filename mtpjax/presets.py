"""Shapes of the published checkpoints, for abstract evaluation and random weights.

A checkpoint's own config always decides. The sizes of 2b, 4b, 122b-a10b and 397b-a17b are partly from third-party
dumps.
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
        vocab_size=248_320,
        **others,
    )


def _moe(num_experts: int, experts_per_token: int, expert_size: int) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "expert_size": expert_size,
        "shared_expert_size": expert_size,
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
}


def preset(name: str) -> ModelConfig:
    """Return the config of a published size, for example "35b-a3b" or "Qwen3.6-35B-A3B".

    Raises:
        ConfigError: there is no such size; lists the names.
    """
    try:
        return PRESETS[name.lower().removeprefix("qwen3.5-").removeprefix("qwen3.6-")]
    except KeyError:
        raise ConfigError(f"no preset '{name}'; there are: {', '.join(PRESETS)}") from None
