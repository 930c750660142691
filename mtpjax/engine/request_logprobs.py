"""Log-probabilities of requests: which program a batch needs, the rows of each slot, and those of whole prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from mtpjax.decoding.logprobs import TokenLogprobs, prompt_logprobs
from mtpjax.decoding.output_rows import NO_ROWS
from mtpjax.decoding.steps import prefill
from mtpjax.engine.batch_parts import num_top_size
from mtpjax.engine.model_runner import ModelRunner, jit_step
from mtpjax.engine.prompt_chunks import PromptChunk, join_rows, split_prompts
from mtpjax.engine.request import Request


def logprobs_of_slots(
    logprobs: TokenLogprobs | None, requests: Sequence[Request | None], counts: np.ndarray
) -> list[TokenLogprobs | None]:
    """Return for each slot a copy of the rows of its new tokens, with as many top tokens as its request asks for.

    Args:
        logprobs: of the loop, on the host; None: no request asks for any.
        requests: of the slots.
        counts: new tokens of each slot.
    """

    def of_slot(slot: int) -> TokenLogprobs | None:
        request = requests[slot]
        if logprobs is None or request is None or request.logprobs is None:
            return None
        rows, num_top = slice(int(counts[slot])), request.logprobs
        return _cut(TokenLogprobs(*(x[slot] for x in logprobs)), rows, num_top)

    return [of_slot(slot) for slot in range(len(requests))]


def logprobs_of_prompts(
    runner: ModelRunner, prompts: Sequence[Sequence[int]], num_top: int, first_rows: Sequence[int] | None = None
) -> list[TokenLogprobs]:
    """Read prompts as one batch in a pass of its own, and return the log-probabilities of their tokens.

    They are those of the model's own logits, whatever `logprobs_mode` says, as in vLLM.

    Args:
        prompts: token ids of B sequences; a sequence may be empty.
        num_top: most probable tokens of each row, at most `runner.max_logprobs`.
        first_rows: for each prompt the index of the first token, from 1 on, whose log-probability is needed; None: 1.
            Chunks before all of them have no LM head.

    Returns:
        for each prompt the log-probabilities of its tokens from `first_rows` on, each after all tokens before it.
    """
    size = num_top_size(num_top, runner.max_logprobs)
    firsts = [1] * len(prompts) if first_rows is None else list(first_rows)
    needed = np.array([len(p) - first + 1 if p else 0 for p, first in zip(prompts, firsts, strict=True)])
    model, batch = runner.model, len(prompts)
    cache, parts, scored = runner.new_cache(batch), list[TokenLogprobs](), list[PromptChunk]()
    rows_after = np.array([len(p) for p in prompts])
    for chunk in split_prompts(prompts, runner.prefill_buckets):
        length = chunk.tokens.shape[1]
        rows_after -= length - chunk.pad
        args = (model.params, chunk.tokens, chunk.next_tokens, chunk.pad, cache)
        if (rows_after >= needed).all():
            step = partial(jit_step, prefill, graph=model.graph, rows=NO_ROWS, mtp_rows=0)
            _, _, cache = runner.programs.get(("prefill", batch, length, NO_ROWS, 0), step, args)(*args)
            continue
        static: dict[str, Any] = {"graph": model.graph, "num_top": size, "vocab_size": runner.vocab_size}
        step = partial(jit_step, prompt_logprobs, **static)
        found, cache = runner.programs.get(("prompt_logprobs", batch, length, size), step, args)(*args)
        parts.append(jax.tree.map(np.asarray, found))
        scored.append(chunk)
    # Prompts end with the last row; the row of a token is the one before it, and the last row has no token after it.
    rows = TokenLogprobs(*(join_rows(scored, arrays) for arrays in zip(*parts, strict=True)))
    total = rows.chosen.shape[1]
    return [
        _cut(TokenLogprobs(*(x[i] for x in rows)), slice(total - 1 - (len(p) - first), total - 1), num_top)
        if p
        else _cut(TokenLogprobs(*(x[i] for x in rows)), slice(0), num_top)
        for i, (p, first) in enumerate(zip(prompts, firsts, strict=True))
    ]


def _cut(logprobs: TokenLogprobs, rows: slice, num_top: int) -> TokenLogprobs:
    """Return a copy of some rows, with the first `num_top` of their top tokens."""
    chosen, rank, top_ids, top = (x[rows] for x in logprobs)
    return TokenLogprobs(chosen.copy(), rank.copy(), top_ids[:, :num_top].copy(), top[:, :num_top].copy())
