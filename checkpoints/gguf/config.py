"""The metadata of a GGUF file as the config.json of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.gguf.header import GgufTensor
from checkpoints.gguf.rope import rope_scaling_from_metadata

# GGUF's `general.architecture` -> `model_type` of config.json.
MODEL_TYPES = {"qwen35moe": "qwen3_5_moe_text", "qwen35": "qwen3_5_text", "qwen3next": "qwen3_next"}


def config_from_metadata(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """Translate metadata to a flat config.json.

    Args:
        file: named in errors.
        metadata: by key, as `read_gguf_header` returns it.
        tensors: by GGUF name. The embedding has the vocabulary size; without an output matrix the two are tied.

    Raises:
        CheckpointError: another architecture, or a value that is missing or makes no sense.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise CheckpointError(
            f"{file}: its general.architecture is {architecture!r}, supported: {', '.join(map(repr, MODEL_TYPES))}."
        )
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{file}: has no tensor 'token_embd.weight'. Is it a whole model, not a part of one?")
    values = _ArchitectureMetadata(file, architecture, metadata)
    num_mtp_layers = values.number("nextn_predict_layers", int, 0)
    num_layers, interval = values.count("block_count") - num_mtp_layers, values.count("full_attention_interval", 4)
    if num_mtp_layers not in (0, 1):
        raise CheckpointError(
            f"{file}: {architecture}.nextn_predict_layers is {num_mtp_layers}, expected 0 or 1 MTP block, as all "
            "published models have."
        )
    if not 0 < num_layers <= 10_000:
        raise CheckpointError(
            f"{file}: {architecture}.block_count is {num_layers + num_mtp_layers} with {num_mtp_layers} MTP blocks, "
            "expected 1 to 10,000 layers."
        )
    is_recurrent = metadata.get(f"{architecture}.attention.recurrent_layers")
    is_recurrent = is_recurrent or [(i + 1) % interval != 0 for i in range(num_layers)]
    if (width := values.count("attention.value_length", values.count("attention.key_length"))) != values.count(
        "attention.key_length"
    ):
        raise CheckpointError(
            f"{file}: {architecture}.attention.value_length is {width}, expected the {architecture}.attention."
            f"key_length, {values.count('attention.key_length')}."
        )
    head_dim, num_value_heads = values.count("attention.key_length"), values.count("ssm.time_step_rank")
    config: dict[str, Any] = {
        "model_type": MODEL_TYPES[architecture],
        "hidden_size": values.count("embedding_length"),
        "num_hidden_layers": num_layers,
        "layer_types": ["linear_attention" if r else "full_attention" for r in is_recurrent[:num_layers]],
        "num_attention_heads": values.count("attention.head_count"),
        "num_key_value_heads": values.count("attention.head_count_kv"),
        "head_dim": head_dim,
        "attn_output_gate": True,
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{values.number('attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_parameters": {
            **rope_scaling_from_metadata(file, architecture, metadata),
            "rope_theta": float(values.number("rope.freq_base", (int, float))),
            "partial_rotary_factor": values.count("rope.dimension_count", head_dim) / head_dim,
        },
        "linear_num_key_heads": values.count("ssm.group_count"),
        "linear_num_value_heads": num_value_heads,
        "linear_key_head_dim": values.count("ssm.state_size"),
        "linear_value_head_dim": values.count("ssm.inner_size") // num_value_heads,
        "linear_conv_kernel_dim": values.count("ssm.conv_kernel"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "max_position_embeddings": values.count("context_length"),
        "mtp_num_hidden_layers": num_mtp_layers,
        "eos_token_id": stop_token_ids(metadata),
    }
    if architecture != "qwen35":
        config |= {
            "num_experts": values.count("expert_count"),
            "num_experts_per_tok": values.count("expert_used_count"),
            "moe_intermediate_size": values.count("expert_feed_forward_length"),
            "shared_expert_intermediate_size": values.count("expert_shared_feed_forward_length"),
        }
    else:
        config["intermediate_size"] = values.count("feed_forward_length")
    return config


class _ArchitectureMetadata:
    """Reads the metadata values whose keys begin with the architecture, and checks them."""

    def __init__(self, file: Path, architecture: str, metadata: Mapping[str, Any]) -> None:
        self.file, self.architecture, self.metadata = file, architecture, metadata

    def number(self, key: str, types: type | tuple[type, ...], default: Any = None) -> Any:
        """Return the value of `key`, which must have one of `types`; a boolean is not a number."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, types) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.file}: the metadata {self.architecture}.{key} is {value!r}, expected a number. "
                "Is the file complete?"
            )
        return value

    def count(self, key: str, default: Any = None) -> int:
        """Return a positive integer. For a list with one value per layer, return the largest."""
        value = self.number(key, (int, list), default)
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) or max(numbers) < 1:
            raise CheckpointError(
                f"{self.file}: the metadata {self.architecture}.{key} is {value!r}, expected a number above zero."
            )
        return max(numbers)


def stop_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end a text: end of sequence and end of turn by number, <|endoftext|> by name."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and "<|endoftext|>" in tokens:
        ids.append(tokens.index("<|endoftext|>"))
    return list(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool)))
