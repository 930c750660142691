"""The draft-verify loop: one `lax.while_loop` on the device, with donated state (Leviathan et al., arXiv:2211.17192).

A step of the loop, for k draft tokens (`num_speculative_tokens`):

    draft k tokens -> verify k + 1 rows -> sample -> sync the MTP cache -> accept a prefix of the drafts

With k = 0 the same loop is plain decoding. Accepted rows enter the DeltaNet states at the end of a step, or when the
next window reads the states; after the last step nothing is left to enter them.

The functions are plain; whoever compiles `decode` and `insert_requests` jits them with the argument names
`DECODE_STATIC`, `DECODE_DONATED` and `INSERT_DONATED`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from mtpjax.decoding import steps
from mtpjax.decoding.acceptance import Acceptance, exact_match
from mtpjax.decoding.logits_processors import NO_STATE, TextState, process_logits
from mtpjax.decoding.logprobs import LogprobsSpec, TokenLogprobs, empty_logprobs, window_logprobs
from mtpjax.decoding.rejection import accept_or_resample, rejection_rule
from mtpjax.decoding.sampling import BatchSamplingParams, sample, truncate_at_stop
from mtpjax.model import Model
from mtpjax.model.cache import Cache, PendingDeltaUpdates, accept, flush, pending_between_windows

DECODE_STATIC = (
    "graph",
    "num_speculative_tokens",
    "max_steps",
    "vocab_size",
    "drafter",
    "acceptance",
    "logprobs",
    "sync_without_drafts",
)
DECODE_DONATED = ("state",)
INSERT_DONATED = ("state",)


class DecodeState(struct.PyTreeNode):
    """The state of B requests between two steps of the loop."""

    cache: Cache
    hidden: Float[Array, "B D"]  # of the last row in the cache, after the final norm
    token: Int[Array, " B"]  # sampled from that row; not yet in the cache
    num_tokens: Int[Array, " B"]  # generated so far
    finished: Bool[Array, " B"]  # such requests, and empty slots, take no part in a step
    stopped: Bool[Array, " B"]  # a stop token ended the text
    num_steps: Int[Array, " B"]  # that the request took part in
    num_accepted_per_pos: Int[Array, "B max_k"]  # steps in which the draft at each position was accepted
    text_state: TextState = NO_STATE  # up to and including `token`


Drafter = Callable[[Model, DecodeState, BatchSamplingParams, int, int], tuple[Int[Array, "B k"], Cache]]
"""Makes drafts `[B, k]` and the cache from the model, the state, the sampling parameters, k and the vocabulary size."""


def mtp_drafter(
    model: Model,
    state: DecodeState,
    sampling_params: BatchSamplingParams,
    num_speculative_tokens: int,
    vocab_size: int,
) -> tuple[Int[Array, "B k"], Cache]:
    """Draft with the checkpoint's own MTP head; a `Drafter`."""
    return steps.draft(
        model,
        state.hidden,
        state.token,
        state.finished,
        state.cache,
        sampling_params,
        num_speculative_tokens,
        vocab_size,
        state.text_state,
    )


