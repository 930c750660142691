"""Writing a GGUF file that llama.cpp opens, through the `gguf` package; IQ4_NL is encoded here, the package cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import CheckpointError
from checkpoints.gguf.block_types import IQ4_TABLE
from checkpoints.gguf.names import Heads, converted, names
from checkpoints.packed_array import pack4
from checkpoints.quantize import nearest_codes

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "iq4_nl")
_ALWAYS_WIDE = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "ssm_a", "ssm_dt.bias")
_PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_ROWS = 4096  # encoded at a time


def encode_iq4_nl(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """IQ4_NL blocks of `[..., D]`, D a multiple of 32: `[..., D / 32 * 18]` bytes."""
    codes, scale = nearest_codes(x.reshape(-1, 32).astype(np.float32), IQ4_TABLE)
    raw = np.concatenate([scale.view(np.uint8).reshape(-1, 2), pack4(codes)], axis=1)
    return raw.reshape(*x.shape[:-1], -1)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError("writing GGUF needs the package gguf, which is not installed: pip install gguf") from None
    return gguf


def _encoded(x: NDArray[np.float32], kind: str) -> NDArray[Any]:
    gguf = _package()
    if kind in _PLAIN:
        return x.astype(_PLAIN[kind])
    if kind == "iq4_nl":
        rows = x.reshape(-1, x.shape[-1])
        pieces = [encode_iq4_nl(rows[i : i + _ROWS]) for i in range(0, len(rows), _ROWS)]
        return np.concatenate(pieces).reshape(*x.shape[:-1], -1)
    return gguf.quants.quantize(x, getattr(gguf.GGMLQuantizationType, kind.upper()))


def write_gguf(
    target: str | os.PathLike[str],
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Callable[[], NDArray[Any]]]],
    kind: str,
    tokenizer: dict[str, Any] | None = None,
) -> int:
    """Write `target`; returns the number of tensors. Matrices become `kind`, vectors, routers and taps stay float32.

    Args:
        config: flat config.json of the model.
        tensors: canonical names (experts fused) and how to read them, one at a time.
        kind: one of `TYPES`. A matrix whose rows are no whole blocks is stored as F16.
        tokenizer: further metadata by full key: a text, a number, or a list of either.

    The file appears under its name only when it is whole. Raises CheckpointError when it exists already.
    """
    gguf, path = _package(), Path(target)
    if path.exists():
        raise CheckpointError(f"{path}: exists already. Choose another name, or delete it first.")
    if kind not in TYPES:
        raise ValueError(f"type {kind!r}; expected one of {', '.join(TYPES)}")
    mtp = config["mtp_num_hidden_layers"]
    arch = "qwen35moe" if "num_experts" in config else "qwen35"
    part = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(part, arch)
    for key, value in (_metadata(config, arch) | (tokenizer or {})).items():
        _add(writer, key, value)
    heads = Heads(
        *(config[f"linear_{name}"] for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))
    )
    table = names(config["layer_types"], mtp > 0)
    count = 0
    try:
        for name, read in tensors:
            theirs, how = table[name]
            x = read().astype(np.float32)
            halves = np.split(x, 2, axis=1) if how == "gate and up" else [converted(x, how, heads, to_gguf=True)]
            for their, half in zip(theirs, halves, strict=True):
                wide = half.ndim == 1 or their.endswith(_ALWAYS_WIDE)
                chosen = "f32" if wide else kind if kind in _PLAIN or half.shape[-1] % 32 == 0 else "f16"
                data = np.ascontiguousarray(_encoded(np.ascontiguousarray(half), chosen))
                raw = getattr(gguf.GGMLQuantizationType, chosen.upper())
                writer.add_tensor(their, data.view(np.uint8) if chosen == "bf16" else data, raw_dtype=raw)
                count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    except BaseException:
        writer.close()
        part.unlink(missing_ok=True)
        raise
    return count


def _metadata(config: dict[str, Any], arch: str) -> dict[str, Any]:
    types, rope = config["layer_types"], config["rope_parameters"]
    mtp, values = config["mtp_num_hidden_layers"], config["linear_num_value_heads"]
    rotary = round(rope["partial_rotary_factor"] * config["head_dim"])
    moe = (
        {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        }
        if arch == "qwen35moe"
        else {"feed_forward_length": config["intermediate_size"]}
    )
    own: dict[str, Any] = {
        "block_count": len(types) + mtp,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": rotary,
        "rope.dimension_sections": [rotary // 2 - 2 * (rotary // 6), rotary // 6, rotary // 6, 0],
        "full_attention_interval": types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1,
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * config["linear_value_head_dim"],
        **moe,
    }
    if mtp:
        own["nextn_predict_layers"] = mtp
    return {f"{arch}.{key}": value for key, value in own.items()}


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
