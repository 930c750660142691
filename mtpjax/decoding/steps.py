"""The steps of generation as pure functions of (model or weights, inputs, cache): prefill, verify, draft, sync.

`prefill` and `forward_hidden` are programs of their own. They are plain functions; whoever compiles them jits them
with the argument names `PREFILL_STATIC` and `PREFILL_DONATED`, or `FORWARD_HIDDEN_STATIC` and
`FORWARD_HIDDEN_DONATED`. The others are pieces of the loop in `speculative.py`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from mtpjax.decoding.logits_processors import NO_STATE, TextState, process_logits
from mtpjax.decoding.output_rows import NO_ROWS, OutputRows
from mtpjax.decoding.rejection import sample_draft
from mtpjax.decoding.sampling import BatchSamplingParams, VocabSubset, sample
from mtpjax.model import Model, make_positions
from mtpjax.model.cache import Cache, PendingDeltaUpdates

PREFILL_STATIC = ("graph", "rows", "mtp_rows")
PREFILL_DONATED = ("cache",)
FORWARD_HIDDEN_STATIC = ("graph",)
FORWARD_HIDDEN_DONATED = ("cache",)


def prefill(
    params: Any,
    tokens: Int[Array, "B T"],
    next_tokens: Int[Array, "B T"],
    pad: Int[Array, " B"],
    cache: Cache,
    *,
    graph: Any,
    rows: OutputRows = NO_ROWS,
    mtp_rows: int | None = None,
) -> tuple[Float[Array, "B R V"], Float[Array, "B D"], Cache]:
    """Read one chunk of T rows of the prompts.

    It continues from any cache. Padding rows stand in front and change nothing.

    Args:
        params: weights of the split model.
        tokens: ids of the rows, int32; any ids in padding rows.
        next_tokens: the token after each row, for the keys and values of the MTP head.
        pad: number of padding rows in front of each sequence, 0...T.
        cache: of B sequences; consumed, if donated.
        graph: static half of the split model.
        rows: rows whose logits are returned. Without output rows there is no LM head in the program.
        mtp_rows: how many of the last rows leave keys and values for the MTP head; None: all. 0 makes this the program
            of a model without the head. From position `cache.mtp_start_pos` of a sequence on all rows must be among
            these; what they leave of rows before it is dropped.

    Returns:
        logits of the output rows (float32), hidden state of the last row for the MTP head (after the final norm; zeros
        if this chunk does not feed the head), and the cache.
    """
    return prefill_chunk(nnx.merge(graph, params), tokens, next_tokens, pad, cache, rows, mtp_rows)


def prefill_chunk(
    model: Model,
    tokens: Int[Array, "B T"],
    next_tokens: Int[Array, "B T"],
    pad: Int[Array, " B"],
    cache: Cache,
    rows: OutputRows,
    mtp_rows: int | None = None,
) -> tuple[Float[Array, "B R V"], Float[Array, "B D"], Cache]:
    """Run `prefill` on a merged model."""
    chunk_rows = tokens.shape[1]
    if model.mtp is None:
        mtp_rows = 0
    mtp_rows = chunk_rows if mtp_rows is None else min(mtp_rows, chunk_rows)
    num_rows = max(mtp_rows, rows.num_trailing_rows(chunk_rows))
    x, cache = _run_trunk(model, tokens, pad, cache, num_rows)
    if not mtp_rows:
        logits = model.head(model.final_norm(rows.take(x, chunk_rows)))
        return logits, jnp.zeros((x.shape[0], x.shape[2]), x.dtype), cache
    hidden = model.final_norm(x)  # of every row that the MTP head reads
    mtp_hidden = hidden[:, hidden.shape[1] - mtp_rows :]
    skipped = chunk_rows - mtp_rows
    mtp_pad = jnp.maximum(pad - skipped, 0)
    cache = _sync_mtp_prompt(model, mtp_hidden, next_tokens[:, skipped:], mtp_pad, cache)
    return model.head(rows.take(hidden, chunk_rows)), hidden[:, -1], cache


def forward_hidden(
    params: Any, tokens: Int[Array, "B T"], pad: Int[Array, " B"], cache: Cache, *, graph: Any
) -> tuple[Float[Array, "B T D"], Cache]:
    """Return the hidden states of every row of a chunk after the final norm. Arguments as in `prefill`."""
    model = nnx.merge(graph, params)
    x, cache = _run_trunk(model, tokens, pad, cache)
    return model.final_norm(x), cache


def _run_trunk(
    model: Model, tokens: Int[Array, "B T"], pad: Int[Array, " B"], cache: Cache, num_rows: int | None = None
) -> tuple[Float[Array, "B rows D"], Cache]:
    """Run a prompt chunk through the trunk; all of its rows enter the cache.

    Returns:
        the last `num_rows` rows (None: all) before the final norm, and the cache.
    """
    rows = tokens.shape[1]
    positions = make_positions(model.cfg, cache.length, rows, pad, kv_len=cache.kv_len, is_prompt=True)
    x, cache = model.trunk(tokens, cache, positions, num_rows)
    return x, cache.replace(length=cache.length + tokens.shape[1] - pad)


def _sync_mtp_prompt(
    model: Model,
    mtp_hidden: Float[Array, "B T D"],
    next_tokens: Int[Array, "B T"],
    pad: Int[Array, " B"],
    cache: Cache,
) -> Cache:
    """Write the MTP head's keys and values of the last T committed rows, of which the first `pad` are padding."""
    num_rows = mtp_hidden.shape[1]
    start = cache.length - cache.mtp_start_pos - num_rows + pad
    positions = make_positions(model.cfg, start, num_rows, pad, kv_len=cache.kv_len)
    return model.mtp_sync(mtp_hidden, next_tokens, cache, positions)


