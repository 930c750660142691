"""Prompts in chunks of a few fixed lengths, because XLA compiles one program for each length.

DeltaNet layers add up the rows of a sequence in groups of `GRID` rows, counted from its first one. Every chunk but the
last one therefore ends, for each sequence, at a multiple of `GRID` rows of it. What a sequence remembers after a
multiple of `GRID` rows then depends on these rows alone, bit for bit, and not on what follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kernels_pallas.gated_delta_rule import CHUNK as GRID

PREFILL_BUCKETS = (16, 64, 256, 512)  # default lengths of prompt chunks


class PromptChunk(NamedTuple):
    """Some rows of B prompts. Rows in front of those of a prompt are padding.

    Attributes:
        tokens: ids `[B, T]` int32, 0 where a row is padding.
        next_tokens: the token after each row, `[B, T]` int32; 0 after the last row of a prompt.
        pad: rows of padding in front of each sequence, `[B]` int32, 0...T.
    """

    tokens: np.ndarray
    next_tokens: np.ndarray
    pad: np.ndarray


class PastTokens(NamedTuple):
    """What a cache has of a sequence.

    Attributes:
        length: tokens; a multiple of `GRID`, so that reading on gives the same bits as reading all at once.
        mtp_start: position of the first token that the MTP head has keys and values of.
    """

    length: int = 0
    mtp_start: int = 0

    def mtp_start_after(self, num_rows: int, mtp_prompt_tokens: int | None) -> int:
        """Return `mtp_start` after `num_rows` more rows, of which the head reads the last `mtp_prompt_tokens`."""
        if mtp_prompt_tokens is None or num_rows < mtp_prompt_tokens:
            return self.mtp_start
        return self.length + num_rows - mtp_prompt_tokens


def usable_buckets(buckets: Sequence[int], max_model_len: int) -> tuple[int, ...]:
    """Return the buckets that are shorter than `max_model_len`, ascending, or the smallest one if there are none."""
    return tuple(sorted(b for b in set(buckets) if b < max_model_len)) or (min(buckets),)


def rows_of_last_chunk(num_rows: int, chunk: int) -> int:
    """Return how many rows of a sequence a last chunk of length `chunk` reads.

    They are all `num_rows` rows, or the most with which the rows before them are a multiple of `GRID`. A number below 1
    means that there is none.
    """
    return num_rows if num_rows <= chunk else chunk - (chunk - num_rows) % GRID


def plan_chunks(lengths: Sequence[int], buckets: Sequence[int]) -> list[int]:
    """Return lengths of chunks that read prompts of these lengths: as few as possible, then as short as possible.

    The chunks before the last one have lengths that are multiples of `GRID`: a smaller bucket for the remainder, then
    largest ones. Every prompt that has rows has some in the last chunk, since its last hidden state is taken from
    there.

    If no bucket is a multiple of `GRID`, prompts are padded in front to a sum of buckets, and the last bits of what
    they leave depend on how they are cut.
    """
    longest = max(lengths, default=0)
    if not longest:
        return []
    whole = [b for b in buckets if b % GRID == 0]
    if longest <= max(buckets) or not whole:
        return _cover(longest, buckets)

    def plan(last: int) -> list[int]:
        return [*_cover(max(n - rows_of_last_chunk(n, last) for n in lengths), whole), last]

    usable = [last for last in set(buckets) if all(rows_of_last_chunk(n, last) > 0 for n in lengths if n)]
    return min(map(plan, usable), key=lambda chunks: (len(chunks), sum(chunks), -chunks[-1]))


def _cover(num_rows: int, buckets: Sequence[int]) -> list[int]:
    """Return chunk lengths that cover `num_rows` rows: one bucket for the remainder, then largest buckets."""
    num_full_chunks, remainder = divmod(num_rows, max(buckets))
    first = [min(b for b in buckets if b >= remainder)] if remainder else []
    return first + [max(buckets)] * num_full_chunks


def split_prompts(
    prompts: Sequence[Sequence[int]], buckets: Sequence[int], next_tokens: Sequence[int] | None = None
) -> Iterator[PromptChunk]:
    """Cut prompts into chunks. All of them end with the last chunk, where the rows of each are the last ones.

    Args:
        prompts: token ids of B sequences, of which some may be empty. A sequence may have been read in part before, a
            multiple of `GRID` tokens of it.
        buckets: lengths of chunks.
        next_tokens: the token after each prompt; None: 0.
    """
    lengths = list(map(len, prompts))
    plan = plan_chunks(lengths, buckets)
    if not plan:
        return
    on_grid = len(plan) > 1 and all(chunk % GRID == 0 for chunk in plan[:-1])
    in_last = [rows_of_last_chunk(n, plan[-1]) if on_grid else min(n, plan[-1]) for n in lengths]
    body = sum(plan[:-1])
    ids = np.zeros((len(prompts), body + plan[-1] + 1), np.int32)
    is_row = np.zeros(ids.shape, bool)
    after = np.zeros(ids.shape, np.int32)
    for b, (prompt, last) in enumerate(zip(prompts, in_last, strict=True)):
        before = len(prompt) - last
        following = [*prompt[1:], 0 if next_tokens is None else next_tokens[b]] if len(prompt) else []
        for rows, part in ((slice(body - before, body), slice(before)), (slice(-1 - last, -1), slice(before, None))):
            ids[b, rows], after[b, rows], is_row[b, rows] = prompt[part], following[part], True
    start = 0
    for chunk in plan:
        rows = slice(start, start + chunk)
        pad = (chunk - is_row[:, rows].sum(axis=1)).astype(np.int32)
        yield PromptChunk(ids[:, rows], after[:, rows], pad)
        start += chunk


def mtp_rows_of_chunks(chunks: Sequence[PromptChunk], mtp_prompt_tokens: int) -> list[int]:
    """Return how many of the last rows of each chunk the MTP head reads, so that it reads enough rows of each prompt.

    The rows of a prompt before the last chunk end with the chunk before. What the head reads too much is in front of
    `Cache.mtp_start_pos`, and leaves nothing. Each number is a program, so there are few: if a prompt has too few rows
    in the last chunk, it counts as one row.

    Args:
        chunks: as `split_prompts` cuts them.
        mtp_prompt_tokens: N, how many of the last rows of each prompt must be read.
    """
    if not chunks:
        return []
    rows = np.array([chunk.tokens.shape[1] - chunk.pad for chunk in chunks])
    wanted = np.minimum(rows.sum(axis=0), mtp_prompt_tokens)
    missing = mtp_prompt_tokens - 1 if np.any(rows[-1] < wanted) else 0
    read = [min(chunks[-1].tokens.shape[1], mtp_prompt_tokens)]
    for chunk in reversed(chunks[:-1]):
        length = chunk.tokens.shape[1]
        read.append(min(length, max(0, -(-missing // GRID) * GRID)))
        missing -= length
    return read[::-1]


def join_rows(chunks: Sequence[PromptChunk], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Put what belongs to the rows of each prompt behind one another, with all padding in front.

    Args:
        chunks: as `split_prompts` cuts them.
        arrays: for each chunk `[B, T, ...]`.
    """
    is_row = np.concatenate([np.arange(c.tokens.shape[1]) >= c.pad[:, None] for c in chunks], axis=1)
    order = np.argsort(is_row, axis=1, kind="stable")
    return np.concatenate(arrays, axis=1)[np.arange(len(order))[:, None], order]
