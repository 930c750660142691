"""`ModelConfig` -> the `config.json` of a text-only checkpoint."""

from __future__ import annotations

from typing import Any

from mtpjax.config import ModelConfig
from mtpjax.hf_config.rope import rope_to_hf


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
        **rope_to_hf(cfg),
        "linear_num_key_heads": cfg.linear_k_heads,
        "linear_num_value_heads": cfg.linear_v_heads,
        "linear_key_head_dim": cfg.linear_k_dim,
        "linear_value_head_dim": cfg.linear_v_dim,
        "linear_conv_kernel_dim": cfg.conv_width,
        "output_gate_type": cfg.output_gate_act,
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tied_embeddings,
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
