"""Single rounds of drafting on a given text: how many drafts the trunk would accept, also with a head that is fed
wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from mtpjax.model import make_positions
from mtpjax.model.cache import KV_BLOCK, new_cache

DEPTH = 4  # drafts of a round
PREFIXES = (64, 128, 192, 248)  # tokens before the drafts; with the drafts they fit in one block of attention


@partial(jax.jit, static_argnames=("graph", "prefix", "shift", "mtp_prompt_tokens"))
def count_accepted_drafts(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    prefix: int,
    shift: int = 0,
    mtp_prompt_tokens: int | None = None,
) -> Int[Array, " B"]:
    """Return how many of `DEPTH` greedy drafts after `prefix` tokens the trunk would accept, as in one decoding round.

    The head reads the hidden state of the last row and the text's next token, then its own output and draft. The trunk
    reads the same token and the drafts. A draft counts if it and all drafts before it are the trunk's first choices.

    Args:
        shift: 0 pairs each hidden state with the token that follows; 1 pairs it (wrongly) with the token that made it.
        mtp_prompt_tokens: how many of the last prompt tokens the head has keys and values of; None: all. Only
            distances matter to the head, so the first of these tokens takes position 0 of its cache.
    """
    model = nnx.merge(graph, params)
    cfg, batch = model.cfg, tokens.shape[0]
    num_read = prefix if mtp_prompt_tokens is None else mtp_prompt_tokens
    zeros = jnp.zeros(batch, jnp.int32)
    at = partial(make_positions, cfg, pad=zeros, kv_len=KV_BLOCK, static_kv_blocks=1, implementation="xla")
    y, cache = model.trunk(tokens[:, :prefix], new_cache(cfg, batch, KV_BLOCK), at(zeros, prefix))
    next_tokens = tokens[:, prefix - num_read + 1 - shift : prefix + 1 - shift]
    m, cache = model.mtp_step(model.final_norm(y)[:, prefix - num_read :], next_tokens, cache, at(zeros, num_read))
    window = [tokens[:, prefix]]
    for depth in range(1, DEPTH + 1):
        window.append(jnp.argmax(model.head(m[:, -1:])[:, 0], axis=-1))
        m, cache = model.mtp_step(m[:, -1:], window[-1 - shift][:, None], cache, at(zeros + num_read - 1 + depth, 1))
    drafts = jnp.stack(window[1:], axis=1)
    y, _ = model.trunk(jnp.stack(window[:-1], axis=1), cache, at(zeros + prefix, DEPTH))
    agrees = drafts == jnp.argmax(model.head(model.final_norm(y)), axis=-1)
    return jnp.sum(jnp.cumprod(agrees, axis=1), axis=1)


def count_accepted(
    graph: Any,
    params: Any,
    tokens: np.ndarray,
    prefixes: Sequence[int] = PREFIXES,
    batch: int = 16,
    **options: int,
) -> np.ndarray:
    """Return `count_accepted_drafts` of every window `[N, T]` after each of the prefixes: int `[prefixes * N]`."""
    groups = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    counts = [count_accepted_drafts(graph, params, group, prefix, **options) for prefix in prefixes for group in groups]
    return np.concatenate([np.asarray(count) for count in counts])
