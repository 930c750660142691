"""The sampling advice of a GGUF file as the `generation_config.json` of the same model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointWarning

_PREFIX = "general.sampling."
# llama.cpp's name -> the name in generation_config.json.
_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Samplers that this program does not have, and the value with which each does nothing.
_OFF: dict[str, float] = {"xtc_probability": 0, "mirostat": 0}
# Settings of these samplers: nothing without them.
_OF_OTHER_SAMPLERS = {"xtc_threshold": "xtc_probability", "mirostat_tau": "mirostat", "mirostat_eta": "mirostat"}
_WINDOW, _WHOLE_TEXT = "penalty_last_n", -1


def sampling_advice(file: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the advice under `general.sampling` with the names of `generation_config.json`.

    Keys: `LLAMA_MODEL_META_KEY_SAMPLING_*` of llama.cpp. Its `top_k` is 0 or below for all tokens. Numbers are float32
    in the file; they get the six digits that a float32 keeps of a decimal number.

    Warns:
        CheckpointWarning: the advice asks for something that this program does not do; names the keys.
    """
    advice = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    found: dict[str, Any] = {}
    without_effect: list[str] = []
    for name, value in advice.items():
        if name == "sequence":
            continue  # the order of samplers: here it is fixed, as llama.cpp's default one
        if name in _NAMES:
            found[_NAMES[name]] = float(f"{value:.6g}") if isinstance(value, float) else value
        elif name == _WINDOW:
            if value != _WHOLE_TEXT and advice.get("penalty_repeat", 1) != 1:
                without_effect.append(name)
        elif name in _OF_OTHER_SAMPLERS:
            continue  # it counts with the sampler that it belongs to, which is named
        elif value != _OFF.get(name):
            without_effect.append(name)
    if isinstance(top_k := found.get("top_k"), int) and top_k < 0:
        found["top_k"] = 0
    if without_effect:
        named = ", ".join(f"{_PREFIX}{name} = {advice[name]!r}" for name in sorted(without_effect))
        warnings.warn(
            f"{file}: {len(without_effect)} setting(s) of its sampling advice have no effect here: {named}",
            CheckpointWarning,
            stacklevel=4,
        )
    return found
