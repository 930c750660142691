"""Configs of the random models that the benchmarks run on. Their weights are noise, which does not change the speed."""

from __future__ import annotations

from dataclasses import replace

from mtpjax.config import FULL, LINEAR, ModelConfig

# About 50 M active parameters.
MOE_50M_ACTIVE = ModelConfig(
    hidden_size=384,
    num_layers=12,
    layer_pattern=(LINEAR, LINEAR, LINEAR, FULL),
    q_heads=6,
    kv_heads=2,
    head_dim=64,
    rotary_dim=16,
    rope_theta=1e7,
    linear_k_heads=8,
    linear_v_heads=16,
    linear_k_dim=64,
    linear_v_dim=64,
    conv_width=4,
    vocab_size=32768,
    num_experts=16,
    experts_per_token=4,
    expert_size=512,
    shared_expert_size=512,
    mtp_layers=1,
)

# As deep as the 35B-A3B, and narrower than the model above, so that it runs as fast.
MOE_40_LAYERS = replace(
    MOE_50M_ACTIVE,
    num_layers=40,
    hidden_size=256,
    linear_k_heads=4,
    linear_v_heads=8,
    expert_size=192,
    shared_expert_size=192,
)

# 0.78 B parameters without the MTP head; top-8 of 64 experts.
MOE_780M = ModelConfig(
    hidden_size=1024,
    num_layers=12,
    layer_pattern=(LINEAR, LINEAR, LINEAR, FULL),
    q_heads=8,
    kv_heads=2,
    head_dim=256,
    rotary_dim=64,
    rope_theta=1e7,
    linear_k_heads=8,
    linear_v_heads=16,
    linear_k_dim=128,
    linear_v_dim=128,
    conv_width=4,
    vocab_size=32768,
    num_experts=64,
    experts_per_token=8,
    expert_size=256,
    shared_expert_size=256,
    mtp_layers=1,
)
