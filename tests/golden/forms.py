"""Golden models in other published forms: RoPE kinds, Qwen3-Next's fused projections, a head of its own beside `tied`.

Config and tensors, from numpy alone like those of `weights.py`; `make_forms.py` writes the answers of transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.golden.weights import golden_config, golden_tensors, golden_values

PROMPT = 100  # tokens
ORIGINAL = 32  # positions before scaling
STORED_ROWS = slice(1, None, 3)  # of the prompt, to keep the file small

# A low theta puts frequencies on both sides of YaRN's borders and between them.
_SCALED = {"rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_YARN = _SCALED | {"rope_type": "yarn"}
_OPTIONS = {"beta_fast": 4, "beta_slow": 0.5, "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.7}
_LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
# Name -> golden case and changes of its rope_parameters.
_ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_dense": ("dense_r3", _LINEAR),
    "linear_moe": ("moe_r3", _LINEAR),
    "yarn_dense": ("dense_r3", _YARN),
    "yarn_moe": ("moe_r3", _YARN),
    "yarn_options": ("dense_r3", _YARN | _OPTIONS),
    "yarn_attention_factor": ("dense_r3", _YARN | {"attention_factor": 1.4}),
}
_NEXT = {"next": "moe_r3"}
_TIED = {"tied_own_head": "dense_r1"}
ROPE_FORMS, NEXT_FORMS, TIED_FORMS = tuple(_ROPE), tuple(_NEXT), tuple(_TIED)
MTP_FORMS = ("yarn_moe", *NEXT_FORMS)  # whose answers have logits of the MTP head, too
FORMS = (*ROPE_FORMS, *NEXT_FORMS, *TIED_FORMS)


def form_case(form: str) -> str:
    """Return the golden case that a form changes."""
    return _ROPE[form][0] if form in _ROPE else (_NEXT | _TIED)[form]


def form_config(form: str) -> dict[str, Any]:
    """Return the `config.json` of a form."""
    config = golden_config(form_case(form))
    if form in _ROPE:
        parameters = config["rope_parameters"] | _ROPE[form][1]
        return config | {"rope_parameters": parameters, "max_position_embeddings": ORIGINAL}
    return _next_config(config) if form in _NEXT else config


def form_tensors(form: str) -> dict[str, np.ndarray]:
    """Return all tensors of a form by published name, float32."""
    tensors = golden_tensors(form_case(form))
    if form in _TIED:
        name, like = "lm_head.weight", tensors["model.embed_tokens.weight"]
        return tensors | {name: golden_values(f"{form}/{name}", name, like.shape)}
    return _next_tensors(form, tensors) if form in _NEXT else tensors


def _next_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config as Qwen3-Next publishes it: flat RoPE keys, no word of the MTP head."""
    rope = config["rope_parameters"]
    left_out = {"rope_parameters", "layer_types", "attn_output_gate", "mtp_use_dedicated_embeddings"}
    kept = {key: value for key, value in config.items() if key not in {*left_out, "mtp_num_hidden_layers"}}
    return kept | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "intermediate_size": 5120,
        "use_sliding_window": False,
    }


def _next_tensors(form: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors with two fused projections of their own random values in place of the four of Qwen3.5."""
    fused: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        stem, dot, projection = name.partition(".linear_attn.in_proj_")
        if not dot:
            fused[name] = array
            continue
        pair = {"qkv": ("qkv", "z"), "b": ("b", "a")}.get(projection.removesuffix(".weight"))
        if pair is not None:
            rows = sum(len(tensors[f"{stem}{dot}{part}.weight"]) for part in pair)
            new = f"{stem}{dot}{''.join(pair)}.weight"
            # The name gives the scale of the values; that of the projection in `weights.py` keeps logits well apart.
            fused[new] = golden_values(f"{form}/{new}", name, (rows, array.shape[1]))
    return fused
