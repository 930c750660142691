"""Several samples of a prompt, and the errors of `n` and of the parameters that keep tokens out of a text."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mtpjax import LLM, SamplingParams
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request
from mtpjax.engine.scheduler import Scheduler
from mtpjax.samples import SEED_STEP, SampleIndex, sample_seed, split_samples
from tests.helpers.fake_runner import FakeRunner, expected_tokens
from tests.helpers.word_checkpoint import SMALL, WORDS, write_checkpoint

HOT = SamplingParams(max_tokens=9, temperature=1.2, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [1]]
NUM_SAMPLES = (3, 1, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("samples") / "hf", tokenizer=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, num_speculative_tokens=2, **SMALL | {"max_num_seqs": 4})


def jobs() -> list[tuple[list[int], SamplingParams]]:
    return [(prompt, replace(HOT, n=n)) for prompt, n in zip(PROMPTS, NUM_SAMPLES, strict=True)]


def test_samples_stand_in_order_and_each_is_the_text_of_its_seed(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, [params for _, params in jobs()])
    for i, (prompt, n, output) in enumerate(zip(PROMPTS, NUM_SAMPLES, outputs, strict=True)):
        assert [one.index for one in output.outputs] == list(range(n)) and output.prompt_token_ids == prompt
        assert [one.seed for one in output.outputs] == [sample_seed(i, j) for j in range(n)]
        assert output.seed == output.outputs[0].seed == i and output.token_ids == output.outputs[0].token_ids
        assert len({tuple(one.token_ids) for one in output.outputs}) == n
        for one in output.outputs:
            assert one.text == " ".join(WORDS[t] for t in one.token_ids)
    every = [(prompt, one) for prompt, output in zip(PROMPTS, outputs, strict=True) for one in output.outputs]
    alone = llm.generate([prompt for prompt, _ in every], [replace(HOT, seed=one.seed) for _, one in every])
    assert [output.token_ids for output in alone] == [one.token_ids for _, one in every]


def test_samples_of_jobs_come_together_and_callbacks_tell_them_apart(llm: LLM) -> None:
    streamed: dict[tuple[int, int], list[int]] = defaultdict(list)

    def on_tokens(index: SampleIndex, tokens: list[int]) -> None:
        streamed[int(index), index.sample] += tokens

    together = llm.generate(PROMPTS, [params for _, params in jobs()])
    outputs = dict(llm.generate_iter(iter(jobs()), on_tokens=on_tokens))  # type: ignore[arg-type]
    for i, want in enumerate(together):
        assert [(one.index, one.seed, one.token_ids) for one in outputs[i].outputs] == [
            (one.index, one.seed, one.token_ids) for one in want.outputs
        ]
        assert [streamed[i, j] for j in range(NUM_SAMPLES[i])] == [one.token_ids for one in want.outputs]
    plain: list[int] = []
    llm.generate([[8, 9]], HOT, on_tokens=lambda index, tokens: plain.append(index))
    assert plain and set(plain) == {0}


def test_metrics_are_sums_over_samples(llm: LLM) -> None:
    (output,) = llm.generate([[5, 6, 7]], replace(HOT, n=3))
    singles = [llm.generate([[5, 6, 7]], replace(HOT, seed=one.seed))[0].metrics for one in output.outputs]
    m = output.metrics
    assert m.num_prompt_tokens == 3 and m.num_steps == sum(s.num_steps for s in singles)
    assert m.num_accepted_tokens == sum(s.num_accepted_tokens for s in singles) == sum(m.num_accepted_tokens_per_pos)
    assert m.num_drafts == m.num_steps and m.num_draft_tokens == 2 * m.num_drafts
    assert m.mean_acceptance_length == 1 + m.num_accepted_tokens / m.num_drafts
    (none,) = llm.generate([[5]], replace(HOT, n=2, max_tokens=0))
    assert [one.token_ids for one in none.outputs] == [[], []] and none.metrics.mean_acceptance_length == 1.0


@pytest.mark.parametrize(("n", "num_seqs"), [(3, 4), (4, 4), (11, 4), (5, 2), (3, 1)])
def test_a_prompt_is_read_once(folder: Path, n: int, num_seqs: int) -> None:
    """Also if all samples fit into the slots, and if they do not."""
    llm = LLM(folder, num_speculative_tokens=0, **SMALL | {"max_num_seqs": num_seqs})
    params = replace(HOT, n=n, max_tokens=2)
    for number, outputs in enumerate((llm.generate([[5, 6, 7]], params), llm.generate_iter([([5, 6, 7], params)]))):
        assert len(list(outputs)) == 1 and llm.engine.num_prompt_tokens == 3 * (number + 1)


def samples_of(prompts: list[tuple[int, ...]], n: int) -> list[Request]:
    return [sample for i, p in enumerate(prompts) for sample in split_samples(Request(i, p, 1 + i % 3, 1.0, 40 + i), n)]


@pytest.mark.parametrize("lookahead", [None, 5, 7])
@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_no_prompt_of_a_job_is_read_twice(num_slots: int, lookahead: int | None) -> None:
    """Whatever the number of requests that are taken together, also if it would divide the samples of a prompt."""
    runner: Any = FakeRunner(2, 4)
    prompts: list[tuple[int, ...]] = [(i % 13, i // 13, 3) for i in range(30)]
    todo = samples_of(prompts, 4)
    states = list(Engine(runner).stream(iter(todo), num_slots, lookahead=lookahead))
    assert sorted((s.request.index, s.request.sample) for s in states) == [(i, j) for i in range(30) for j in range(4)]
    assert all(state.tokens == expected_tokens(state.request) for state in states)
    assert sorted(p for read in runner.prefills for p in read) == sorted(p[:-1] for p in prompts)
    assert [state.request for state in Engine(runner).run(todo, num_slots)] == todo


def test_a_group_says_what_the_next_one_finds_read() -> None:
    scheduler = Scheduler([replace(s, max_tokens=2) for s in samples_of([(1, 2, 3), (4, 5)], 3)], 2)
    groups = []
    while group := scheduler.admit():
        groups.append((group.prompts, group.is_read, group.keep, len(group.slots)))
        scheduler.finish(group.slots[0])
        if len(group.slots) > 1:
            scheduler.finish(group.slots[1])
    a, b = [(1, 2, 3)], [(4, 5)]
    assert groups == [(a, False, True, 2), (a, True, False, 1), (b, False, True, 2), (b, True, False, 1)]


def test_seeds_of_neighbours_do_not_meet() -> None:
    assert sample_seed(-5, 0) == -5 and sample_seed(7, 1) == 7 + SEED_STEP
    gaps = [min(d * SEED_STEP % 2**32, -d * SEED_STEP % 2**32) for d in range(1, 16384)]
    assert min(gaps) > 170_000
    assert len({sample_seed(seed, i) for seed in range(200) for i in range(100)}) == 20_000


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n": 0}, "n is 0; expected a whole number from 1 to 16384"),
        ({"n": 16385, "temperature": 1.0}, "n is 16385; expected"),
        ({"n": True}, "n is True"),
        ({"n": 2}, "n is 2 and temperature is 0, so all samples would be the same; give a temperature above 0"),
        ({"min_tokens": -1}, "min_tokens is -1; expected a whole number >= 0"),
        ({"min_tokens": 1.5}, r"min_tokens is 1\.5"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, more than max_tokens, which is 8"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1 is nan; expected a finite number, -100 to 100"),
        ({"logit_bias": {1: float("-inf")}}, "logit_bias of token 1 is -inf"),
        ({"logit_bias": {1: "3"}}, "logit_bias of token 1 is '3'"),
        ({"logit_bias": {"w1": 3}}, "logit_bias has the key 'w1'; expected a token id"),
        ({"logit_bias": {-1: 3}}, "logit_bias has the key -1"),
        ({"logit_bias": {"1": 3, 1: 4}}, "logit_bias has token 1 twice"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; expected an object"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [1, -1]}, "allowed_token_ids has -1"),
        ({"allowed_token_ids": [1.0]}, r"allowed_token_ids has 1\.0"),
        ({"allowed_token_ids": 5}, "allowed_token_ids is 5; expected a list of token ids"),
        ({"bad_words": [""]}, "bad_words has ''; expected texts of at least one character"),
        ({"bad_words": [5]}, "bad_words has 5"),
        ({"bad_words": "word"}, "bad_words is 'word'; expected a list of texts"),
    ],
)
def test_bad_parameters_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"logit_bias": {90: 1.0}}, r"prompt 0: logit_bias has token 90, outside the vocabulary 0\.\.\.89"),
        ({"allowed_token_ids": [1, 1 << 40]}, "prompt 0: allowed_token_ids has token 1099511627776, outside"),
        ({"bad_words": [" "]}, "prompt 0: bad_words has ' ', which has no token"),
        ({"bad_words": ["w1 " * 33]}, "prompt 0: bad_words has 'w1 .*' with 33 tokens; at most 32"),
        (
            {"bad_words": [f"w{i // 80} w{i % 80}" for i in range(129)]},
            r"prompt 0: bad_words are 129 token sequences \(129 words, with .*\); at most 128",
        ),
        ({"bad_words": WORDS}, "prompt 0: bad_words and min_tokens may forbid all 90 tokens of the vocabulary"),
        ({"allowed_token_ids": [1, 2], "bad_words": ["w2", "w1"]}, "prompt 0: bad_words forbid every token of allowed"),
        (
            {"allowed_token_ids": [1, 2], "bad_words": ["w2"], "stop_token_ids": (1,), "min_tokens": 1},
            "prompt 0: every token of allowed_token_ids that bad_words leave is a stop token, which min_tokens forbids",
        ),
        (
            {"min_tokens": 1, "stop_token_ids": tuple(range(16)), "ignore_eos": True},
            "prompt 0: min_tokens forbids 17 stop tokens, the checkpoint's included; at most 16",
        ),
    ],
)
def test_what_only_the_model_shows_is_refused_by_the_place_of_the_prompt(
    llm: LLM, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate([[1]], SamplingParams(**bad))


def test_bad_words_need_a_tokenizer() -> None:
    from tests.helpers.word_checkpoint import MODEL

    bare = LLM(MODEL, num_speculative_tokens=0, **SMALL)
    with pytest.raises(ValueError, match="prompt 0 has bad_words, but the checkpoint has no tokenizer"):
        bare.generate([[1]], SamplingParams(bad_words=["w1"]))


def test_parameters_are_settled_as_in_vllm() -> None:
    bias: dict[Any, float] = {"3": 250, 4: -101.5, 5: 1}
    params = SamplingParams(logit_bias=bias, allowed_token_ids=[3, 3, 1], bad_words=["b", "a", "b"])
    assert params.logit_bias == {3: 100.0, 4: -100.0, 5: 1.0}
    assert params.allowed_token_ids == (3, 1) and params.bad_words == ("b", "a")
    assert hash(params) == hash(replace(params)) and params == replace(params)
    assert SamplingParams(bad_words=None, logit_bias={}) == SamplingParams(bad_words=[], logit_bias={})


def test_words_are_encoded_with_and_without_a_space() -> None:
    """The embedded model's tokenizer joins the space to the word. A form counts if it has as many tokens."""
    llm = LLM(max_model_len=64)
    assert llm.tokenizer is not None
    encode = llm.tokenizer.encode
    words = ["the", " the", "was", "\n\nhe"]
    request = llm._request(0, "a", SamplingParams(bad_words=words), "prompt 0")
    want = []
    for word in words:
        bare, spaced = encode(word.lstrip()), encode(" " + word.lstrip())
        want += [bare, spaced] if len(bare) == len(spaced) and bare[0] != spaced[0] else [bare]
    assert request.bad_words == tuple(dict.fromkeys(map(tuple, want))) and len(request.bad_words) > 3


