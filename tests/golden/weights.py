"""Tiny Qwen3.5 models for the golden tests: a config, weights and prompts for every named case, from numpy alone.

Nothing is stored and nothing depends on a library's random distributions. A tensor is a function of its case and name:
raw Philox bits, whose stream numpy guarantees, mapped to floats by exact arithmetic, so every machine gets the same
values.
"""

import math
import zlib
from typing import Any

import numpy as np

_DEFAULTS: dict[str, Any] = {
    "head_dim": 32,
    "rotary": 0.25,
    "kv_heads": 2,
    "value_dim": 16,
    "experts": 8,
    "top_k": 2,
    "tied": False,
}
# What a case changes; everything it cannot change is in `golden_config`. The ratio r is value heads per key head.
_CASES: dict[str, dict[str, Any]] = {
    "moe_r1": {"moe": True, "layers": 4, "value_heads": 2},
    "moe_r2": {"moe": True, "layers": 8, "value_heads": 4},
    "moe_r3": {"moe": True, "layers": 4, "value_heads": 6, "head_dim": 16, "rotary": 0.5, "kv_heads": 1}
    | {"experts": 16, "top_k": 4},
    "dense_r1": {"moe": False, "layers": 4, "value_heads": 2, "tied": True},
    "dense_r2": {"moe": False, "layers": 8, "value_heads": 4, "head_dim": 16, "rotary": 0.5, "value_dim": 24},
    "dense_r3": {"moe": False, "layers": 4, "value_heads": 6, "kv_heads": 1},
}
CASES = tuple(_CASES)

VOCAB = 160
EOS = VOCAB - 1  # in the config as a real model has it; no prompt and no greedy continuation of ours contains it


def golden_config(case: str) -> dict[str, Any]:
    """The flat text `config.json` of a case, as transformers writes it for a text-only export."""
    spec = _DEFAULTS | _CASES[case]
    layers, moe = int(spec["layers"]), bool(spec["moe"])
    half = int(spec["head_dim"] * spec["rotary"]) // 2  # rotary frequencies, shared out over time, height and width
    config: dict[str, Any] = {
        "architectures": ["Qwen3_5MoeForCausalLM" if moe else "Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)],
        "full_attention_interval": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": spec["kv_heads"],
        "head_dim": spec["head_dim"],
        "attn_output_gate": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": spec["value_heads"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": spec["value_dim"],
        "linear_conv_kernel_dim": 4,
        "mamba_ssm_dtype": "float32",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": spec["rotary"],
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            "mrope_interleaved": True,
        },
        "max_position_embeddings": 4096,
        "tie_word_embeddings": spec["tied"],
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
    }
    if moe:
        config |= {
            "num_experts": spec["experts"],
            "num_experts_per_tok": spec["top_k"],
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "router_aux_loss_coef": 0.001,
        }
    else:
        config |= {"intermediate_size": 96}
    return config


def golden_tensors(case: str) -> dict[str, np.ndarray]:
    """Every float32 tensor of a case by its HF name: trunk, `lm_head.weight` (absent when tied) and `mtp.*`."""
    return {name: golden_values(f"{case}/{name}", name, shape) for name, shape in golden_shapes(case).items()}


def golden_tokens(case: str, length: int, seed: int) -> np.ndarray:
    """A prompt: int32 [length], uniform over the vocabulary without the end token."""
    raw = _raw(f"{case}/tokens/{length}/{seed}", length)
    return (raw % np.uint64(EOS)).astype(np.int32)