def verify(
    model: Model,
    tokens: Int[Array, "B W"],
    inactive: Bool[Array, " B"],
    cache: Cache,
    pending: PendingDeltaUpdates | None = None,
) -> tuple[Float[Array, "B W V"], Float[Array, "B W D"], Cache, PendingDeltaUpdates]:
    """Run the trunk on a window of W rows, all of them output rows.

    Args:
        inactive: sequences whose rows are padding; they change nothing and cost no experts.
        pending: accepted rows of the window before that the DeltaNet states lack; None: they lack none.

    Returns:
        float32 logits, hidden states after the final norm, the cache, and the DeltaNet updates that wait for
        `mtpjax.model.cache.accept` or `commit`.
    """
    width = tokens.shape[1]
    positions = make_positions(model.cfg, cache.length, width, jnp.where(inactive, width, 0), kv_len=cache.kv_len)
    hidden, cache, pending = model.trunk_pending(tokens, cache, positions, pending)
    return model.head(OutputRows.all().take(hidden)), hidden, cache, pending


def draft(
    model: Model,
    hidden: Float[Array, "B D"],
    token: Int[Array, " B"],
    inactive: Bool[Array, " B"],
    cache: Cache,
    sampling_params: BatchSamplingParams,
    num_speculative_tokens: int,
    vocab_size: int,
    text_state: TextState = NO_STATE,
) -> tuple[Int[Array, "B k"], Cache]:
    """Draft k tokens with the MTP head, which is applied again and again to its own hidden state (after `mtp.norm`).

    The head is that of DeepSeek-V3 (arXiv:2412.19437, section 2.2); one head drafts all tokens. Step j writes the keys
    and values of position `cache.length - 1 + j` into the head's cache. All but those of step 0 are provisional:
    `sync_mtp_cache` overwrites them.

    With a draft head (`Model.draft_head`) the tokens come from its part of the vocabulary. Penalties and noise are
    those of the same ids in the trunk. Top-k, top-p and min-p count among the part only, so they differ a little from
    the trunk's: that can cost a draft, and nothing else.

    Args:
        hidden: of the last committed row, after the final norm.
        token: the token that follows that row.
        inactive: sequences that draft nothing; their tokens mean nothing.
        text_state: of prompt and text, up to and including `token`.
    """
    of_request = hidden, token, inactive, cache, sampling_params
    how = num_speculative_tokens, vocab_size, text_state
    drafts, cache, _ = draft_with_logits(model, *of_request, *how, own_noise=False)
    return drafts, cache


