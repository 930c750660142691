"""Write a GGUF file that llama.cpp opens, with the `gguf` package. IQ4_NL is encoded here: the package cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from checkpoints.code_tables import IQ4_NL_TABLE
from checkpoints.errors import CheckpointError
from checkpoints.gguf.names import Convention, DeltaNetHeads, convert_tensor, name_table
from checkpoints.gguf.rope import rope_scaling_metadata
from checkpoints.packed_array import pack4
from checkpoints.quantize import quantize_blocks

WRITABLE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "iq4_nl")
# Endings of the names of tensors that are small and sensitive: they stay float32.
_ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "ssm_a", "ssm_dt.bias")
_PLAIN_DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
_ROWS_PER_BATCH = 4096  # rows that are encoded at a time


def encode_iq4_nl(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode `[..., D]`, D a multiple of 32, as IQ4_NL blocks: `[..., D / 32 * 18]` bytes."""
    codes, scale = quantize_blocks(x.reshape(-1, 32).astype(np.float32), IQ4_NL_TABLE)
    raw = np.concatenate([scale.view(np.uint8).reshape(-1, 2), pack4(codes)], axis=1)
    return raw.reshape(*x.shape[:-1], -1)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError("writing GGUF needs the package gguf, which is not installed: pip install gguf") from None
    return gguf


def _encode(x: NDArray[np.float32], tensor_type: str) -> NDArray[Any]:
    gguf = _import_gguf()
    if tensor_type in _PLAIN_DTYPES:
        return x.astype(_PLAIN_DTYPES[tensor_type])
    if tensor_type == "iq4_nl":
        rows = x.reshape(-1, x.shape[-1])
        batches = [encode_iq4_nl(rows[i : i + _ROWS_PER_BATCH]) for i in range(0, len(rows), _ROWS_PER_BATCH)]
        return np.concatenate(batches).reshape(*x.shape[:-1], -1)
    return gguf.quants.quantize(x, getattr(gguf.GGMLQuantizationType, tensor_type.upper()))


def write_gguf(
    target: str | os.PathLike[str],
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Callable[[], NDArray[Any]]]],
    tensor_type: str,
    tokenizer: dict[str, Any] | None = None,
) -> int:
    """Write `target` and return the number of tensors. The file appears under its name only when it is complete.

    Matrices get `tensor_type`. Vectors, routers and the convolution stay float32.

    Args:
        target: the file to write.
        config: flat config.json of the model.
        tensors: canonical names (experts fused) and the functions that read them, one at a time.
        tensor_type: one of `WRITABLE_TYPES`. A matrix whose rows are not whole blocks is stored as F16.
        tokenizer: further metadata by full key: a text, a number, or a list of either.

    Raises:
        CheckpointError: `target` exists already, or the package `gguf` is not installed.
        ValueError: `tensor_type` is unknown.
    """
    gguf, path = _import_gguf(), Path(target)
    if path.exists():
        raise CheckpointError(f"{path}: exists already. Choose another name, or delete it first.")
    if tensor_type not in WRITABLE_TYPES:
        raise ValueError(f"type {tensor_type!r}; expected one of {', '.join(WRITABLE_TYPES)}")
    architecture = "qwen35moe" if "num_experts" in config else "qwen35"
    partial = path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(partial, architecture)
    for key, value in (_metadata(config, architecture) | (tokenizer or {})).items():
        _add_metadata(writer, key, value)
    heads = DeltaNetHeads.from_config(config)
    names = name_table(config["layer_types"], config["mtp_num_hidden_layers"] > 0)
    count = 0
    try:
        for name, read in tensors:
            gguf_names, convention = names[name]
            x = read().astype(np.float32)
            if convention is Convention.GATE_UP:
                arrays = np.split(x, 2, axis=1)
            else:
                arrays = [convert_tensor(x, convention, heads, to_gguf=True)]
            for gguf_name, array in zip(gguf_names, arrays, strict=True):
                chosen_type = _choose_type(gguf_name, array, tensor_type)
                data = np.ascontiguousarray(_encode(np.ascontiguousarray(array), chosen_type))
                raw_dtype = getattr(gguf.GGMLQuantizationType, chosen_type.upper())
                writer.add_tensor(
                    gguf_name, data.view(np.uint8) if chosen_type == "bf16" else data, raw_dtype=raw_dtype
                )
                count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    return count


def _choose_type(gguf_name: str, array: NDArray[Any], tensor_type: str) -> str:
    if array.ndim == 1 or gguf_name.endswith(_ALWAYS_FLOAT32):
        return "f32"
    return tensor_type if tensor_type in _PLAIN_DTYPES or array.shape[-1] % 32 == 0 else "f16"


def _metadata(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Translate a flat config.json to metadata by full key; the inverse of `config_from_metadata`."""
    layer_types, rope = config["layer_types"], config["rope_parameters"]
    num_mtp_layers, num_value_heads = config["mtp_num_hidden_layers"], config["linear_num_value_heads"]
    rotary_dim = round(rope["partial_rotary_factor"] * config["head_dim"])
    has_attention = "full_attention" in layer_types
    values: dict[str, Any] = {
        "block_count": len(layer_types) + num_mtp_layers,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": rotary_dim,
        "rope.dimension_sections": [rotary_dim // 2 - 2 * (rotary_dim // 6), rotary_dim // 6, rotary_dim // 6, 0],
        "full_attention_interval": layer_types.index("full_attention") + 1 if has_attention else len(layer_types) + 1,
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": num_value_heads,
        "ssm.inner_size": num_value_heads * config["linear_value_head_dim"],
    }
    if architecture == "qwen35moe":
        values |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        }
    else:
        values["feed_forward_length"] = config["intermediate_size"]
    values |= rope_scaling_metadata(rope)
    if num_mtp_layers:
        values["nextn_predict_layers"] = num_mtp_layers
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _add_metadata(writer: Any, key: str, value: Any) -> None:
    """Add one metadata entry, whose GGUF value type follows the Python type."""
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
