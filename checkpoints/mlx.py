"""Recognise folders converted for MLX, whose tensors have the published names and other values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.source import TensorInfo

_CONVOLUTION = ".conv1d.weight"
_DRAFTER = "qwen3_5_mtp"  # `model_type` of a folder with an MTP head alone


def refuse_mlx(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError if a folder was converted for MLX.

    Signs: `quantization` in config.json (others write `quantization_config`), the taps of a convolution on its middle
    axis, `[C, K, 1]` instead of `[C, 1, K]`, and an MTP head in a folder of its own with bare names. Such folders are
    not converted back, because some have 1 added to their norms, once or twice, and others not.
    """
    taps = [info for name, info in tensors.items() if name.endswith(_CONVOLUTION) and len(info.shape) == 3]
    signs = [
        f"{info.name!r} has shape {list(info.shape)}, with the taps on the middle axis"
        for info in taps
        if info.shape[2] == 1 < info.shape[1]
    ][:1]
    for key in ("quantization", "quantization_config"):
        settings = config.get(key)
        if isinstance(settings, Mapping) and "bits" in settings and "quant_method" not in settings:
            signs.append(f"config.json has {key!r} with 'bits' and no 'quant_method'")
    if config.get("model_type") == _DRAFTER:
        signs.append(f"config.json has the model_type {_DRAFTER!r}")
    if signs:
        raise CheckpointError(
            f"{path}: was converted for MLX ({'; '.join(signs)}), expected the published files. Its norms may have 1 "
            "added or not, which the files do not tell, so they are not converted back: use the original files."
        )
