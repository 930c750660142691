"""The steps of generation as pure functions of (model or params, inputs, cache): prefill, verify, draft, sync.

`prefill` and `forward_hidden` are jitted with the cache donated; the others are pieces of the loop in `speculative.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from mtpjax.decoding.output_rows import NO_ROWS, OutputRows
from mtpjax.decoding.penalties import TokenCounts, apply_penalties
from mtpjax.decoding.sampling import BatchSamplingParams, choose
from mtpjax.model import Model, make_positions
from mtpjax.model.cache import Cache, PendingDeltaUpdates


def _chunk(model: Model, tokens: Array, pad: Array, cache: Cache, keep: int | None = None) -> tuple[Array, Cache]:
    """A prompt chunk through the trunk: its last `keep` rows before the final norm; all rows enter the state."""
    where = make_positions(model.cfg, cache.length, tokens.shape[1], pad, kv_len=cache.kv_len)
    rows, cache = model.trunk(tokens, cache, where, keep)
    return rows, cache.replace(length=cache.length + tokens.shape[1] - pad)


def prefill_chunk(
    model: Model,
    tokens: Array,
    following: Array,
    pad: Array,
    cache: Cache,
    rows: OutputRows,
    mtp_rows: int | None = None,
) -> tuple[Float[Array, "B R V"], Float[Array, "B D"], Cache]:
    """`prefill` on a merged model."""
    chunk = tokens.shape[1]
    tapped = 0 if model.mtp is None else chunk if mtp_rows is None else min(mtp_rows, chunk)
    out, cache = _chunk(model, tokens, pad, cache, max(tapped, rows.reach(chunk)))
    if not tapped:
        logits = model.head(model.final_norm(rows.take(out, chunk)))
        return logits, jnp.zeros((out.shape[0], out.shape[2]), out.dtype), cache
    hidden = model.final_norm(out)  # for every row that the MTP head reads
    seen = hidden[:, hidden.shape[1] - tapped :]
    cache = sync_prompt(model, seen, following[:, chunk - tapped :], jnp.maximum(pad - (chunk - tapped), 0), cache)
    return model.head(rows.take(hidden, chunk)), hidden[:, -1], cache


def sync_prompt(
    model: Model, hidden: Float[Array, "B T D"], following: Int[Array, "B T"], pad: Array, cache: Cache
) -> Cache:
    """Keys and values of the MTP head for the last T rows in `cache`, of which the first `pad` are padding."""
    rows = hidden.shape[1]
    where = make_positions(model.cfg, cache.length - cache.mtp_start_pos - rows + pad, rows, pad, kv_len=cache.kv_len)
    return model.mtp_sync(hidden, following, cache, where)


@partial(jax.jit, static_argnames=("graph", "rows", "mtp_rows"), donate_argnames=("cache",))
def prefill(
    params: Any,
    tokens: Int[Array, "B T"],
    following: Int[Array, "B T"],
    pad: Int[Array, " B"],
    cache: Cache,
    *,
    graph: Any,
    rows: OutputRows = NO_ROWS,
    mtp_rows: int | None = None,
) -> tuple[Float[Array, "B R V"], Float[Array, "B D"], Cache]:
    """Read one chunk of the prompts. Continues from any cache; padding stands in front and changes nothing.

    Args:
        tokens: ids of the rows; anything where padded.
        following: the token after each row, for the MTP head's keys and values.
        pad: rows of padding in front of each sequence, 0...T.
        graph: static half of the split model.
        rows: rows whose logits are wanted. With none there is no LM head in the program.
        mtp_rows: how many of the last rows leave keys and values for the MTP head; all unless told, and 0 makes this the
            program of a model without the head. The first such row of a sequence must be the one at `cache.mtp_start_pos`.

    Returns:
        logits of the output rows (float32), hidden state of the last row (after the final norm; zero if no row is for the
        MTP head, which alone needs it), and the cache.
    """
    return prefill_chunk(nnx.merge(graph, params), tokens, following, pad, cache, rows, mtp_rows)


@partial(jax.jit, static_argnames=("graph",), donate_argnames=("cache",))
def forward_hidden(
    params: Any, tokens: Int[Array, "B T"], pad: Int[Array, " B"], cache: Cache, *, graph: Any
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states after the final norm, of every row of a chunk (for research)."""
    model = nnx.merge(graph, params)
    rows, cache = _chunk(model, tokens, pad, cache)
    return model.final_norm(rows), cache


def verify(
    model: Model, tokens: Int[Array, "B W"], idle: Array, cache: Cache
) -> tuple[Float[Array, "B W V"], Float[Array, "B W D"], Cache, PendingDeltaUpdates]:
    """The trunk on a window of W rows, all of them output rows.

    Args:
        idle: `[B]` bool; the rows of idle sequences are padding and cost no experts.

    Returns:
        float32 logits, hidden states after the final norm, the cache, and the rows that wait for `model.commit`.
    """
    width = tokens.shape[1]
    where = make_positions(model.cfg, cache.length, width, jnp.where(idle, width, 0), kv_len=cache.kv_len)
    hidden, cache, pending = model.trunk_pending(tokens, cache, where)
    return model.head(OutputRows.all().take(hidden)), hidden, cache, pending


def draft(
    model: Model,
    hidden: Float[Array, "B D"],
    token: Int[Array, " B"],
    idle: Array,
    cache: Cache,
    requests: BatchSamplingParams,
    length: int,
    vocab: int,
    seen: TokenCounts | None = None,
) -> tuple[Int[Array, "B k"], Cache]:
    """`length` tokens from the MTP head, applied again and again to its own hidden state (after `mtp.norm`).

    `hidden` belongs to the last committed row and `token` follows it. Step j writes the slot of
    position `cache.length - 1 + j` in the head's cache; all but the first of these are provisional and overwritten by `sync`.
    """

    one = jnp.ones_like(token)

    def step(carry: tuple[Array, Array, Cache, TokenCounts | None], j: Array) -> tuple[tuple, Array]:
        hidden, token, cache, seen = carry
        where = make_positions(
            model.cfg, cache.length - cache.mtp_start_pos - 1 + j, 1, idle.astype(jnp.int32), kv_len=cache.kv_len
        )
        rows, cache = model.mtp_step(hidden[:, None], token[:, None], cache, where)
        logits = apply_penalties(model.head(rows), requests.penalties, seen)
        token = choose(logits, (cache.length + 1 + j)[:, None], requests, vocab)[:, 0]
        return (rows[:, 0], token, cache, seen and seen.add(token[:, None], one)), token

    (_, _, cache, _), drafts = lax.scan(step, (hidden, token, cache, seen), jnp.arange(length))
    return drafts.T, cache


def sync(model: Model, hidden: Float[Array, "B W D"], drafts: Int[Array, "B k"], idle: Array, cache: Cache) -> Cache:
    """Replace the head's provisional keys and values by those of the trunk's own hidden states, rows 0...k-1.

    Row k is the first draft step of the next round. Rows past the accepted ones are stale and overwritten later.
    """
    k = drafts.shape[1]
    where = make_positions(model.cfg, cache.length - cache.mtp_start_pos, k, jnp.where(idle, k, 0), kv_len=cache.kv_len)
    return model.mtp_sync(hidden[:, :k], drafts, cache, where)