@pytest.mark.slow
def test_an_llm_keeps_to_all_constraints(folder: Path) -> None:
    """Through the public API, beside a request without constraints; with an ignored end of text."""
    texts = []
    for num_speculative_tokens in (0, 2):
        llm = LLM(folder, num_speculative_tokens=num_speculative_tokens, **SMALL)
        (free,) = llm.generate([[5, 6]], HOT)
        word, stop = f"w{free.token_ids[1]} w{free.token_ids[2]}", free.token_ids[4]
        outputs = llm.generate(
            [[5, 6]] * 4,
            [
                replace(HOT, seed=0),
                replace(HOT, seed=0, bad_words=[word]),
                replace(HOT, seed=0, logit_bias={free.token_ids[0]: -100}, n=2, allowed_token_ids=range(0, 90, 2)),
                replace(HOT, seed=0, min_tokens=9, stop_token_ids=(stop,)),
            ],
        )
        assert outputs[0].token_ids == free.token_ids
        assert outputs[1].token_ids[:2] == free.token_ids[:2] and word not in (outputs[1].text or "")
        for one in outputs[2].outputs:
            assert all(token % 2 == 0 and token != free.token_ids[0] for token in one.token_ids)
        assert stop not in outputs[3].token_ids and outputs[3].finish_reason == "length"
        texts.append([one.token_ids for output in outputs for one in output.outputs])
    assert texts[0] == texts[1]
