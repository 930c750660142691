"""The rule for settings from outside: every key is used, is known to be harmless, or is named in a warning."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

from checkpoints.errors import CheckpointWarning

MAX_NAMED = 20  # of the unknown keys that one warning spells out


def unknown_keys(found: Iterable[str], used: Collection[str], harmless: Mapping[str, str] = {}) -> list[str]:
    """Return the keys of `found` that are neither used nor harmless, sorted.

    Args:
        found: the keys of the file.
        used: keys that the product reads.
        harmless: keys that may be there without an effect, and why each of them needs none.
    """
    return sorted(key for key in set(found) if key not in used and key not in harmless)


def warn_of_unknown_keys(
    source: str,
    found: Iterable[str],
    used: Collection[str],
    harmless: Mapping[str, str] = {},
    stacklevel: int = 3,
) -> None:
    """Warn once for a file about all of its keys that have no effect; see `unknown_keys`.

    Args:
        source: the beginning of the message, which says where the keys come from.

    Warns:
        CheckpointWarning: some keys are unknown. It counts them, names them, and names the known key that is alike.
    """
    unknown = unknown_keys(found, used, harmless)
    if not unknown:
        return
    named = []
    for key in unknown[:MAX_NAMED]:
        alike = get_close_matches(key, used, 1, 0.85)
        named.append(f"{key!r}" + (f" (did you mean {alike[0]!r}?)" if alike else ""))
    more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
    warnings.warn(
        f"{source} {len(unknown)} unknown key(s), which have no effect: {', '.join(named)}{more}",
        CheckpointWarning,
        stacklevel=stacklevel,
    )
