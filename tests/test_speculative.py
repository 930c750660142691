"""Speculation never changes the text: every draft length, any batch, any pattern of acceptance gives plain decoding's tokens."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_engine, numpy_model, tiny_config

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from mtpjax.engine import Engine, Request, Result
from mtpjax.sampling import STOPS
from mtpjax.speculative import decode, mtp_drafter
from mtpjax.weights import LoadedModel

TOKENS, MORE = 200, 216  # new tokens of a request; of a reference that a drafter looks ahead in
LENGTHS = (34, 1, 3, 17, 30)  # of the prompts of a batch: two chunks, none (the last token is the loop's), one
VOCAB = 96
DRAFTS = (1, 2, 3, 4, 8)


@cache
def model(kind: str) -> LoadedModel:
    return numpy_model(tiny_config(moe=kind == "moe", vocab_size=VOCAB), seed=7, scale=0.15)


@cache
def engine(kind: str, draft: int) -> Engine:
    return make_engine(model(kind), draft=draft, max_len=max(LENGTHS) + MORE)


def requests(temperature: float, **changes) -> list[Request]:
    """Five unequal prompts without stop tokens."""
    rng = np.random.default_rng(11)
    prompts = [tuple(rng.integers(0, VOCAB, length).tolist()) for length in LENGTHS]
    each = [Request(i, p, TOKENS, temperature, 100 + i, ()) for i, p in enumerate(prompts)]
    return [replace(r, **changes) for r in each]


@cache
def plain(kind: str, temperature: float, batch: int = len(LENGTHS)) -> list[list[int]]:
    """What decoding without drafts says, a few tokens beyond `TOKENS`."""
    return [r.tokens for r in engine(kind, 0).run(requests(temperature, max_tokens=MORE), batch)]


def check_figures(result: Result, draft: int) -> None:
    """A round gives one token of the trunk and its accepted drafts; only the last round may be cut short."""
    accepted = result.accepted_per_position
    assert len(accepted) == draft and accepted == sorted(accepted, reverse=True)
    given = result.rounds + sum(accepted)
    assert len(result.tokens) <= given <= len(result.tokens) + draft
    assert all(0 <= a <= result.rounds for a in accepted)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_draft_length_does_not_change_the_text(kind, draft, temperature):
    """A batch of five unequal prompts."""
    results = engine(kind, draft).run(requests(temperature), len(LENGTHS))
    for result, want in zip(results, plain(kind, temperature), strict=True):
        assert result.tokens == want[:TOKENS]
        assert result.done and not result.stopped
        check_figures(result, draft)
    if temperature:  # the test is about something: drafts are right now and then, and not always
        rounds, accepted = sum(r.rounds for r in results), sum(r.accepted_per_position[0] for r in results)
        assert 0.05 < accepted / rounds < 0.95
    assert len({tuple(r.tokens) for r in results}) == len(results)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("kind", "draft"), [("moe", 0), ("moe", 3), ("dense", 8)])
def test_neighbours_do_not_change_the_text(kind, draft, temperature):
    """Each request alone, in a batch of one."""
    alone = engine(kind, draft).run(requests(temperature), 1)
    assert [r.tokens for r in alone] == [tokens[:TOKENS] for tokens in plain(kind, temperature)]


def test_a_half_empty_batch():
    for few in ([2], [4, 1, 3]):
        asked = requests(0.8)
        results = engine("moe", 3).run([asked[i] for i in few], len(LENGTHS))
        assert [r.tokens for r in results] == [plain("moe", 0.8)[i][:TOKENS] for i in few]


def mixed() -> list[Request]:
    """Limits, temperatures, seeds and stop tokens all differ; prompts 0...4 but in the order of `limits`."""
    hot, cold = plain("moe", 0.8), plain("moe", 0.0)
    first, second, third, fourth, fifth = requests(0.8)
    return [
        replace(first, max_tokens=7),
        replace(second, temperature=0.0, max_tokens=0),
        replace(third, temperature=0.0, stops=(VOCAB + 5, cold[2][90])),
        replace(fourth, max_tokens=1),
        replace(fifth, stops=tuple(dict.fromkeys((hot[4][40], hot[4][41], hot[4][55])))),
    ]


def cut(tokens: list[int], request: Request) -> tuple[list[int], bool]:
    """The text until its limit or its first stop token, which is its last."""
    tokens = tokens[: request.max_tokens]
    at = next((i for i, token in enumerate(tokens) if token in request.stops), None)
    return (tokens, False) if at is None else (tokens[: at + 1], True)


@pytest.mark.parametrize("draft", [0, 1, 3, 8])
def test_every_request_keeps_its_own_settings(draft):
    asked = mixed()
    want = [cut(plain("moe", r.temperature)[i], r) for i, r in enumerate(asked)]
    assert [stopped for _, stopped in want] == [False, False, True, False, True]
    heard: dict[int, list[int]] = {r.index: [] for r in asked}
    results = engine("moe", draft).run(asked, 5, lambda result, new: heard[result.request.index].extend(new))
    assert [(r.tokens, r.stopped) for r in results] == want
    assert [heard[r.index] for r in asked] == [tokens for tokens, _ in want]
    for result in results:
        check_figures(result, draft)
    assert results[1].rounds == 0
    # Again, with other neighbours and other slots.
    again = engine("moe", draft).run([asked[4], asked[2]], 5)
    assert [(r.tokens, r.stopped) for r in again] == [want[4], want[2]]


def test_a_stop_token_anywhere_in_a_window():
    """Whichever row of whichever window the text stops in, it stops there."""
    tokens = plain("moe", 0.8)[0]
    asked = requests(0.8)[0]
    firsts = [i for i, token in enumerate(tokens[:40]) if token not in tokens[:i]]
    assert len(firsts) >= 15
    texts = [replace(asked, index=n, stops=(tokens[i],)) for n, i in enumerate(firsts)]
    results = engine("moe", 3).run(texts, len(LENGTHS))
    assert [r.tokens for r in results] == [tokens[: i + 1] for i in firsts]
    assert all(r.stopped for r in results)


@cache
def scripted(kind: str, k: int, temperature: float):
    """A drafter that proposes the true continuation for `a` tokens and wrong ones behind, a = 7 rounds + 3 slot mod k + 1.

    The MTP head drafts too, and its provisional keys and values stay in its cache for `sync` to replace.
    """
    order = sorted(range(len(LENGTHS)), key=lambda i: -LENGTHS[i])  # as the engine fills its slots
    future = jnp.array([plain(kind, temperature)[i] for i in order])

    def drafter(model, state, requests, k, vocab):
        _, cache = mtp_drafter(model, state, requests, k, vocab)
        slots = jnp.arange(state.token.shape[0])
        right = (7 * state.rounds + 3 * slots) % (k + 1)
        true = jnp.take_along_axis(future, state.count[:, None] + jnp.arange(k), axis=1, mode="fill", fill_value=0)
        return jnp.where(jnp.arange(k) < right[:, None], true, (true + 1) % vocab), cache

    return drafter, order


def forced(slot: int, k: int) -> tuple[int, list[int]]:
    """Rounds until `TOKENS` tokens, and how often each position was accepted."""
    rounds, tokens, accepted = 0, 0, np.zeros(k, int)
    while tokens < TOKENS:
        right = (7 * rounds + 3 * slot) % (k + 1)
        accepted += np.arange(k) < right
        tokens += right + 1
        rounds += 1
    return rounds, accepted.tolist()


@pytest.mark.parametrize(("kind", "k", "temperature"), [("moe", 4, 0.8), ("moe", 4, 0.0), ("dense", 1, 0.0), ("dense", 8, 0.8)])
def test_forced_acceptance(kind, k, temperature):
    drafter, order = scripted(kind, k, temperature)
    forcing = make_engine(model(kind), draft=k, max_len=max(LENGTHS) + MORE, drafter=drafter)
    results = forcing.run(requests(temperature), len(LENGTHS))
    for slot, i in enumerate(order):
        assert results[i].tokens == plain(kind, temperature)[i][:TOKENS]
        assert (results[i].rounds, results[i].accepted_per_position) == forced(slot, k)
        check_figures(results[i], k)


def stop_rows(request_list: list[Request]) -> np.ndarray:
    rows = np.full((len(request_list), STOPS), -1, np.int32)
    for row, request in zip(rows, request_list, strict=True):
        row[: len(request.stops)] = request.stops
    return rows


def test_the_cache_after_forced_acceptance_is_that_of_reading_the_text():
    """State, convolution inputs, keys and values, those of the MTP head included: rejected rows have left no trace."""
    k, temperature = 4, 0.8
    drafter, order = scripted("moe", k, temperature)
    by_hand = make_engine(model("moe"), draft=k, max_len=max(LENGTHS) + MORE, drafter=drafter)
    asked = [requests(temperature)[i] for i in order]
    state = start(by_hand, asked)
    state, out, used = run_loop(by_hand, state, asked, rounds=23)
    texts = []
    for slot, request in enumerate(asked):
        want = plain("moe", temperature)[order[slot]]
        assert out[slot, : used[slot]].tolist() == want[: used[slot]]
        texts.append((*request.prompt, *want[: used[slot] - 1]))  # the last token is chosen but not in the cache
    assert len({len(t) for t in texts}) > 1
    fresh, hidden, _ = by_hand.read(texts)
    got = state.cache
    assert got.length.tolist() == fresh.length.tolist() == [len(t) for t in texts]
    assert float(np.abs(state.hidden - hidden).max()) <= 1e-4
    for name in ("state", "conv"):
        assert float(np.abs(getattr(got, name) - getattr(fresh, name)).max()) <= 2e-5, name
    for name, behind in (("k", 0), ("v", 0), ("mtp_k", 1), ("mtp_v", 1)):  # the head's last pair awaits the next draft
        for slot, text in enumerate(texts):
            a, b = (np.asarray(getattr(c, name))[:, slot, :, : len(text) - behind] for c in (got, fresh))
            assert float(np.abs(a - b).max()) <= 2e-5, name


def start(by_hand: Engine, asked: list[Request], done: tuple[bool, ...] | None = None):
    from mtpjax.speculative import LoopState

    cache, hidden, _ = by_hand.read([r.prompt[:-1] for r in asked])
    batch = len(asked)
    return LoopState(
        cache=cache,
        hidden=hidden,
        token=jnp.array([r.prompt[-1] for r in asked], jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        done=jnp.array(done or (False,) * batch),
        stopped=jnp.zeros(batch, bool),
        rounds=jnp.zeros(batch, jnp.int32),
        accepted=jnp.zeros((batch, by_hand.draft), jnp.int32),
    )


def run_loop(by_hand: Engine, state, asked: list[Request], rounds: int):
    from mtpjax.sampling import Requests

    told = Requests(
        max_tokens=jnp.array([r.max_tokens for r in asked], jnp.int32),
        temperature=jnp.array([r.temperature for r in asked], jnp.float32),
        seed=jnp.array([r.seed for r in asked], jnp.uint32),
        stops=stop_rows(asked),
    )
    state, out, used = decode(
        by_hand.model.params, state, told, graph=by_hand.model.graph, k=by_hand.draft, rounds=rounds, vocab=VOCAB,
        drafter=by_hand.drafter,
    )  # fmt: skip
    return state, np.asarray(out), np.asarray(used)


def test_an_idle_slot_keeps_every_bit():
    """Its state, so that it can be taken up again: only the others move."""
    asked = requests(0.8)
    by_hand = engine("moe", 3)
    done = (False, True, False, True, False)
    state = start(by_hand, asked, done)
    before = jax.tree.map(np.array, state)
    state, _, used = run_loop(by_hand, state, asked, rounds=5)
    assert (used > 0).tolist() == [not d for d in done]
    after = jax.tree.map(np.array, state)
    for slot in (1, 3):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
            axis = int(a.ndim > 2)  # [layer, batch, ...] in the cache, [batch, ...] elsewhere
            assert np.array_equal(np.take(a, slot, axis), np.take(b, slot, axis)), jax.tree_util.keystr(path)
    # Taken up again, it goes on as if nothing had been.
    state = state.replace(done=jnp.zeros(5, bool))
    _, out, used = run_loop(by_hand, state, asked, rounds=5)
    for slot in (1, 3):
        assert out[slot, : used[slot]].tolist() == plain("moe", 0.8)[slot][: used[slot]]


@pytest.mark.parametrize("draft", [0, 3])
def test_figures_of_the_api(draft):
    """`Metrics` and finish reasons, as users see them."""
    llm = LLM(model("moe"), draft=draft, max_len=max(LENGTHS) + MORE, max_batch=5, prefill_chunks=(32,))
    asked = mixed()
    params = [
        SamplingParams(max_tokens=r.max_tokens, temperature=r.temperature, seed=r.seed, ignore_eos=True,
                       stop_token_ids=tuple(s for s in r.stops if s < VOCAB))
        for r in asked
    ]  # fmt: skip
    for i, out in enumerate(llm.generate([list(r.prompt) for r in asked], params)):
        tokens, stopped = cut(plain("moe", asked[i].temperature)[i], asked[i])
        assert out.token_ids == tokens and out.finish_reason == ("stop" if stopped else "length")
        m = out.metrics
        assert m.prompt_tokens == len(asked[i].prompt) and m.drafted == m.rounds * draft
        assert m.accepted == sum(m.accepted_per_position) and len(m.accepted_per_position) == draft
        assert m.tokens_per_round == (len(tokens) / m.rounds if m.rounds else 0.0)
        assert len(tokens) <= m.rounds + m.accepted <= len(tokens) + draft


def test_the_embedded_model(shipped_code):
    """As users run it: the same text with and without drafts, greedy and sampled, and drafts that are worth having."""
    lines = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][:5]
    told = [SamplingParams(max_tokens=TOKENS, temperature=t, seed=5, ignore_eos=True) for t in (0.0, 0.8, 0.0, 0.8, 0.8)]
    texts = {}
    for draft in (0, 3):
        llm = LLM(draft=draft, max_len=500, max_batch=5, prefill_chunks=(64,))
        outputs = llm.generate(prompts, told[: len(prompts)])
        texts[draft] = [out.token_ids for out in outputs]
        assert all(len(tokens) == TOKENS for tokens in texts[draft])
    assert texts[3] == texts[0]
    accepted, rounds = (sum(getattr(out.metrics, name) for out in outputs) for name in ("accepted", "rounds"))
    assert accepted / rounds > 0.5
