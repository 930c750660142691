"""Every golden case against transformers: whole prompts, prompts in chunks, cached decoding, replay, the MTP head."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mtpjax import LLM
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.sampling import MAX_STOP_TOKENS, BatchSamplingParams
from mtpjax.decoding.steps import draft, verify
from mtpjax.model import commit, make_positions
from tests.golden.weights import CASES, VOCAB, golden_checksum
from tests.helpers.models import whole

TOLERANCE = 1e-4
PREFILL, WINDOW = 70, 4
# Chunks of the 150 rows, the 70 and the 5: with and without padding in front, borders on those of DeltaNet and off.
CHUNKS = {
    "dense_r1": (50,), "dense_r2": (64,), "dense_r3": (16, 64), "moe_r1": (64,), "moe_r2": (16, 64), "moe_r3": (29, 50),
}  # fmt: skip


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Logits (or hidden states) within the tolerance, and the same choice in every row."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    assert float(np.abs(ours - theirs).max()) <= TOLERANCE
    if theirs.shape[-1] == VOCAB:
        assert np.array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    """A case with its model, read in small chunks by one program for each length."""
    gold = golden(request.param)
    loaded = gold.model()
    llm = LLM(loaded, num_speculative_tokens=WINDOW - 1, max_model_len=200, prefill_buckets=CHUNKS[request.param])
    read = partial(llm.engine.runner.prefill, rows=OutputRows.all(), return_logits=True)
    return SimpleNamespace(gold=gold, loaded=loaded, llm=llm, read=read)


@partial(jax.jit, static_argnames="graph")
def walk(params, cache, windows, accepted, *, graph):
    """Logits `[n, W, V]` of n verify windows in a row, of which `accepted[i]` rows count."""
    model = nnx.merge(graph, params)

    def step(cache, at):
        tokens, count = at
        logits, _, cache, pending = verify(model, tokens[None], jnp.zeros(1, bool), cache)
        return commit(cache, pending, count[None]), logits[0]

    return lax.scan(step, cache, (windows, accepted))


@partial(jax.jit, static_argnames=("graph", "length"))
def drafts(params, hidden, token, cache, *, graph, length):
    """Greedy drafts by hand, with their logits, and by `steps.draft`; the head's keys of both."""
    model, idle = nnx.merge(graph, params), jnp.zeros(1, bool)
    greedy = BatchSamplingParams(
        jnp.full(1, 99), jnp.zeros(1), jnp.zeros(1, jnp.uint32), jnp.full((1, MAX_STOP_TOKENS), -1)
    )
    told, after = draft(model, hidden, token, idle, cache, greedy, length, VOCAB)
    logits = []
    for j in range(length):
        where = make_positions(model.cfg, cache.length - 1 + j, 1, jnp.zeros(1, jnp.int32), kv_len=cache.kv_len)
        rows, cache = model.mtp_step(hidden[:, None], token[:, None], cache, where)
        hidden = rows[:, 0]
        logits.append(model.head(rows)[0, 0])
        token = jnp.argmax(logits[-1])[None]
    return jnp.stack(logits), told[0], cache.mtp_k, after.mtp_k


def test_the_weights_are_those_of_the_answers(case):
    assert golden_checksum(case.gold.tensors) == case.gold["weights_crc32"]


def test_one_chunk(case):
    gold = case.gold
    logits, hidden, mtp = whole(case.loaded.params, gold["tokens"], graph=case.loaded.graph)
    agree(logits, gold["logits"])
    agree(hidden, gold["hidden"])
    agree(mtp, gold["mtp_logits"])


def test_chunks_of_a_prompt(case):
    agree(case.llm.logits(case.gold["tokens"].tolist()), case.gold["logits"])


def test_a_prompt_shorter_than_any_chunk(case):
    agree(case.llm.logits(case.gold["short_tokens"].tolist()), case.gold["short_logits"])


@pytest.mark.parametrize("name", ["dense_r2", "moe_r3"])
def test_hidden_states_of_chunks(name, golden):
    gold = golden(name)
    agree(LLM(gold.model(), prefill_buckets=CHUNKS[name]).hidden_states(gold["tokens"].tolist()), gold["hidden"])


def test_as_shipped(golden, shipped_code):
    """From the folder, with the storage and the compiler settings of this device."""
    gold = golden("moe_r3")
    agree(LLM(gold.path, dtype="float32", prefill_buckets=(64,)).logits(gold["tokens"].tolist()), gold["logits"])


def test_decoding_from_the_cache(case):
    """The logits behind the prompt, then one row at a time."""
    gold = case.gold
    prompt, fed = gold["tokens"][:PREFILL].tolist(), gold["decode_tokens"]
    cache, _, logits = case.read([prompt])
    agree(logits[-1][0, -1:], gold["decode_logits"][:1])
    ones = np.ones(len(fed), np.int32)
    cache, logits = walk(case.loaded.params, cache, fed[:, None], ones, graph=case.loaded.graph)
    agree(logits[:, 0], gold["decode_logits"][1:])
    assert cache.length.tolist() == [PREFILL + len(fed)]


@pytest.mark.parametrize("accepted", [(1, 4, 2, 3, 2), (0, 4, 0, 0, 1, 3, 0, 1, 1, 2)])
def test_decoding_in_windows_with_replay(case, accepted):
    """Of each window `accepted` rows are true and count; the rest is wrong and must leave no trace."""
    gold = case.gold
    fed, total = gold["decode_tokens"], len(gold["decode_tokens"])
    assert sum(accepted) == total
    starts = np.cumsum((0, *accepted[:-1]))
    windows = np.zeros((10, WINDOW), np.int32)  # one shape for both patterns
    counts = np.zeros(10, np.int32)
    for i, (start, count) in enumerate(zip(starts, accepted, strict=True)):
        windows[i] = (np.resize(fed[start:], WINDOW) + 7 * (np.arange(WINDOW) >= count)) % VOCAB
        counts[i] = count
    cache, _, _ = case.read([gold["tokens"][:PREFILL].tolist()])
    cache, logits = walk(case.loaded.params, cache, windows, counts, graph=case.loaded.graph)
    true = np.concatenate([logits[i, :count] for i, count in enumerate(accepted)])
    agree(true, gold["decode_logits"][1:])
    assert cache.length.tolist() == [PREFILL + total]


def test_drafts_of_the_mtp_head(case):
    """Three recurrent steps upon the keys and values that the prompt's chunks left behind."""
    gold = case.gold
    cache, hidden, _ = case.read([gold["tokens"].tolist()])
    agree(hidden[0], gold["hidden"][-1])
    logits, told, by_hand, keys = drafts(
        case.loaded.params, hidden, gold["next_token"][None], cache, graph=case.loaded.graph, length=3
    )
    agree(logits, gold["draft_logits"])
    assert np.array_equal(told, gold["draft_tokens"])
    assert float(np.abs(keys - by_hand).max()) <= TOLERANCE  # in the same slots
