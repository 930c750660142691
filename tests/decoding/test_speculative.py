"""Speculation never changes the text: at any draft length, batch and pattern of acceptance it is plain decoding's."""

import json
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from mtpjax.decoding.output_rows import OutputRows
from mtpjax.decoding.sampling import gumbel_noise
from mtpjax.decoding.speculative import DecodeState, decode, mtp_drafter
from mtpjax.engine.decode_batch import stack_requests
from mtpjax.engine.engine import Engine
from mtpjax.engine.model_runner import jit_step
from mtpjax.engine.request import Request, RequestState
from mtpjax.loading.loaded_model import LoadedModel
from tests.helpers.models import make_engine, numpy_model, tiny_config

TOKENS, MORE = 200, 208  # new tokens of a request; of a reference that a drafter looks ahead in
LENGTHS = (34, 1, 3, 17, 31)  # of the prompts of a batch: with chunks of 32: two, none, one, one, one
VOCAB = 96
MAX_LEN = max(LENGTHS) + MORE
DRAFTS = (1, 2, 3, 4, 8)


@cache
def model(kind: str) -> LoadedModel:
    return numpy_model(tiny_config(moe=kind == "moe", vocab_size=VOCAB), seed=7, scale=0.15)


@cache
def engine(kind: str, draft: int) -> Engine:
    return make_engine(model(kind), num_speculative_tokens=draft, max_model_len=MAX_LEN)


def requests(temperature: float, **changes) -> list[Request]:
    """Five unequal prompts without stop tokens."""
    rng = np.random.default_rng(11)
    prompts = [tuple(rng.integers(0, VOCAB, length).tolist()) for length in LENGTHS]
    each = [Request(i, p, TOKENS, temperature, 100 + i, ()) for i, p in enumerate(prompts)]
    return [replace(r, **changes) for r in each]


@cache
def plain(kind: str, temperature: float) -> list[list[int]]:
    """What decoding without drafts says, a few tokens beyond `TOKENS`."""
    return [r.tokens for r in engine(kind, 0).run(requests(temperature, max_tokens=MORE), len(LENGTHS))]


def check_figures(result: RequestState, draft: int) -> None:
    """A round gives one token of the trunk and its accepted drafts; only the last round may be cut short."""
    accepted = result.num_accepted_tokens_per_pos
    assert len(accepted) == draft and accepted == sorted(accepted, reverse=True)
    given = result.num_steps + sum(accepted)
    assert len(result.tokens) <= given <= len(result.tokens) + draft
    assert all(0 <= a <= result.num_steps for a in accepted)


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_plain_decoding_is_what_reading_the_text_says(kind):
    """What all else here is measured by: each token is the best of its row's logits plus the noise of its position."""
    for temperature in (0.0, 0.8):
        asked = requests(temperature)
        texts = [r.prompt_token_ids + tuple(tokens) for r, tokens in zip(asked, plain(kind, temperature), strict=True)]
        logits = np.concatenate(
            engine(kind, 0).runner.prefill(texts, OutputRows.all(), return_logits=True)[2], axis=1
        )  # padded in front
        for i, (request, text) in enumerate(zip(asked, texts, strict=True)):
            places = np.arange(len(request.prompt_token_ids), len(text))
            noise = jax.vmap(lambda at, seed=request.seed: gumbel_noise(jnp.uint32(seed), at, VOCAB))(places)
            rows = logits[i, places - len(text) - 1]
            assert (rows + temperature * noise).argmax(-1).tolist() == list(text[len(request.prompt_token_ids) :])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_draft_length_does_not_change_the_text(kind, draft, temperature):
    """A batch of five unequal prompts."""
    results = engine(kind, draft).run(requests(temperature), len(LENGTHS))
    for result, want in zip(results, plain(kind, temperature), strict=True):
        assert result.tokens == want[:TOKENS]
        assert result.finished and not result.stopped
        check_figures(result, draft)
    if temperature:  # the noise that both share makes drafts right far more often than one in 96, and not always
        rounds, accepted = sum(r.num_steps for r in results), sum(r.num_accepted_tokens_per_pos[0] for r in results)
        assert 0.25 < accepted / rounds < 0.5
    assert len({tuple(r.tokens) for r in results}) == len(results)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("kind", "draft"), [("moe", 3), ("dense", 0)])