def draft_with_logits(
    model: Model,
    hidden: Float[Array, "B D"],
    token: Int[Array, " B"],
    inactive: Bool[Array, " B"],
    cache: Cache,
    sampling_params: BatchSamplingParams,
    num_speculative_tokens: int,
    vocab_size: int,
    text_state: TextState,
    *,
    own_noise: bool = True,
) -> tuple[Int[Array, "B k"], Cache, Float[Array, "B k V"] | None]:
    """Draft as `draft` does, but with noise that the trunk does not share, for the rule of `rejection.py`.

    Args:
        own_noise: False for `draft`: the trunk's noise.

    Returns:
        the drafts, the cache, and with noise of their own the filtered logits that the drafts were drawn from.
    """
    one, token_ids = jnp.ones_like(token), model.draft_token_ids
    subset = None if token_ids is None else VocabSubset(token_ids, model.cfg.vocab_size)
    if token_ids is not None:
        text_state, sampling_params = text_state.take(token_ids), sampling_params.take(token_ids)
    Carry = tuple[Array, Array, Cache, TextState]

    def sample_one(logits: Array, positions: Array) -> tuple[Array, Array | None]:
        if own_noise:
            return sample_draft(logits, positions, sampling_params, vocab_size, subset)
        return sample(logits, positions, sampling_params, vocab_size, subset), None

    def step(carry: Carry, j: Int[Array, ""]) -> tuple[Carry, tuple[Array, Array | None]]:
        hidden, token, cache, text_state = carry
        start = cache.length - cache.mtp_start_pos - 1 + j
        positions = make_positions(model.cfg, start, 1, inactive.astype(jnp.int32), kv_len=cache.kv_len)
        mtp_hidden, cache = model.mtp_step(hidden[:, None], token[:, None], cache, positions)
        logits = process_logits(model.draft_logits(mtp_hidden), sampling_params, text_state)
        column, filtered = sample_one(logits, (cache.length + 1 + j)[:, None])
        text_state = text_state.add(column, one, sampling_params.automata)
        token = column[:, 0] if token_ids is None else token_ids[column[:, 0]]
        return (mtp_hidden[:, 0], token, cache, text_state), (token, filtered)

    carry, (drafts, logits) = lax.scan(step, (hidden, token, cache, text_state), jnp.arange(num_speculative_tokens))
    return drafts.T, carry[2], None if logits is None else logits.swapaxes(0, 1)


def sync_mtp_cache(
    model: Model,
    hidden: Float[Array, "B W D"],
    drafts: Int[Array, "B k"],
    inactive: Bool[Array, " B"],
    cache: Cache,
) -> Cache:
    """Replace the MTP head's provisional keys and values of rows 0...k-1 by those of the trunk's own hidden states.

    Row k is the first draft step of the next step of the loop. Rows after the accepted ones are stale and overwritten
    later.
    """
    k = drafts.shape[1]
    start = cache.length - cache.mtp_start_pos
    positions = make_positions(model.cfg, start, k, jnp.where(inactive, k, 0), kv_len=cache.kv_len)
    return model.mtp_sync(hidden[:, :k], drafts, cache, positions)


def sync_last_row(
    model: Model, hidden: Float[Array, "B D"], token: Int[Array, " B"], inactive: Bool[Array, " B"], cache: Cache
) -> Cache:
    """Write the MTP head's keys and values of the last committed row, as the first step of `draft` does.

    Args:
        hidden: of that row, after the final norm.
        token: the token that follows it.
    """
    start = cache.length - cache.mtp_start_pos - 1
    positions = make_positions(model.cfg, start, 1, inactive.astype(jnp.int32), kv_len=cache.kv_len)
    return model.mtp_sync(hidden[:, None], token[:, None], cache, positions)
