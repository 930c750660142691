"""Log-probabilities of tokens: of the chosen one, of the most probable ones, and the rank of the chosen one.

A row's numbers are a function of its logits alone, to the bit: the sum over the vocabulary has an order that the size
of the vocabulary fixes (`sum_features`). So they are the same at every draft length, in any batch, and among the rows
of a prompt. The names are vLLM's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.fixed_order import sum_features
from kernels_pallas.row_ops import map_rows
from mtpjax.decoding.sampling import BatchSamplingParams, TruncationParams, apply_top_k_top_p_min_p
from mtpjax.decoding.steps import forward_hidden
from mtpjax.model.cache import Cache

RAW, PROCESSED = "raw_logprobs", "processed_logprobs"
LOGPROBS_MODES = (RAW, PROCESSED)
PROMPT_LOGPROBS_DONATED = ("cache",)
PROMPT_BLOCK = 64  # rows of a prompt whose logits exist at the same time


class LogprobsSpec(NamedTuple):
    """What is computed beside each token; a static argument of a program.

    Attributes:
        num_top: K, the most probable tokens of each row; 0: none but the chosen one.
        mode: `RAW`, of the model's own logits, or `PROCESSED`, of those that the token was sampled from.
    """

    num_top: int
    mode: str = RAW


class TokenLogprobs(NamedTuple):
    """Log-probabilities of tokens, on the device or the host; `...` are the axes of the rows.

    Attributes:
        chosen: of the chosen token, float32 `[...]`.
        rank: of the chosen token, int32 `[...]`: 1 is the most probable one. Of equally probable tokens the lower id
            comes first.
        top_ids: the K most probable tokens, int32 `[..., K]`, in the order of their ranks.
        top: of these, float32 `[..., K]`.
    """

    chosen: Any
    rank: Any
    top_ids: Any
    top: Any


def token_logprobs(
    logits: Float[Array, "N V"], tokens: Int[Array, " N"], num_top: int, vocab_size: int
) -> TokenLogprobs:
    """Return the log-probabilities, under softmax(logits), of `tokens` and of the `num_top` most probable ones.

    Args:
        logits: float32; -inf removes a token.
        vocab_size: ids from here on do not exist: they have no probability.
    """
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    if vocab_size < logits.shape[-1]:
        logits = jnp.where(ids < vocab_size, logits, -jnp.inf)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    log_total = jnp.log(sum_features(jnp.exp(logits - largest)))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    before = (logits > chosen) | ((logits == chosen) & (ids < tokens[:, None]))
    if num_top:
        top, top_ids = lax.top_k(logits, num_top)
    else:
        top, top_ids = logits[:, :0], jnp.zeros((logits.shape[0], 0), jnp.int32)
    return TokenLogprobs(
        chosen=((chosen - largest) - log_total)[:, 0],
        rank=1 + jnp.sum(before, axis=-1, dtype=jnp.int32),
        top_ids=top_ids.astype(jnp.int32),
        top=(top - largest) - log_total,
    )


def window_logprobs(
    spec: LogprobsSpec,
    raw_logits: Float[Array, "B W V"],
    processed_logits: Float[Array, "B W V"],
    tokens: Int[Array, "B W"],
    sampling_params: BatchSamplingParams,
    vocab_size: int,
) -> TokenLogprobs:
    """Return the log-probabilities of the tokens of a verify window.

    `PROCESSED` is the distribution that the token is sampled from: softmax(logits / T) after penalties and other
    processors, without the tokens that top-k, top-p and min-p remove (log-probability -inf). At T = 0 it is
    softmax(logits) after the processors, without removals: as in vLLM, where a greedy request has temperature 1 there
    and top-k, top-p and min-p do not count.

    Args:
        raw_logits: of the model, float32.
        processed_logits: after `process_logits`.
        tokens: of the text. Row r of them comes from row r of the logits.
    """

    def of_rows(rows: tuple[Array, Array], sequences: tuple[Array, TruncationParams | None]) -> TokenLogprobs:
        (logits, tokens), (temperature, truncation) = rows, sequences
        if spec.mode == PROCESSED:
            logits = _as_sampled(logits, temperature, truncation, vocab_size)
        return token_logprobs(logits, tokens, spec.num_top, vocab_size)

    logits = raw_logits if spec.mode == RAW else processed_logits
    return map_rows(of_rows, (logits, tokens), (sampling_params.temperature, sampling_params.truncation))


def _as_sampled(
    logits: Float[Array, "N V"], temperature: Float[Array, " N"], truncation: TruncationParams | None, vocab_size: int
) -> Float[Array, "N V"]:
    sampled = temperature > 0
    temperature = jnp.where(sampled, temperature, 1)
    if vocab_size < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    if truncation is not None:
        logits = jnp.where(
            sampled[:, None], apply_top_k_top_p_min_p(logits, temperature, truncation), logits
        )  # a greedy request has its own tokens only, whatever its top-k, top-p and min-p
    return logits / temperature[:, None]


def empty_logprobs(batch: int, capacity: int, num_top: int) -> TokenLogprobs:
    """Return zeros for `capacity` tokens of each of `batch` requests."""
    rows = (batch, capacity)
    return TokenLogprobs(
        chosen=jnp.zeros(rows, jnp.float32),
        rank=jnp.zeros(rows, jnp.int32),
        top_ids=jnp.zeros((*rows, num_top), jnp.int32),
        top=jnp.zeros((*rows, num_top), jnp.float32),
    )


def prompt_logprobs(
    params: Any,
    tokens: Int[Array, "B T"],
    next_tokens: Int[Array, "B T"],
    pad: Int[Array, " B"],
    cache: Cache,
    *,
    graph: Any,
    num_top: int,
    vocab_size: int,
) -> tuple[TokenLogprobs, Cache]:
    """Return the log-probabilities `[B, T]` of the token after each row of a prompt chunk, and the cache.

    The LM head is applied to `PROMPT_BLOCK` rows at a time, so logits of all rows never exist together, and a row is
    always multiplied among that many rows, whatever the chunk and the batch.

    Args:
        params: weights of the split model.
        tokens, pad, cache: as for `mtpjax.decoding.steps.prefill`.
        next_tokens: the token after each row; the results of rows without one mean nothing.
        graph: static half of the split model.
        num_top: most probable tokens of each row.
        vocab_size: ids below this exist.
    """
    hidden, cache = forward_hidden(params, tokens, pad, cache, graph=graph)
    model = nnx.merge(graph, params)
    batch, num_rows, width = hidden.shape

    def blocks(rows: Array) -> Array:
        rows = rows.reshape(batch * num_rows, *rows.shape[2:])
        missing = -len(rows) % PROMPT_BLOCK
        rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(len(rows) // PROMPT_BLOCK, PROMPT_BLOCK, *rows.shape[1:])

    def of_block(block: tuple[Array, Array]) -> TokenLogprobs:
        hidden, next_tokens = block
        return token_logprobs(model.head(hidden[None])[0], next_tokens, num_top, vocab_size)

    found = lax.map(of_block, (blocks(hidden), blocks(next_tokens)))

    def by_sequence(rows: Array) -> Array:
        rows = rows.reshape(rows.shape[0] * PROMPT_BLOCK, *rows.shape[2:])[: batch * num_rows]
        return rows.reshape(batch, num_rows, *rows.shape[1:])

    return jax.tree.map(by_sequence, found), cache
