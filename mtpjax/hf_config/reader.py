"""Typed look-ups in a JSON object of settings, which remember the keys that were looked up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mtpjax.config import ConfigError


class Reader:
    """Typed look-ups in one JSON object; every error names the key and what was found.

    A key whose value is null counts as absent, as in transformers.

    Attributes:
        raw: the object without its null values.
        source: the beginning of every error message.
        used: the keys that were looked up so far.
    """

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw = {key: value for key, value in raw.items() if value is not None}
        self.source = source
        self.used: set[str] = set()

    def unsupported(self, key: str, found: object, supported: str) -> ConfigError:
        """Return the error for the value `found` of `key`."""
        return ConfigError(f"{self.source}: {key} is {found!r}; supported: {supported}")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key` as it is, or `default`."""
        self.used.add(key)
        return self.raw.get(key, default)

    def int(self, key: str, default: int | None = None, low: int = 1, high: int = 2**53) -> int:
        """Return a whole number; raises ConfigError if it is missing (no `default`) or not from `low` to `high`."""
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"{self.source}: '{key}' is missing; a Qwen3.5/3.6 text config has it (a whole number)")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            limit = f" and <= {high:,}" if isinstance(value, int) and value > high else ""
            raise self.unsupported(f"'{key}'", value, f"a whole number >= {low}{limit}")
        return value

    def float(self, key: str, default: Any = None) -> float:
        """Return a finite number above 0; raises ConfigError for anything else."""
        value = self.get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise self.unsupported(f"'{key}'", value, "a number > 0")
        return float(value)

    def bool(self, key: str, default: bool) -> bool:
        """Return true or false; raises ConfigError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.unsupported(f"'{key}'", value, "true, false")
        return value

    def choice(self, key: str, options: tuple[object, ...], default: object) -> Any:
        """Return one of `options`; raises ConfigError for anything else."""
        value = self.get(key, default)
        if value not in options:
            raise self.unsupported(f"'{key}'", value, ", ".join(map(repr, options)))
        return value

    def object(self, key: str) -> Mapping[str, Any] | None:
        """Return a JSON object, or None if there is none; raises ConfigError for anything else."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.unsupported(f"'{key}'", value, "a JSON object")
        return value