def test_neighbours_do_not_change_the_text(kind, draft, temperature):
    """Each request alone, in a batch of one."""
    alone = engine(kind, draft).run(requests(temperature), 1)
    assert [r.tokens for r in alone] == [tokens[:TOKENS] for tokens in plain(kind, temperature)]


@pytest.mark.parametrize("read", [1, 5, 32, 33])
def test_how_much_of_the_prompt_the_head_reads_does_not_change_the_text(read):
    """Chunks of 32: rows that the head skips end inside a chunk, at its edge, or behind it."""
    for temperature in (0.0, 0.8):
        results = make_engine(
            model("moe"), num_speculative_tokens=3, max_model_len=MAX_LEN, mtp_prompt_tokens=read
        ).run(requests(temperature), len(LENGTHS))
        assert [r.tokens for r in results] == [tokens[:TOKENS] for tokens in plain("moe", temperature)]
        for result in results:
            check_figures(result, 3)


def test_a_head_that_reads_the_last_tokens_has_their_values_and_no_others():
    prompts = [r.prompt_token_ids for r in requests(0.0)]
    whole, _, _ = engine("moe", 3).runner.prefill(prompts)
    for read in (1, 5, 33, MAX_LEN):
        part, hidden, _ = engine("moe", 3).runner.prefill(prompts, mtp_prompt_tokens=read)
        for i, prompt in enumerate(prompts):
            rows = min(read, len(prompt))
            assert int(part.mtp_start_pos[i]) == len(prompt) - rows
            seen, all_of = np.asarray(part.mtp_v[0, i]), np.asarray(whole.mtp_v[0, i])
            np.testing.assert_allclose(seen[:, :rows], all_of[:, len(prompt) - rows : len(prompt)], atol=1e-5)
            assert not seen[:, rows:].any() and all_of[:, : len(prompt)].any()
        assert np.asarray(hidden).any()
    # Where that is the whole prompt, keys are the same as well, and so is all that follows.
    np.testing.assert_allclose(np.asarray(part.mtp_k), np.asarray(whole.mtp_k), atol=1e-5)
    a = make_engine(model("moe"), num_speculative_tokens=3, max_model_len=MAX_LEN, mtp_prompt_tokens=MAX_LEN).run(
        requests(0.8), len(LENGTHS)
    )
    b = engine("moe", 3).run(requests(0.8), len(LENGTHS))
    assert [r.num_accepted_tokens_per_pos for r in a] == [r.num_accepted_tokens_per_pos for r in b]


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
        replace(third, temperature=0.0, stop_token_ids=(VOCAB + 5, cold[2][90])),
        replace(fourth, max_tokens=1),
        replace(fifth, stop_token_ids=tuple(dict.fromkeys((hot[4][40], hot[4][41], hot[4][55])))),
    ]


def cut(tokens: list[int], request: Request) -> tuple[list[int], bool]:
    """The text until its limit or its first stop token, which is its last."""
    tokens = tokens[: request.max_tokens]
    at = next((i for i, token in enumerate(tokens) if token in request.stop_token_ids), None)
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
    assert results[1].num_steps == 0
    # Again, with other neighbours and other slots.
    again = engine("moe", draft).run([asked[4], asked[2]], 5)
    assert [(r.tokens, r.stopped) for r in again] == [want[4], want[2]]


def test_a_stop_token_anywhere_in_a_window():
    """Whichever row of whichever window the text stops in, it stops there."""
    tokens = plain("moe", 0.8)[0]
    asked = requests(0.8)[0]
    firsts = [i for i, token in enumerate(tokens[:40]) if token not in tokens[:i]]
    assert len(firsts) >= 15
    texts = [replace(asked, index=n, stop_token_ids=(tokens[i],)) for n, i in enumerate(firsts)]
    results = engine("moe", 3).run(texts, len(LENGTHS))
    assert [r.tokens for r in results] == [tokens[: i + 1] for i in firsts]
    assert all(r.stopped for r in results)


# Slots are filled from the longest prompt down; every other slot is greedy.
SLOTS = sorted(range(len(LENGTHS)), key=lambda i: -LENGTHS[i])
HEAT = (0.8, 0.0, 0.8, 0.0, 0.8)


