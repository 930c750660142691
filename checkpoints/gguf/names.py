"""The names and conventions of GGUF for Qwen3.5/3.6, translated to and from those of the published checkpoints.

GGUF differs as follows: RMSNorm gains are stored as 1 + w, the decay as -exp(A_log), and the convolution without its
middle axis. Gate and up projections of the experts are two tensors. The value heads of a DeltaNet are in the order
(repeat, key head) instead of (key head, repeat), which makes a difference if there are more value than key heads. Files
of Qwen3-Next (`qwen3next`) keep the published order of value heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Convention(Enum):
    """How GGUF stores a tensor, compared with the published checkpoint."""

    SAME = "the same values"
    NORM_GAIN = "1 + w"
    ROW_VECTOR = "[D] instead of [1, D]"
    DECAY = "-exp(w), in GGUF's order of value heads"
    VALUE_HEADS = "one entry per value head, in GGUF's order"
    VALUE_ROWS = "value_head_dim rows per value head, in GGUF's order"
    QKV_ROWS = "as VALUE_ROWS, after the rows of the queries and keys"
    VALUE_COLUMNS = "value_head_dim columns per value head, in GGUF's order"
    CONVOLUTION = "as QKV_ROWS, and [C, K] instead of [C, 1, K]"
    GATE_UP = "two tensors, gate and up, instead of one with both"


class GgufNames(NamedTuple):
    """The GGUF tensors that one published tensor is made of, and their convention."""

    gguf_names: tuple[str, ...]
    convention: Convention


# Canonical name inside a layer -> (name inside a GGUF block, convention).
_COMMON = {
    "input_layernorm.weight": ("attn_norm.weight", Convention.NORM_GAIN),
    "post_attention_layernorm.weight": ("post_attention_norm.weight", Convention.NORM_GAIN),
    "mlp.gate.weight": ("ffn_gate_inp.weight", Convention.SAME),
    "mlp.experts.down_proj": ("ffn_down_exps.weight", Convention.SAME),
    "mlp.shared_expert_gate.weight": ("ffn_gate_inp_shexp.weight", Convention.ROW_VECTOR),
    "mlp.shared_expert.gate_proj.weight": ("ffn_gate_shexp.weight", Convention.SAME),
    "mlp.shared_expert.up_proj.weight": ("ffn_up_shexp.weight", Convention.SAME),
    "mlp.shared_expert.down_proj.weight": ("ffn_down_shexp.weight", Convention.SAME),
    "mlp.gate_proj.weight": ("ffn_gate.weight", Convention.SAME),
    "mlp.up_proj.weight": ("ffn_up.weight", Convention.SAME),
    "mlp.down_proj.weight": ("ffn_down.weight", Convention.SAME),
}
_FULL_ATTENTION = {
    "self_attn.q_proj.weight": ("attn_q.weight", Convention.SAME),
    "self_attn.k_proj.weight": ("attn_k.weight", Convention.SAME),
    "self_attn.v_proj.weight": ("attn_v.weight", Convention.SAME),
    "self_attn.o_proj.weight": ("attn_output.weight", Convention.SAME),
    "self_attn.q_norm.weight": ("attn_q_norm.weight", Convention.NORM_GAIN),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", Convention.NORM_GAIN),
}
_LINEAR_ATTENTION = {
    "linear_attn.in_proj_qkv.weight": ("attn_qkv.weight", Convention.QKV_ROWS),
    "linear_attn.in_proj_z.weight": ("attn_gate.weight", Convention.VALUE_ROWS),
    "linear_attn.in_proj_b.weight": ("ssm_beta.weight", Convention.VALUE_HEADS),
    "linear_attn.in_proj_a.weight": ("ssm_alpha.weight", Convention.VALUE_HEADS),
    "linear_attn.conv1d.weight": ("ssm_conv1d.weight", Convention.CONVOLUTION),
    "linear_attn.A_log": ("ssm_a", Convention.DECAY),
    "linear_attn.dt_bias": ("ssm_dt.bias", Convention.VALUE_HEADS),
    "linear_attn.norm.weight": ("ssm_norm.weight", Convention.SAME),
    "linear_attn.out_proj.weight": ("ssm_out.weight", Convention.VALUE_COLUMNS),
    # Files of Qwen3-Next have the first of these as it is published, and older ones the second, too.
    "linear_attn.in_proj_ba.weight": ("ssm_ba.weight", Convention.SAME),
    "linear_attn.in_proj_qkvz.weight": ("ssm_in.weight", Convention.SAME),
}
_OUTSIDE_LAYERS = {
    "embed_tokens.weight": ("token_embd.weight", Convention.SAME),
    "norm.weight": ("output_norm.weight", Convention.NORM_GAIN),
    "lm_head.weight": ("output.weight", Convention.SAME),
}
_MTP = {
    "mtp.fc.weight": ("nextn.eh_proj.weight", Convention.SAME),
    "mtp.pre_fc_norm_embedding.weight": ("nextn.enorm.weight", Convention.NORM_GAIN),
    "mtp.pre_fc_norm_hidden.weight": ("nextn.hnorm.weight", Convention.NORM_GAIN),
    "mtp.norm.weight": ("nextn.shared_head_norm.weight", Convention.NORM_GAIN),
    # Only in files whose head has an embedding or an LM head of its own.
    "mtp.embed_tokens.weight": ("nextn.embed_tokens.weight", Convention.SAME),
    "mtp.lm_head.weight": ("nextn.shared_head_head.weight", Convention.SAME),
}
_GATE_UP_HF_NAME = "mlp.experts.gate_up_proj"
_GATE_UP_GGUF_NAMES = ("ffn_gate_exps.weight", "ffn_up_exps.weight")


def name_table(layer_types: list[str], has_mtp: bool) -> dict[str, GgufNames]:
    """Return canonical name -> GGUF names and convention, for every tensor that a model may have.

    Args:
        layer_types: "full_attention" or "linear_attention" for every layer of the trunk.
        has_mtp: whether there is an MTP head, which GGUF stores as one more block.
    """
    table = {
        hf_name: GgufNames((gguf_name,), convention) for hf_name, (gguf_name, convention) in _OUTSIDE_LAYERS.items()
    }
    layers = [(f"layers.{i}", f"blk.{i}", layer_type) for i, layer_type in enumerate(layer_types)]
    if has_mtp:
        block = f"blk.{len(layer_types)}"
        layers.append(("mtp.layers.0", block, "full_attention"))
        for hf_name, (gguf_name, convention) in _MTP.items():
            table[hf_name] = GgufNames((f"{block}.{gguf_name}",), convention)
    for prefix, block, layer_type in layers:
        in_layer = _COMMON | (_FULL_ATTENTION if layer_type == "full_attention" else _LINEAR_ATTENTION)
        for hf_name, (gguf_name, convention) in in_layer.items():
            table[f"{prefix}.{hf_name}"] = GgufNames((f"{block}.{gguf_name}",), convention)
        table[f"{prefix}.{_GATE_UP_HF_NAME}"] = GgufNames(
            tuple(f"{block}.{gguf_name}" for gguf_name in _GATE_UP_GGUF_NAMES), Convention.GATE_UP
        )
    return table


@dataclass(frozen=True)
class DeltaNetHeads:
    """The number and size of the heads of a DeltaNet layer, and whether GGUF reorders its value heads."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    reordered: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DeltaNetHeads:
        """Take the heads from a flat config.json."""
        return cls(
            config["linear_num_key_heads"],
            config["linear_num_value_heads"],
            config["linear_key_head_dim"],
            config["linear_value_head_dim"],
            reordered=config["model_type"] != "qwen3_next",
        )

    def reorder_values(self, x: NDArray[Any], size: int, to_gguf: bool) -> NDArray[Any]:
        """Reorder value heads, of `size` entries each along axis 0.

        `to_gguf`: from the order (key head, repeat) to GGUF's order (repeat, key head); else back.
        """
        if not self.reordered:
            return x
        repeat = self.num_value_heads // self.num_key_heads
        first, second = (self.num_key_heads, repeat) if to_gguf else (repeat, self.num_key_heads)
        blocks = x.reshape(first, second, size, *x.shape[1:])
        return np.ascontiguousarray(np.swapaxes(blocks, 0, 1)).reshape(x.shape)

    def reorder_value_columns(self, x: NDArray[Any], size: int, to_gguf: bool) -> NDArray[Any]:
        """Reorder value heads, of `size` entries each along the last axis of the matrix `x`."""
        return np.ascontiguousarray(self.reorder_values(np.ascontiguousarray(x.T), size, to_gguf).T)