def speculative_step(
    model: Model,
    state: DecodeState,
    pending: PendingDeltaUpdates | None,
    sampling_params: BatchSamplingParams,
    num_speculative_tokens: int,
    vocab_size: int,
    drafter: Drafter,
    acceptance: Acceptance = exact_match,
    logprobs: LogprobsSpec | None = None,
    sync_without_drafts: bool = False,
) -> tuple[DecodeState, PendingDeltaUpdates | None, Int[Array, "B W"], Int[Array, " B"], TokenLogprobs | None]:
    """Run one step for every request that is not finished; W = k + 1.

    Args:
        pending: accepted rows of the step before that the cache lacks, if any.
        sync_without_drafts: see `decode`.

    Returns:
        the state, the accepted rows that its cache lacks, the tokens that the trunk sampled in the window, and how many
        of them, from the first on, the text gets, and their log-probabilities, if `logprobs` asks for them. The other
        tokens mean nothing.
    """
    k, inactive = num_speculative_tokens, state.finished
    draft_logits = None  # that drafts with noise of their own were drawn from
    if not k:
        drafts, cache = state.token[:, None][:, :0], state.cache
        if sync_without_drafts and model.mtp is not None:
            cache = steps.sync_last_row(model, state.hidden, state.token, inactive, cache)
    elif acceptance is rejection_rule:
        of_request = state.hidden, state.token, inactive, state.cache, sampling_params
        drafts, cache, draft_logits = steps.draft_with_logits(model, *of_request, k, vocab_size, state.text_state)
    else:
        drafts, cache = drafter(model, state, sampling_params, k, vocab_size)

    window = jnp.concatenate([state.token[:, None], drafts], axis=1)
    logits, hidden, cache, updates = steps.verify(model, window, inactive, cache, pending)

    positions = cache.length[:, None] + 1 + jnp.arange(k + 1)
    raw_logits = logits
    logits = process_logits(logits, sampling_params, state.text_state, drafts)
    if acceptance is rejection_rule:
        draft_logits = logits[:, :0] if draft_logits is None else draft_logits
        tokens, num_accepted = accept_or_resample(logits, drafts, draft_logits, positions, sampling_params, vocab_size)
    else:
        tokens = sample(logits, positions, sampling_params, vocab_size)
        num_accepted = acceptance(drafts, tokens, cache.length, sampling_params)
        if sampling_params.num_speculative_tokens is not None:
            num_accepted = jnp.minimum(num_accepted, sampling_params.num_speculative_tokens)

    if k and model.mtp is not None:  # all rows, whether accepted or not: rejected ones are overwritten later
        cache = steps.sync_mtp_cache(model, hidden, drafts, inactive, cache)

    num_tokens_left = sampling_params.max_tokens - state.num_tokens
    num_new, stopped = truncate_at_stop(tokens, num_accepted + 1, num_tokens_left, sampling_params.stop_token_ids)
    num_new = jnp.where(inactive, 0, num_new)
    num_tokens = state.num_tokens + num_new

    def last_accepted(rows: Array) -> Array:
        """Return the row of the last accepted draft, or row 0, that of `state.token`, if no draft is accepted."""
        index = num_accepted.reshape(-1, *[1] * (rows.ndim - 1))
        return jnp.take_along_axis(rows, index, axis=1)[:, 0]

    was_accepted = jnp.arange(state.num_accepted_per_pos.shape[1]) < num_accepted[:, None]
    cache, pending = accept(cache, updates, jnp.where(inactive, 0, num_accepted + 1))
    new_state = DecodeState(
        cache=cache,
        hidden=jnp.where(inactive[:, None], state.hidden, last_accepted(hidden)),
        token=jnp.where(inactive, state.token, last_accepted(tokens)),
        num_tokens=num_tokens,
        finished=inactive | stopped | (num_tokens >= sampling_params.max_tokens),
        stopped=jnp.where(inactive, state.stopped, stopped),
        num_steps=state.num_steps + ~inactive,
        num_accepted_per_pos=state.num_accepted_per_pos + was_accepted * ~inactive[:, None],
        text_state=state.text_state.add(tokens, num_new, sampling_params.automata),
    )
    found = None
    if logprobs is not None:
        found = window_logprobs(logprobs, raw_logits, logits, tokens, sampling_params, vocab_size)
    return new_state, pending, tokens, num_new, found


class _LoopCarry(NamedTuple):
    step: Int[Array, ""]
    state: DecodeState
    pending: PendingDeltaUpdates | None  # accepted rows that the cache in `state` lacks
    tokens: Int[Array, "B T"]
    num_tokens: Int[Array, " B"]  # in `tokens`
    logprobs: TokenLogprobs | None  # of `tokens`


class DecodeResult(NamedTuple):
    """What a call of the loop gave.

    Attributes:
        state: after the last step.
        tokens: the new tokens of each request `[B, T]`, T = max_steps * (k + 1).
        num_tokens: how many there are, `[B]`.
        logprobs: their log-probabilities, `[B, T]` and `[B, T, K]`; None if no request asked.
    """

    state: DecodeState
    tokens: Any
    num_tokens: Any
    logprobs: TokenLogprobs | None = None


