"""`Prefix`: the beginning of prompts, read once; `LLM.prefix` makes it and `LLM.generate(..., prefix=...)` takes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from mtpjax.engine.model_runner import ModelRunner
from mtpjax.engine.prefix_cache import PrefixCache, PrefixEntry, can_share
from mtpjax.engine.prefix_files import difference
from mtpjax.engine.prefix_tree import beginnings
from mtpjax.text.prompts import Prompt


@dataclass(frozen=True)
class Prefix:
    """The beginning of prompts, with what a sequence remembers of it.

    What is remembered ends at the last multiple of 64 tokens that a token of the prefix follows; the few tokens behind
    it are read with each prompt. A prefix keeps memory of the device for as long as it lives.

    Attributes:
        text: as it was given; None if it was given as token ids.
        token_ids: its tokens.
        settings: of the model that has read it.
        entry: what is remembered; None: the prefix is too short.
    """

    text: str | None
    token_ids: tuple[int, ...] = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)
    entry: PrefixEntry | None = field(repr=False)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError if another model has read it, or one with other settings."""
        if self.settings != settings:
            names = difference(self.settings, settings)
            raise ValueError(f"the prefix belongs to another LLM: {names}; make it with the `prefix` of this one")

    def extend(
        self, prompts: Sequence[Prompt], encode: Callable[[str, Prompt], Sequence[int]]
    ) -> tuple[list[list[int]], list[Prompt]]:
        """Return the token ids of prefix and prompts, and the prompts as their outputs show them.

        Prefix and prompt are encoded apart: a token never spans both.

        Args:
            prompts: what follows the prefix in each prompt.
            encode: returns token ids, from a name for messages and a prompt.
        """
        ids = [[*self.token_ids, *encode(f"prompt {i}", prompt)] for i, prompt in enumerate(prompts)]
        both = zip(prompts, ids, strict=True)
        return ids, [
            self.text + prompt if isinstance(prompt, str) and self.text is not None else whole for prompt, whole in both
        ]


def read_prefix(cache: PrefixCache, text: str | None, token_ids: tuple[int, ...]) -> Prefix:
    """Read the beginning of prompts, as far as it is not in the cache already."""
    path = [b for b in beginnings(token_ids) if not b.is_whole]
    entry = cache.find(path)
    if path and (entry is None or entry.beginning != path[-1]):
        entry = cache.make(token_ids, path[-1], entry)
    return Prefix(text, token_ids, cache.settings, entry)


def held_prefix(cache: PrefixCache | None, prefix: Prefix | None) -> AbstractContextManager[None]:
    """Return a context in which prompts continue from a prefix."""
    if cache is None or prefix is None or prefix.entry is None:
        return nullcontext()
    return cache.holding([prefix.entry])


def open_prefix_cache(
    runner: ModelRunner, enable: bool, gigabytes: float | None, folder: str | PathLike[str] | None
) -> PrefixCache | None:
    """Return the cache that arguments of `LLM` ask for; None: prompts of this runner have no borders.

    Raises:
        ValueError: `prefix_cache_gb` is no number, or below 0.
    """
    is_number = isinstance(gigabytes, int | float) and not isinstance(gigabytes, bool)
    if gigabytes is not None and not (is_number and 0 <= gigabytes < float("inf")):
        raise ValueError(f"prefix_cache_gb is {gigabytes!r}; expected a finite number >= 0 (0 is off) or None")
    if not can_share(runner.prefill_buckets):
        if folder is not None:
            warnings.warn(f"{folder}: no prefixes are kept, since no prefill bucket is a multiple of 64", stacklevel=4)
        return None
    max_bytes = None if gigabytes is None else int(gigabytes * 2**30)
    cache = PrefixCache(runner, max_bytes if enable else 0)
    if folder is not None:
        cache.load(folder)
    return cache


class PrefixMethods:
    """Prompts that begin alike; a part of `LLM`."""

    max_model_len: int
    _prefixes: PrefixCache | None
    _prefix_cache_dir: str | PathLike[str] | None
    _token_ids: Callable[[str, Prompt, int], tuple[int, ...]]

    def prefix(self, prefix: Prompt) -> Prefix:
        """Read the beginning of prompts once. Returns what `generate(prompts, prefix=...)` continues from.

        Args:
            prefix: a text or token ids. It is encoded by itself, so end it where a token ends, for example before a
                space or behind a line.

        Raises:
            ValueError: it is empty or too long, or no length of `prefill_buckets` is a multiple of 64.
        """
        ids = self._token_ids("the prefix", prefix, self.max_model_len - 2)
        return read_prefix(self._shareable(), prefix if isinstance(prefix, str) else None, ids)

    def _shareable(self) -> PrefixCache:
        if self._prefixes is None:
            rule = "one of prefill_buckets is a multiple of 64 and below max_model_len"
            raise ValueError(f"prompts can share a prefix only if {rule}")
        return self._prefixes

    def _save_prefixes(self) -> None:
        if self._prefixes is not None and self._prefix_cache_dir is not None:
            self._prefixes.save(self._prefix_cache_dir)