def convert_tensor(x: NDArray[Any], convention: Convention, heads: DeltaNetHeads, to_gguf: bool) -> NDArray[Any]:
    """Convert a tensor from the published convention to GGUF's (`to_gguf`), or back.

    SAME and GATE_UP leave `x` as it is: the caller splits or joins gate and up.
    """
    match convention:
        case Convention.NORM_GAIN:
            return x.astype(np.float32) + np.float32(1 if to_gguf else -1)
        case Convention.ROW_VECTOR:
            return x.reshape(-1) if to_gguf else x.reshape(1, -1)
        case Convention.DECAY:
            decay = x.astype(np.float32)
            return heads.reorder_values(-np.exp(decay) if to_gguf else np.log(-decay), 1, to_gguf)
        case Convention.VALUE_HEADS:
            return heads.reorder_values(x, 1, to_gguf)
        case Convention.VALUE_ROWS:
            return heads.reorder_values(x, heads.value_head_dim, to_gguf)
        case Convention.VALUE_COLUMNS:
            return heads.reorder_value_columns(x, heads.value_head_dim, to_gguf)
        case Convention.QKV_ROWS:
            return _reorder_qkv_rows(x.reshape(x.shape[0], -1), heads, to_gguf)
        case Convention.CONVOLUTION:
            reordered = _reorder_qkv_rows(x.reshape(x.shape[0], -1), heads, to_gguf)
            return reordered if to_gguf else reordered[:, None]
    return x


def _reorder_qkv_rows(x: NDArray[Any], heads: DeltaNetHeads, to_gguf: bool) -> NDArray[Any]:
    """Reorder the value rows of `x`; the rows of the queries and keys before them stay."""
    start = 2 * heads.num_key_heads * heads.key_head_dim
    return np.concatenate([x[:start], heads.reorder_values(x[start:], heads.value_head_dim, to_gguf)])
