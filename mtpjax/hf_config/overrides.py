"""Settings that replace those of config.json before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def apply_hf_overrides(config: Mapping[str, Any], overrides: Any) -> dict[str, Any]:
    """Return `config` with `overrides` merged over it: objects key by key, everything else as a whole.

    The names are those of config.json. A value None takes a key away. Where only one of the two has `text_config`, the
    values of `overrides` reach the text model all the same: "text_config" in front of a flat config is left out. The
    other way round, keys beside `text_config` stay beside it, and a warning names them when they have no effect there.

    Raises:
        ValueError: `overrides` is no mapping of names to values, or changes how weights are quantised, which is read
            with the weights and not from here.
    """
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ValueError(
            f"hf_overrides is {overrides!r:.200}; expected a dictionary of keys of config.json, for example "
            '{"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}}'
        )
    text = overrides.get("text_config")
    for part in (overrides, text if isinstance(text, Mapping) else {}):
        if "quantization_config" in part:
            raise ValueError("hf_overrides cannot change quantization_config, which belongs to the weights as they are")
    if isinstance(text, Mapping) and not isinstance(config.get("text_config"), Mapping):
        overrides = {key: value for key, value in overrides.items() if key != "text_config"} | dict(text)
    return _merge(config, overrides)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            value = _merge(below if isinstance(below, Mapping) else {}, value)
        merged[key] = value
    return merged