def decode(
    params: Any,
    state: DecodeState,
    sampling_params: BatchSamplingParams,
    return_when_finished: Int[Array, ""] | None = None,
    step_limit: Int[Array, ""] | None = None,
    *,
    graph: Any,
    num_speculative_tokens: int,
    max_steps: int,
    vocab_size: int,
    drafter: Drafter = mtp_drafter,
    acceptance: Acceptance = exact_match,
    logprobs: LogprobsSpec | None = None,
    sync_without_drafts: bool = False,
) -> DecodeResult:
    """Run up to `max_steps` steps, fewer if enough requests are finished. Call it again with the state to continue.

    Args:
        params: weights of the split model.
        state: consumed, if donated.
        return_when_finished: number of finished requests at which the loop returns; None: all.
        step_limit: number of steps of this call, at most `max_steps`; None: `max_steps`.
        graph: static half of the split model.
        num_speculative_tokens: k, tokens drafted in a step; 0 decodes without drafts.
        max_steps: bounds the time until the host sees tokens.
        vocab_size: ids below this exist.
        drafter: makes the drafts.
        acceptance: decides which drafts are accepted; any rule but `exact_match` changes the text.
        logprobs: which log-probabilities are computed; None: none, at no cost.
        sync_without_drafts: whether the MTP head gets keys and values of rows that nothing was drafted for, so that
            later calls can draft. Only with k = 0 does it make a difference.
    """
    model = nnx.merge(graph, params)
    batch = state.token.shape[0]
    capacity = max_steps * (num_speculative_tokens + 1)
    limit = batch if return_when_finished is None else return_when_finished
    last_step = max_steps if step_limit is None else jnp.minimum(step_limit, max_steps)

    def should_continue(carry: _LoopCarry) -> Bool[Array, ""]:
        return (carry.step < last_step) & (jnp.sum(carry.state.finished) < limit)

    def body(carry: _LoopCarry) -> _LoopCarry:
        state, pending, window, num_new, found = speculative_step(
            model,
            carry.state,
            carry.pending,
            sampling_params,
            num_speculative_tokens,
            vocab_size,
            drafter,
            acceptance,
            logprobs,
            sync_without_drafts,
        )
        rows = jnp.arange(num_speculative_tokens + 1)
        index = jnp.where(rows < num_new[:, None], carry.num_tokens[:, None] + rows, capacity)

        def append(new: Array, old: Array) -> Array:
            return old.at[jnp.arange(batch)[:, None], index].set(new, mode="drop")

        tokens, all_logprobs = jax.tree.map(append, (window, found), (carry.tokens, carry.logprobs))
        return _LoopCarry(carry.step + 1, state, pending, tokens, carry.num_tokens + num_new, all_logprobs)

    no_tokens = jnp.zeros((batch, capacity), jnp.int32)
    pending = pending_between_windows(state.cache, num_speculative_tokens + 1)
    no_logprobs = None if logprobs is None else empty_logprobs(batch, capacity, logprobs.num_top)
    carry = _LoopCarry(jnp.int32(0), state, pending, no_tokens, jnp.zeros(batch, jnp.int32), no_logprobs)
    carry = lax.while_loop(should_continue, body, carry)
    state = carry.state.replace(cache=flush(carry.state.cache, carry.pending))
    return DecodeResult(state, carry.tokens, carry.num_tokens, carry.logprobs)


def insert_requests(
    state: DecodeState,
    new: DecodeState,
    rows: Int[Array, " N"],
    slots: Int[Array, " N"],
    num_requests: Int[Array, ""],
) -> DecodeState:
    """Put the first `num_requests` requests of `new` into slots of `state`.

    Args:
        state: of all slots; changed in place, if donated.
        new: of N requests. Cache and hidden state belong to prompts: requests with the same prompt share a row of them.
        rows: for each request the row of `new.cache` and `new.hidden` that has its prompt.
        slots: for each request its slot in `state`.
    """

    def copy_entry(target: Array, source: Array, axis: int, index: Array, slot: Array) -> Array:
        entry = lax.dynamic_slice_in_dim(source, index, 1, axis)
        return lax.dynamic_update_slice_in_dim(target, entry, slot, axis)

    def of_request(state: DecodeState) -> dict[str, Any]:
        names = [field.name for field in fields(state) if field.name not in ("cache", "hidden")]
        return {name: getattr(state, name) for name in names}

    def insert_one(i: Array, state: DecodeState) -> DecodeState:
        def copy_request(target: Array, source: Array) -> Array:
            return copy_entry(target, source, 0, i, slots[i])

        def copy_cache(target: Array, source: Array) -> Array:
            batch_axis = min(target.ndim - 1, 1)  # arrays are [layers, B, ...] or [B]
            return copy_entry(target, source, batch_axis, rows[i], slots[i])

        return state.replace(
            cache=jax.tree.map(copy_cache, state.cache, new.cache),
            hidden=copy_entry(state.hidden, new.hidden, 0, rows[i], slots[i]),
            **jax.tree.map(copy_request, of_request(state), of_request(new)),
        )

    return lax.fori_loop(0, num_requests, insert_one, state)