def golden_checksum(tensors: dict[str, np.ndarray]) -> int:
    """CRC-32 over names and little-endian bytes in name order: tells a changed generator from a wrong model."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].astype("<f4").tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def golden_shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Tensor shapes by HF name; linear weights are [out, in]."""
    cfg = golden_config(case)
    hidden = int(cfg["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, hidden),
        "model.norm.weight": (hidden,),
    }
    if not cfg["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, hidden)
    for index, kind in enumerate(cfg["layer_types"]):
        mixer = _attention_shapes(cfg) if kind == "full_attention" else _delta_shapes(cfg)
        shapes |= _prefixed(f"model.layers.{index}.", _layer_shapes(cfg, mixer))
    shapes |= _prefixed("mtp.layers.0.", _layer_shapes(cfg, _attention_shapes(cfg)))
    shapes["mtp.fc.weight"] = (hidden, 2 * hidden)  # columns: embedding, then hidden state
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        shapes[f"mtp.{norm}.weight"] = (hidden,)
    return shapes


def _layer_shapes(cfg: dict[str, Any], mixer: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    hidden = cfg["hidden_size"]
    norms = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if "num_experts" not in cfg:
        return norms | mixer | _prefixed("mlp.", _swiglu_shapes(hidden, cfg["intermediate_size"]))
    experts, width = cfg["num_experts"], cfg["moe_intermediate_size"]
    return (
        norms
        | mixer
        | _prefixed("mlp.shared_expert.", _swiglu_shapes(hidden, cfg["shared_expert_intermediate_size"]))
        | {
            "mlp.gate.weight": (experts, hidden),
            "mlp.experts.gate_up_proj": (experts, 2 * width, hidden),
            "mlp.experts.down_proj": (experts, hidden, width),
            "mlp.shared_expert_gate.weight": (1, hidden),
        }
    )


def _swiglu_shapes(hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {"gate_proj.weight": (width, hidden), "up_proj.weight": (width, hidden), "down_proj.weight": (hidden, width)}


def _attention_shapes(cfg: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, dim = cfg["hidden_size"], cfg["head_dim"]
    q, kv = cfg["num_attention_heads"] * dim, cfg["num_key_value_heads"] * dim
    return {
        "self_attn.q_proj.weight": (2 * q, hidden),  # per head: query rows, then gate rows
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.q_norm.weight": (dim,),
        "self_attn.k_norm.weight": (dim,),
    }


def _delta_shapes(cfg: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = cfg["hidden_size"], cfg["linear_num_value_heads"]
    value = heads * cfg["linear_value_head_dim"]
    channels = 2 * cfg["linear_num_key_heads"] * cfg["linear_key_head_dim"] + value
    return {
        "linear_attn.in_proj_qkv.weight": (channels, hidden),
        "linear_attn.in_proj_z.weight": (value, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
        "linear_attn.conv1d.weight": (channels, 1, cfg["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (cfg["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, value),
    }


def _prefixed(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in shapes.items()}


def golden_values(key: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of a tensor that `key` names; its `name` decides their scale.

    Scales that keep every tensor visible in the logits (standard deviation about 3) and rounding errors small.

    The last is why `in_proj_qkv` is large and no head forgets within a token: a DeltaNet output that is tiny before
    its norm would turn float32 rounding into differences of 1e-4 and more in the logits.
    """
    if name.endswith(".A_log"):
        return (math.log(16) * _uniform(key, shape)).astype(np.float32)  # A in [1, 16]
    if name.endswith(".dt_bias"):
        return (-8 + 5 * _uniform(key, shape)).astype(np.float32)  # memories from one token to several chunks
    if name.endswith("linear_attn.norm.weight"):
        return (1 + 0.2 * _normal(key, shape)).astype(np.float32)  # the one norm that is not zero-centred
    if name.endswith("norm.weight") or ".pre_fc_norm_" in name:
        return (0.2 * _normal(key, shape)).astype(np.float32)
    if name == "lm_head.weight" or (name == "model.embed_tokens.weight" and _CASES[key.split("/")[0]].get("tied")):
        scale = 3.0 / math.sqrt(shape[-1])  # the final norm gives rows of length about sqrt(D)
    elif name == "model.embed_tokens.weight":
        scale = 1.0
    else:
        residual = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj"))
        gain = 0.75 if residual else 4.0 if "in_proj_qkv" in name else 1.0
        scale = gain / math.sqrt(shape[-1])
    return (scale * _normal(key, shape)).astype(np.float32)


def _raw(key: str, count: int) -> np.ndarray:
    return np.random.Philox(key=zlib.crc32(key.encode())).random_raw(count)


def _uniform(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [0, 1), multiples of 2^-24."""
    return ((_raw(key, math.prod(shape)) >> np.uint64(40)) * 2.0**-24).reshape(shape)


def _normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64, mean 0, variance 1: the sum of four 16-bit uniforms, whole numbers until the last multiplication."""
    raw = _raw(key, math.prod(shape))
    shifts = np.array([[0], [16], [32], [48]], np.uint64)
    total = ((raw >> shifts) & np.uint64(0xFFFF)).sum(axis=0).astype(np.int64)
    return ((total - 2 * 0xFFFF) * (math.sqrt(3) / 2**16)).reshape(shape)
