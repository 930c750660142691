"""Single rounds of drafting on given text: how many drafts the trunk would take, and what feeding the head otherwise does."""

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

DEPTH = 4  # drafts a round
PREFIXES = (64, 128, 192, 248)  # rows before the drafts; with them they fit in one block of attention


@partial(jax.jit, static_argnames=("graph", "prefix", "shift", "seen"))
def agreeing_drafts(
    graph: Any, params: Any, tokens: Int[Array, "B T"], prefix: int, shift: int = 0, seen: int | None = None
) -> Int[Array, " B"]:
    """How many of `DEPTH` greedy drafts after `prefix` rows the trunk would take, as in one round of decoding.

    The head reads the hidden state of the last row and the text's next token, then its own output and draft; the trunk
    reads the same token and drafts. A draft counts when it and all before it are the trunk's first choices.

    Args:
        shift: 1 pairs every hidden state with the token that made it instead of the token that follows it (wrong).
        seen: prompt rows whose keys and values the head has, the last ones; all unless told. Only distances matter to
            it, so that row `prefix - seen` takes its slot 0.
    """
    model = nnx.merge(graph, params)
    cfg, batch = model.cfg, tokens.shape[0]
    seen = prefix if seen is None else seen
    zeros = jnp.zeros(batch, jnp.int32)
    at = partial(make_positions, cfg, pad=zeros, kv_len=KV_BLOCK, static_kv_blocks=1, implementation="xla")
    y, cache = model.trunk(tokens[:, :prefix], new_cache(cfg, batch, KV_BLOCK), at(zeros, prefix))
    following = tokens[:, prefix - seen + 1 - shift : prefix + 1 - shift]
    m, cache = model.mtp_step(model.final_norm(y)[:, prefix - seen :], following, cache, at(zeros, seen))
    window = [tokens[:, prefix]]
    for depth in range(1, DEPTH + 1):
        window.append(jnp.argmax(model.head(m[:, -1:])[:, 0], axis=-1))
        m, cache = model.mtp_step(m[:, -1:], window[-1 - shift][:, None], cache, at(zeros + seen - 1 + depth, 1))
    drafts = jnp.stack(window[1:], axis=1)
    y, _ = model.trunk(jnp.stack(window[:-1], axis=1), cache, at(zeros + prefix, DEPTH))
    right = drafts == jnp.argmax(model.head(model.final_norm(y)), axis=-1)
    return jnp.sum(jnp.cumprod(right, axis=1), axis=1)


def count_agreeing(
    graph: Any, params: Any, tokens: np.ndarray, prefixes: Sequence[int] = PREFIXES, batch: int = 16, **fed: int
) -> np.ndarray:
    """`agreeing_drafts` of every window `[N, T]` after each of the prefixes: int `[prefixes * N]`."""
    groups = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    return np.concatenate([np.asarray(agreeing_drafts(graph, params, g, p, **fed)) for p in prefixes for g in groups])