def by_slot() -> list[Request]:
    return [requests(heat)[i] for i, heat in zip(SLOTS, HEAT, strict=True)]


@cache
def future(kind: str) -> list[list[int]]:
    """The true continuation of each slot."""
    return [plain(kind, heat)[i] for i, heat in zip(SLOTS, HEAT, strict=True)]


@cache
def forcing(kind: str, k: int) -> Engine:
    """Its drafter proposes `a` true tokens and wrong ones behind, a = (7 rounds + 3 slot) mod (k + 1).

    The MTP head drafts too, and its provisional keys and values stay in its cache for `sync` to replace.
    """
    texts = np.array(future(kind))

    def drafter(model, state, requests, k, vocab):
        _, cache = mtp_drafter(model, state, requests, k, vocab)
        right = (7 * state.rounds + 3 * jnp.arange(len(texts))) % (k + 1)
        ahead = state.count[:, None] + jnp.arange(k)
        true = jnp.take_along_axis(jnp.asarray(texts), ahead, axis=1, mode="fill", fill_value=0)
        return jnp.where(jnp.arange(k) < right[:, None], true, (true + 1) % vocab), cache

    return make_engine(model(kind), num_speculative_tokens=k, max_model_len=MAX_LEN, drafter=drafter)


def forced(slot: int, k: int) -> tuple[int, list[int]]:
    """Rounds until `TOKENS` tokens, and how often each position must have been accepted."""
    rounds, tokens, accepted = 0, 0, np.zeros(k, int)
    while tokens < TOKENS:
        right = (7 * rounds + 3 * slot) % (k + 1)
        accepted += np.arange(k) < right
        tokens += right + 1
        rounds += 1
    return rounds, accepted.tolist()


@pytest.mark.parametrize(("kind", "k"), [("moe", 4), ("dense", 8)])
def test_forced_acceptance(kind, k):
    """Every count 0...k in every slot, in changing order: the tokens of plain decoding and exactly these figures."""
    for slot, result in enumerate(forcing(kind, k).run(by_slot(), len(LENGTHS))):
        assert result.tokens == future(kind)[slot][:TOKENS]
        assert (result.num_steps, result.num_accepted_tokens_per_pos) == forced(slot, k)
        check_figures(result, k)


def start(by: Engine, asked: list[Request], done: list[bool]) -> DecodeState:
    """The state behind the prompts, on the host."""
    cache, hidden, _ = by.runner.prefill([r.prompt_token_ids[:-1] for r in asked])
    batch = len(asked)
    state = DecodeState(
        cache=cache,
        hidden=hidden,
        token=np.array([r.prompt_token_ids[-1] for r in asked], np.int32),
        count=np.zeros(batch, np.int32),
        done=np.array(done),
        stopped=np.zeros(batch, bool),
        rounds=np.zeros(batch, np.int32),
        accepted=np.zeros((batch, by.runner.num_speculative_tokens), np.int32),
    )
    return jax.tree.map(np.array, state)


def go_on(by: Engine, state: DecodeState, asked: list[Request]) -> tuple[DecodeState, list[list[int]]]:
    """The loop's next `MAX_STEPS_PER_CALL` rounds, by the program that the engine uses: state and new tokens, on the host."""
    told = stack_requests(asked)
    runner = by.runner
    static = {"graph": runner.model.graph, "k": runner.num_speculative_tokens, "rounds": runner.max_steps_per_call}
    program = jit_step(decode, **static, vocab=runner.vocab_size, drafter=runner.drafter)
    program = program.lower(runner.model.params, state, told, None).compile()
    state, out, used = jax.tree.map(np.array, program(runner.model.params, state, told, None))
    return state, [row[:count].tolist() for row, count in zip(out, used, strict=True)]


