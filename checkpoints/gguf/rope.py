"""GGUF's metadata about scaled rotary frequencies <-> `rope_parameters` of config.json.

Meanings are those of llama.cpp (llama-model.cpp and llama-context.cpp): cosine and sine are multiplied by
`(1 + 0.1 ln factor) * attn_factor` under YaRN. Its converter writes an `attention_factor` of config.json, which stands
for the first factor, as `yarn_attn_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError


def rope_scaling_from_metadata(file: Path, architecture: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `rope_parameters` that say how frequencies are scaled. A kind is passed on under its name.

    Raises:
        CheckpointError: a value that is no number or has no counterpart.
    """
    prefix = f"{architecture}.rope.scaling"

    def number(key: str) -> float | None:
        value = metadata.get(f"{prefix}.{key}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise CheckpointError(f"{file}: the metadata {prefix}.{key} is {value!r}, expected a number.")
        return value

    factor = number("factor") or 1.0
    kind = metadata.get(f"{prefix}.type", "linear" if factor != 1 else "none")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file}: the metadata {prefix}.type is {kind!r}, expected a name such as 'yarn'.")
    if kind == "none":
        return {"rope_type": "default"}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": round_float32(factor)}
    if (original := number("original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = original
    if kind != "yarn":
        return scaling
    for key, neutral in (("yarn_ext_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        # A negative `yarn_ext_factor` stands for its default.
        if (value := number(key)) is not None and value >= 0 and value != neutral:
            raise CheckpointError(
                f"{file}: the metadata {prefix}.{key} is {value!r}, which is not supported; expected {neutral:g}."
            )
    for key in ("beta_fast", "beta_slow"):
        if (value := number(f"yarn_{key}")) is not None and value > 0:
            scaling[key] = round_float32(value)
    attention, times = number("yarn_attn_factor"), number("attn_factor")
    if attention is not None or times is not None:
        scaling["attention_factor"] = (attention or recommended_attention_factor(factor)) * (times or 1.0)
    return scaling


def rope_scaling_metadata(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of `rope_parameters` without the architecture; the inverse of `rope_scaling_from_metadata`.

    Raises:
        CheckpointError: YaRN with `truncate` false, for which GGUF has no key.
    """
    kind = rope["rope_type"]
    if kind == "default":
        return {}
    factor, original = float(rope["factor"]), rope["original_max_position_embeddings"]
    values: dict[str, Any] = {"type": kind, "factor": factor, "original_context_length": original}
    if kind == "yarn":
        if not rope["truncate"]:
            raise CheckpointError("GGUF cannot hold YaRN with 'truncate': false; llama.cpp always truncates")
        values |= {"yarn_beta_fast": float(rope["beta_fast"]), "yarn_beta_slow": float(rope["beta_slow"])}
        times = rope["attention_factor"] / recommended_attention_factor(factor)
        if abs(times - 1) > 1e-6:
            values["attn_factor"] = times
    return {f"rope.scaling.{key}": value for key, value in values.items()}


def recommended_attention_factor(factor: float) -> float:
    """Return the attention factor of YaRN for a scaling by `factor` (arXiv:2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def round_float32(value: float) -> float:
    """Return the shortest decimal number that a float32 of the file may have come from."""
    return float(f"{value:.6g}")
