"""The draft-verify loop: one `lax.while_loop` on the device, with donated state.

    draft k tokens -> verify k + 1 rows -> accept the agreeing prefix -> commit -> sync the MTP cache

With k = 0 the same loop is plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from mtpjax.decoding import steps
from mtpjax.decoding.acceptance import Acceptance, exact_match
from mtpjax.decoding.penalties import TokenCounts, apply_penalties
from mtpjax.decoding.sampling import BatchSamplingParams, choose, emitted
from mtpjax.model import Model, commit
from mtpjax.model.cache import Cache


class DecodeState(struct.PyTreeNode):
    """Where B requests stand. `token` is chosen but not yet in the cache; `hidden` is the row that chose it."""

    cache: Cache
    hidden: Float[Array, "B D"]
    token: Int[Array, " B"]
    count: Int[Array, " B"]  # tokens emitted so far
    done: Bool[Array, " B"]
    stopped: Bool[Array, " B"]  # done because of a stop token
    rounds: Int[Array, " B"]
    accepted: Int[Array, "B k"]  # rounds in which the draft at each position was accepted
    seen: TokenCounts | None = None  # up to and with `token`; None where no request has penalties


# drafts `[B, k]` and the cache from (model, state, requests, k, vocab)
Drafter = Callable[[Model, DecodeState, BatchSamplingParams, int, int], tuple[Array, Cache]]


def mtp_drafter(
    model: Model, state: DecodeState, requests: BatchSamplingParams, k: int, vocab: int
) -> tuple[Array, Cache]:
    """Drafts of the checkpoint's own MTP head."""
    return steps.draft(model, state.hidden, state.token, state.done, state.cache, requests, k, vocab, state.seen)


def speculative_step(
    model: Model,
    state: DecodeState,
    requests: BatchSamplingParams,
    k: int,
    vocab: int,
    drafter: Drafter,
    accept: Acceptance = exact_match,
) -> tuple[DecodeState, Int[Array, "B k+1"], Int[Array, " B"]]:
    """One round for every request that is not done. Returns the state, the window's tokens and how many of them count."""
    idle = state.done
    drafts, cache = drafter(model, state, requests, k, vocab) if k else (state.token[:, None][:, :0], state.cache)
    window = jnp.concatenate([state.token[:, None], drafts], axis=1)
    logits, hidden, cache, pending = steps.verify(model, window, idle, cache)
    positions = cache.length[:, None] + 1 + jnp.arange(k + 1)
    tokens = choose(apply_penalties(logits, requests.penalties, state.seen, drafts), positions, requests, vocab)
    if k and model.mtp is not None:
        cache = steps.sync(model, hidden, drafts, idle, cache)

    right = accept(drafts, tokens, cache.length, requests)
    count, stopped = emitted(tokens, right + 1, requests.max_tokens - state.count, requests.stops)
    count = jnp.where(idle, 0, count)
    total = state.count + count

    def pick(rows: Array) -> Array:
        """The row behind the last accepted draft."""
        return jnp.take_along_axis(rows, right.reshape(-1, *[1] * (rows.ndim - 1)), axis=1)[:, 0]

    return (
        DecodeState(
            cache=commit(cache, pending, jnp.where(idle, 0, right + 1)),
            hidden=jnp.where(idle[:, None], state.hidden, pick(hidden)),
            token=jnp.where(idle, state.token, pick(tokens)),
            count=total,
            done=idle | stopped | (total >= requests.max_tokens),
            stopped=jnp.where(idle, state.stopped, stopped),
            rounds=state.rounds + ~idle,
            accepted=state.accepted + (jnp.arange(k) < right[:, None]) * ~idle[:, None],
            seen=None if state.seen is None else state.seen.add(tokens, count),
        ),
        tokens,
        count,
    )


@partial(jax.jit, static_argnames=("graph", "k", "rounds", "vocab", "drafter", "accept"), donate_argnames=("state",))
def decode(
    params: Any,
    state: DecodeState,
    requests: BatchSamplingParams,
    enough: Int[Array, ""] | None = None,
    *,
    graph: Any,
    k: int,
    rounds: int,
    vocab: int,
    drafter: Drafter = mtp_drafter,
    accept: Acceptance = exact_match,
) -> tuple[DecodeState, Int[Array, "B rounds*(k+1)"], Int[Array, " B"]]:
    """Up to `rounds` rounds, fewer once every request is done; call again with the state to go on.

    Args:
        enough: return once so many are done; all unless told.
        k: draft length; 0 decodes without drafts.
        vocab: ids below this exist.
        accept: the rule of acceptance; any but the real one changes the text.

    Returns:
        the state, the new tokens of each request, and how many there are.
    """
    model = nnx.merge(graph, params)
    batch = state.token.shape[0]
    room = rounds * (k + 1)

    def go_on(carry: tuple[Array, DecodeState, Array, Array]) -> Array:
        return (carry[0] < rounds) & (jnp.sum(carry[1].done) < (batch if enough is None else enough))

    def body(carry: tuple[Array, DecodeState, Array, Array]) -> tuple[Array, DecodeState, Array, Array]:
        number, state, out, used = carry
        state, tokens, count = speculative_step(model, state, requests, k, vocab, drafter, accept)
        at = jnp.arange(k + 1)
        slot = jnp.where(at < count[:, None], used[:, None] + at, room)
        out = out.at[jnp.arange(batch)[:, None], slot].set(tokens, mode="drop")
        return number + 1, state, out, used + count

    first = (jnp.int32(0), state, jnp.zeros((batch, room), jnp.int32), jnp.zeros(batch, jnp.int32))
    _, state, out, used = lax.while_loop(go_on, body, first)
    return state, out, used


@partial(jax.jit, donate_argnames=("state",))
def insert(
    state: DecodeState, fresh: DecodeState, rows: Int[Array, " W"], slots: Int[Array, " W"], count: Int[Array, ""]
) -> DecodeState:
    """The first `count` requests of `fresh` in these slots of `state`, which is changed in place.

    Cache and hidden state of request w are row `rows[w]` of those of `fresh`: requests with one prompt have one row.
    """

    def one(w: Array, state: DecodeState) -> DecodeState:
        def put(axis: int, row: Array) -> Callable[[Array, Array], Array]:
            def move(old: Array, new: Array) -> Array:
                moved = lax.dynamic_slice_in_dim(new, row, 1, axis)
                return lax.dynamic_update_slice_in_dim(old, moved, slots[w], axis)

            return move

        def layers_first(old: Array, new: Array) -> Array:
            return put(min(old.ndim - 1, 1), rows[w])(old, new)

        def without_prompt(whole: DecodeState) -> DecodeState:
            return whole.replace(cache=None, hidden=None)

        return jax.tree.map(put(0, w), without_prompt(state), without_prompt(fresh)).replace(
            cache=jax.tree.map(layers_first, state.cache, fresh.cache),
            hidden=put(0, rows[w])(state.hidden, fresh.hidden),
        )

    return lax.fori_loop(0, count, one, state)