def test_the_cache_after_forced_acceptance_is_that_of_reading_the_text():
    """State, convolution inputs, keys and values, those of the MTP head included: rejected rows have left no trace."""
    by, asked = forcing("moe", 4), by_slot()
    state, new = go_on(by, start(by, asked, [False] * 5), asked)
    assert all(tokens == want[: len(tokens)] for tokens, want in zip(new, future("moe"), strict=True))
    # The last token is chosen but not in the cache.
    texts = [(*request.prompt_token_ids, *tokens[:-1]) for request, tokens in zip(asked, new, strict=True)]
    assert not any(state.done) and len({len(tokens) for tokens in new}) > 1
    fresh, hidden, _ = by.runner.prefill(texts)
    assert state.cache.length.tolist() == fresh.length.tolist() == [len(text) for text in texts]
    assert float(np.abs(state.hidden - hidden).max()) <= 1e-4
    for name in ("state", "conv"):
        assert float(np.abs(getattr(state.cache, name) - getattr(fresh, name)).max()) <= 2e-5, name
    for name, behind in (("k", 0), ("v", 0), ("mtp_k", 1), ("mtp_v", 1)):  # the head's last pair awaits the next draft
        for slot, text in enumerate(texts):
            a, b = (np.asarray(getattr(c, name))[:, slot, :, : len(text) - behind] for c in (state.cache, fresh))
            assert float(np.abs(a - b).max()) <= 1e-4, name  # rounding: few rows take all experts, many take windows


def test_an_idle_slot_keeps_every_bit():
    """While the others move; taken up again, it goes on as if nothing had been."""
    by, asked, want = engine("moe", 3), by_slot(), future("moe")
    idle = [False, True, False, True, False]
    before = start(by, asked, idle)
    after, new = go_on(by, before, asked)
    assert [tokens == [] for tokens in new] == idle
    for slot in (1, 3):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
            axis = int(a.ndim > 2)  # [layer, batch, ...] in the cache, [batch, ...] elsewhere
            assert np.array_equal(a.take(slot, axis), b.take(slot, axis)), jax.tree_util.keystr(path)
    _, new = go_on(by, after.replace(done=np.zeros(5, bool)), asked)
    for slot in (1, 3):
        assert new[slot] == want[slot][: len(new[slot])] and len(new[slot]) >= by.runner.max_steps_per_call


@pytest.mark.parametrize("draft", [0, 3])
def test_figures_of_the_api(draft):
    """`Metrics` and finish reasons, as users see them."""
    llm = LLM(model("moe"), num_speculative_tokens=draft, max_model_len=MAX_LEN, max_num_seqs=5, prefill_buckets=(32,))
    asked = mixed()
    params = [
        SamplingParams(max_tokens=r.max_tokens, temperature=r.temperature, seed=r.seed, ignore_eos=True,
                       stop_token_ids=tuple(s for s in r.stop_token_ids if s < VOCAB))
        for r in asked
    ]  # fmt: skip
    for i, out in enumerate(llm.generate([list(r.prompt_token_ids) for r in asked], params)):
        tokens, stopped = cut(plain("moe", asked[i].temperature)[i], asked[i])
        assert out.token_ids == tokens and out.finish_reason == ("stop" if stopped else "length")
        m = out.metrics
        assert m.num_prompt_tokens == len(asked[i].prompt_token_ids) and m.num_draft_tokens == m.num_steps * draft
        assert (
            m.num_accepted_tokens == sum(m.num_accepted_tokens_per_pos) and len(m.num_accepted_tokens_per_pos) == draft
        )
        assert m.num_drafts == (m.num_steps if draft else 0)
        assert m.mean_acceptance_length == (1 + m.num_accepted_tokens / m.num_drafts if m.num_drafts else 1.0)
        assert len(tokens) <= m.num_steps + m.num_accepted_tokens <= len(tokens) + draft


def test_the_embedded_model(shipped_code):
    """As users run it: the same text with and without drafts, greedy and sampled, and drafts that are worth having."""
    lines = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][:5]
    told = [SamplingParams(max_tokens=TOKENS, temperature=t, seed=5, ignore_eos=True) for t in HEAT]
    texts = {}
    for draft in (0, 3):
        llm = LLM(num_speculative_tokens=draft, max_model_len=500, max_num_seqs=5, prefill_buckets=(64,))
        outputs = llm.generate(prompts, told)
        texts[draft] = [out.token_ids for out in outputs]
        assert all(len(tokens) == TOKENS for tokens in texts[draft])
    assert texts[3] == texts[0]
    accepted, rounds = (
        sum(getattr(out.metrics, name) for out in outputs) for name in ("num_accepted_tokens", "num_steps")
    )
    assert accepted / rounds > 0.5
