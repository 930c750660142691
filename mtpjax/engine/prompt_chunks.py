"""Prompts in chunks of a few fixed lengths, because XLA compiles one program for each length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

PREFILL_BUCKETS = (16, 64, 256, 512)  # default lengths of prompt chunks


class PromptChunk(NamedTuple):
    """The same rows of B prompts. Rows in front of a prompt are padding.

    Attributes:
        tokens: ids `[B, T]` int32, 0 where a row is padding.
        next_tokens: the token after each row, `[B, T]` int32; 0 after the last row of a prompt.
        pad: rows of padding in front of each sequence, `[B]` int32, 0...T.
        num_rows_after: rows of the prompts in later chunks.
    """

    tokens: np.ndarray
    next_tokens: np.ndarray
    pad: np.ndarray
    num_rows_after: int


def usable_buckets(buckets: Sequence[int], max_model_len: int) -> tuple[int, ...]:
    """Return the buckets that are shorter than `max_model_len`, ascending, or the smallest one if there are none."""
    return tuple(sorted(b for b in set(buckets) if b < max_model_len)) or (min(buckets),)


def plan_chunks(num_rows: int, buckets: Sequence[int]) -> list[int]:
    """Return chunk lengths that cover `num_rows` prompt rows: one bucket for the remainder, then largest buckets.

    The surplus of the first chunk is padding in front, so the last row of the last chunk is the last prompt row.
    """
    num_full_chunks, remainder = divmod(num_rows, max(buckets))
    first = [min(b for b in buckets if b >= remainder)] if remainder else []
    return first + [max(buckets)] * num_full_chunks


def split_prompts(prompts: Sequence[Sequence[int]], buckets: Sequence[int]) -> Iterator[PromptChunk]:
    """Pad prompts in front to one length and cut them into chunks, so that all of them end with the last chunk."""
    plan = plan_chunks(max(map(len, prompts), default=0), buckets)
    length = sum(plan)
    ids = np.zeros((len(prompts), length + 1), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[length - len(prompt) : length] = prompt
    total_pad = np.array([length - len(p) for p in prompts], np.int32)
    start = 0
    for chunk in plan:
        end = start + chunk
        pad = np.clip(total_pad - start, 0, chunk).astype(np.int32)
        yield PromptChunk(ids[:, start:end], ids[:, start + 1 : end + 1], pad, length - end)
        start = end
