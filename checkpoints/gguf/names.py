"""GGUF's names and conventions for Qwen3.5/3.6, and the canonical ones of this program: both ways.

The conventions that differ: RMSNorm gains are stored as 1 + w, the decay as -exp(A_log), the convolution without its middle
axis, gate and up experts apart, and, where there are more value heads than key heads, the value heads of a DeltaNet in
the order (repeat, key head) instead of (key head, repeat).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# canonical name inside a layer -> (name inside a GGUF block, convention)
_COMMON = {
    "input_layernorm.weight": ("attn_norm.weight", "norm"),
    "post_attention_layernorm.weight": ("post_attention_norm.weight", "norm"),
    "mlp.gate.weight": ("ffn_gate_inp.weight", ""),
    "mlp.experts.down_proj": ("ffn_down_exps.weight", ""),
    "mlp.shared_expert_gate.weight": ("ffn_gate_inp_shexp.weight", "row"),
    "mlp.shared_expert.gate_proj.weight": ("ffn_gate_shexp.weight", ""),
    "mlp.shared_expert.up_proj.weight": ("ffn_up_shexp.weight", ""),
    "mlp.shared_expert.down_proj.weight": ("ffn_down_shexp.weight", ""),
    "mlp.gate_proj.weight": ("ffn_gate.weight", ""),
    "mlp.up_proj.weight": ("ffn_up.weight", ""),
    "mlp.down_proj.weight": ("ffn_down.weight", ""),
}
_FULL = {
    "self_attn.q_proj.weight": ("attn_q.weight", ""),
    "self_attn.k_proj.weight": ("attn_k.weight", ""),
    "self_attn.v_proj.weight": ("attn_v.weight", ""),
    "self_attn.o_proj.weight": ("attn_output.weight", ""),
    "self_attn.q_norm.weight": ("attn_q_norm.weight", "norm"),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", "norm"),
}
_LINEAR = {
    "linear_attn.in_proj_qkv.weight": ("attn_qkv.weight", "value rows"),
    "linear_attn.in_proj_z.weight": ("attn_gate.weight", "rows"),
    "linear_attn.in_proj_b.weight": ("ssm_beta.weight", "heads"),
    "linear_attn.in_proj_a.weight": ("ssm_alpha.weight", "heads"),
    "linear_attn.conv1d.weight": ("ssm_conv1d.weight", "convolution"),
    "linear_attn.A_log": ("ssm_a", "decay"),
    "linear_attn.dt_bias": ("ssm_dt.bias", "heads"),
    "linear_attn.norm.weight": ("ssm_norm.weight", ""),
    "linear_attn.out_proj.weight": ("ssm_out.weight", "columns"),
}
_OUTSIDE = {
    "embed_tokens.weight": ("token_embd.weight", ""),
    "norm.weight": ("output_norm.weight", "norm"),
    "lm_head.weight": ("output.weight", ""),
}
_MTP = {
    "mtp.fc.weight": ("nextn.eh_proj.weight", ""),
    "mtp.pre_fc_norm_embedding.weight": ("nextn.enorm.weight", "norm"),
    "mtp.pre_fc_norm_hidden.weight": ("nextn.hnorm.weight", "norm"),
    "mtp.norm.weight": ("nextn.shared_head_norm.weight", "norm"),
}
GATE_UP = ("mlp.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"))


def names(layer_types: list[str], mtp: bool) -> dict[str, tuple[tuple[str, ...], str]]:
    """Canonical name -> the GGUF tensors that it is made of, and the convention, for every tensor that a model may have."""
    found: dict[str, tuple[tuple[str, ...], str]] = {ours: ((theirs,), how) for ours, (theirs, how) in _OUTSIDE.items()}
    layers = [(f"layers.{i}", f"blk.{i}", kind) for i, kind in enumerate(layer_types)]
    if mtp:
        block = f"blk.{len(layer_types)}"
        layers.append(("mtp.layers.0", block, "full_attention"))
        found |= {ours: ((f"{block}.{theirs}",), how) for ours, (theirs, how) in _MTP.items()}
    for prefix, block, kind in layers:
        for ours, (theirs, how) in (_COMMON | (_FULL if kind == "full_attention" else _LINEAR)).items():
            found[f"{prefix}.{ours}"] = ((f"{block}.{theirs}",), how)
        found[f"{prefix}.{GATE_UP[0]}"] = (tuple(f"{block}.{theirs}" for theirs in GATE_UP[1]), "gate and up")
    return found


@dataclass(frozen=True)
class Heads:
    """The heads of the DeltaNet layers."""

    keys: int
    values: int
    key_dim: int
    value_dim: int

    def reorder(self, x: NDArray[Any], size: int, to_gguf: bool) -> NDArray[Any]:
        """Value heads of `size` entries each along axis 0, between (key head, repeat) and GGUF's (repeat, key head)."""
        repeat = self.values // self.keys
        first, second = (self.keys, repeat) if to_gguf else (repeat, self.keys)
        blocks = x.reshape(first, second, size, *x.shape[1:])
        return np.ascontiguousarray(np.swapaxes(blocks, 0, 1)).reshape(x.shape)


def converted(x: NDArray[Any], how: str, heads: Heads, to_gguf: bool) -> NDArray[Any]:
    """A tensor in GGUF's convention from the published one (`to_gguf`), or back."""
    if how == "norm":
        return x.astype(np.float32) + np.float32(1 if to_gguf else -1)
    if how == "row":
        return x.reshape(-1) if to_gguf else x.reshape(1, -1)
    if how == "decay":
        wide = x.astype(np.float32)
        return heads.reorder(-np.exp(wide) if to_gguf else np.log(-wide), 1, to_gguf)
    if how == "heads":
        return heads.reorder(x, 1, to_gguf)
    if how == "rows":
        return heads.reorder(x, heads.value_dim, to_gguf)
    if how == "columns":
        return np.ascontiguousarray(heads.reorder(np.ascontiguousarray(x.T), heads.value_dim, to_gguf).T)
    if how in ("value rows", "convolution"):
        flat = x.reshape(x.shape[0], -1)
        start = 2 * heads.keys * heads.key_dim
        flat = np.concatenate([flat[:start], heads.reorder(flat[start:], heads.value_dim, to_gguf)])
        return flat if how == "value rows" or to_gguf else flat[:, None]
    return x
