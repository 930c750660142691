"""Stop strings: the place is that of a text read token by token, whatever the drafts, the batch and the calls are."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import TINY
from mtpjax import LLM, SamplingParams
from mtpjax.decoding.speculative import DecodeState
from mtpjax.engine import engine as engine_module
from mtpjax.engine.engine import Engine
from mtpjax.engine.request import Request
from mtpjax.engine.stop_strings import StopStrings, TextOptions, TextReader
from mtpjax.loading.loaded_model import LoadedModel
from mtpjax.text.detokenizer import make_detokenizer
from mtpjax.text.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.fake_runner import VOCAB, FakeRunner, expected_tokens
from tests.helpers.models import numpy_model, tiny_config

IM_END = 4095


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY / "tokenizer.json")


def cut(pieces: Sequence[str], stops: Sequence[str], min_tokens: int = 0) -> tuple[int, int, str] | None:
    """vLLM's rule, on whole texts: tokens up to the stop string, where it begins, and which it is; None: there is none.

    After each token beyond `min_tokens`: the first string of the list of which some occurrence ends among the new
    characters, at its first such occurrence.
    """
    for count in range(min_tokens + 1, len(pieces) + 1):
        old, text = len("".join(pieces[: count - 1])), "".join(pieces[:count])
        for stop in stops:
            for start in range(len(text) - len(stop) + 1):
                if text[start : start + len(stop)] == stop and start + len(stop) > old:
                    return count, start, stop
    return None


PIECES = st.lists(st.text("abé", max_size=4), max_size=25)
STOPS = st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=4)


def read(reader: TextReader, pieces: Sequence[str], sizes: Sequence[int]) -> tuple[int, str]:
    """Read tokens 0, 1, ... in calls of these sizes. Returns how many the text has, and all text that was taken."""
    num_tokens, text, position, call = 0, "", 0, 0
    while position < len(pieces) and reader.stop_string is None:
        size = sizes[call % len(sizes)]
        num_tokens += reader.read(range(position, min(position + size, len(pieces))))
        text += reader.take()
        position, call = position + size, call + 1
    return num_tokens, text


@pytest.mark.fast
@given(PIECES, STOPS, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 6), st.booleans())
def test_the_place_does_not_depend_on_the_calls(
    pieces: list[str], stops: list[str], sizes: list[int], min_tokens: int, include: bool
) -> None:
    """Text that was handed out is never cut off later, and nothing is held back that no stop string begins with."""
    options = TextOptions(tuple(stops), include)
    reader = TextReader(lambda i: pieces[i], options, min_tokens=min_tokens, keeps_text=True)
    num_tokens, text = read(reader, pieces, sizes)
    expected = cut(pieces, stops, min_tokens)
    if expected is None:
        whole = "".join(pieces)
        held = [s[:n] for s in stops for n in range(1, len(s)) if whole.endswith(s[:n])]
        assert reader.stop_string is None and num_tokens == len(pieces)
        assert whole == text + ("" if include or not pieces else max(held, key=len, default=""))
        return
    count, start, stop = expected
    assert (num_tokens, reader.stop_string) == (count, stop)
    assert text == "".join(pieces)[: start + len(stop) * include] and reader.num_characters == len(text)


class LooksAtTheEndOnly(TextReader):
    """A planted bug: looks once a call, at the end of its text."""

    def read(self, tokens: Sequence[int]) -> int:
        looks: Callable[..., Any] = self._stops.add
        piece = "".join(map(self._decode_token, tokens))
        if found := looks(piece):
            self.stop_string, self.num_characters = found
        return len(tokens)


@pytest.mark.fast
def test_a_reader_that_looks_once_a_call_is_caught() -> None:
    """Of one call it keeps the tokens behind the string; and of two strings it takes the one of the later token."""
    pieces, expected = ["x", "b", "a", "c"], (2, "x", "b")
    for kind in (TextReader, LooksAtTheEndOnly):
        found = set()
        for size in (1, 2, 4):
            reader = kind(lambda i: pieces[i], TextOptions(("a", "b")))
            num_tokens, _ = read(reader, pieces, [size])
            found.add((num_tokens, "".join(pieces)[: reader.num_characters], reader.stop_string))
        assert (found == {expected}) == (kind is TextReader)


@pytest.mark.fast
def test_the_text_of_a_stop_token_counts_only_if_it_is_included() -> None:
    """As in vLLM; and the stop token may then complete a stop string."""
    pieces = ["a", "b", "c"]
    for include, expected in ((False, None), (True, "bc")):
        reader = TextReader(lambda i: pieces[i], TextOptions(("bc",), include), stop_token_ids=(2,))
        assert reader.read([0, 1, 2]) == 3 and reader.stop_string == expected


@pytest.mark.fast
def test_memory_is_bounded_by_the_longest_stop_string() -> None:
    stops = StopStrings(["x" * 50, "y"])
    for _ in range(1000):
        assert stops.add("x" * 49 + "z") is None
    assert len(stops._end) == 49 and stops.num_open == 0
    assert stops.add("xx") is None and stops.num_open == 2 and stops.add("ay") == ("y", 50_003)


def characters(tokens: Sequence[int]) -> list[str]:
    """The characters that each token completes, by decoding all tokens up to it."""
    texts = [tokenizer().decode(tokens[:count]) for count in range(len(tokens) + 1)]
    whole = [text.removesuffix("\ufffd") for text in texts]
    return [new.removeprefix(old) for old, new in zip(whole, whole[1:], strict=False)]


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(3))
def test_the_place_is_that_of_transformers(seed: int) -> None:
    """`StopStringCriteria`, asked after every token; stop strings out of the text, and across token borders."""
    torch = pytest.importorskip("torch", reason="transformers' criteria need torch")
    transformers = pytest.importorskip("transformers", reason="the oracle")
    rng = random.Random(seed)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().hf_tokenizer)
    ascii_tokens = [i for i in range(2000) if tokenizer().decode([i]).isascii()]
    num_found = 0
    for _ in range(12):
        tokens = rng.choices(ascii_tokens, k=25)
        text = tokenizer().decode(tokens)
        stops = [text[start : start + rng.randint(1, 7)] for start in rng.choices(range(20, len(text) - 1), k=2)]
        criteria = transformers.StopStringCriteria(hf, stops)
        expected = next((n for n in range(1, 26) if criteria(torch.tensor([tokens[:n]]), None).item()), None)
        reader = TextReader(make_detokenizer(tokenizer()).add, TextOptions(tuple(stops)))
        count = reader.read(tokens)
        assert (count if reader.stop_string else None) == expected
        num_found += expected is not None
    assert num_found >= 6


@pytest.mark.fast
@given(st.text(min_size=1, max_size=30), st.data())
def test_characters_of_many_tokens(text: str, data: Any) -> None:
    """A stop string of characters whose bytes are tokens of their own, beside the oracle that decodes everything."""
    tokens = tokenizer().encode(text.encode(errors="ignore").decode())
    whole = tokenizer().decode(tokens)
    if not whole:
        return
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 4))]
    reader = TextReader(make_detokenizer(tokenizer()).add, TextOptions((stop,)))
    count = reader.read(tokens)
    expected = cut(characters(tokens), [stop])
    assert expected is not None and (count, reader.num_characters, reader.stop_string) == expected


def letter(token: int) -> str:
    return chr(97 + token)


def fake_requests(seed: int, count: int = 30) -> list[Request]:
    """Requests of the fake runner whose tokens are letters; most have stop strings, and some a stop token."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        stops = tuple("".join(rng.choices("abcdefghijklm", k=rng.randint(1, 2))) for _ in range(rng.randint(0, 3)))
        prompt = tuple(rng.choices(range(VOCAB), k=rng.randint(1, 5)))
        options = TextOptions(stops)
        stop_tokens = tuple(rng.choices(range(VOCAB), k=rng.choice((0, 1))))
        make = partial(TextReader, letter, options, stop_token_ids=stop_tokens) if stops else None
        made.append(Request(i, prompt, rng.randint(0, 30), 0.0, i, stop_tokens, text_options=options, make_reader=make))
    return made


@pytest.mark.fast
@pytest.mark.parametrize("num_slots", [1, 3, 8, 40])
@pytest.mark.parametrize(("drafts", "steps"), [(0, 1), (0, 7), (1, 3), (3, 32), (8, 5)])
def test_any_batch_and_any_calls_give_the_same(num_slots: int, drafts: int, steps: int) -> None:
    """Every request gets its tokens up to its stop string, and the next one gets the slot whole."""
    todo, streamed = fake_requests(drafts), dict[int, list[int]]()
    engine = Engine(FakeRunner(drafts, steps))  # type: ignore[arg-type]
    states = engine.run(todo, num_slots, lambda s, new: streamed.setdefault(s.request.index, []).extend(new))
    num_strings = num_tokens = 0
    for request, state in zip(todo, states, strict=True):
        tokens = expected_tokens(request)
        by_token = bool(tokens) and tokens[-1] in request.stop_token_ids
        found = cut([letter(token) for token in tokens[: len(tokens) - by_token]], request.text_options.stop)
        assert state.tokens == streamed.get(request.index, []) == tokens[: found[0] if found else None]
        reason = found[2] if found else tokens[-1] if by_token else None
        assert (state.stop_reason, state.finish_reason) == (reason, "length" if reason is None else "stop")
        assert state.stopped == (found is None and by_token) and state.finished
        num_strings, num_tokens = num_strings + (found is not None), num_tokens + state.stopped
    assert num_strings >= 5 and num_tokens >= 3


@pytest.mark.fast
def test_a_slot_is_free_after_the_call_that_has_the_stop_string() -> None:
    """The request would go on for 1,000 tokens; the next call of the loop already works for the next request."""
    long = Request(0, (1, 2, 3, 4), 1000, 0.0, 0)
    stop = "".join(letter(token) for token in expected_tokens(long)[20:23])
    long = replace(long, make_reader=partial(TextReader, letter, TextOptions((stop,))))
    short = [Request(i, (i,), 5, 0.0, i) for i in range(1, 4)]
    calls: list[int] = []
    engine = Engine(FakeRunner(0, 32), max_prefill_seqs=1)  # type: ignore[arg-type]
    states = engine.run([long, *short], 1, lambda state, tokens: calls.append(state.request.index))
    assert states[0].tokens == expected_tokens(long)[:23] and states[0].stop_string == stop
    num_calls = 1 + -(-(23 - engine_module.STEPS_OF_FIRST_CALL) // engine_module.STEPS_WITH_STOP_STRINGS)
    assert calls == [0] * num_calls + [1, 2, 3]
    assert states[0].num_steps < 23 + engine_module.STEPS_WITH_STOP_STRINGS


@pytest.mark.fast
def test_the_device_knows_of_a_text_that_the_host_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot, which nobody needs, makes no more steps while the other request goes on."""
    first, second = (Request(i, (1, 2, 3 + i), 200, 0.0, 0) for i in range(2))
    stop = "".join(letter(token) for token in expected_tokens(first)[:3])
    first = replace(first, make_reader=partial(TextReader, letter, TextOptions((stop,))))
    finished: list[int] = []
    runner: Any = FakeRunner(0, 32)
    decode = runner.decode

    def count(state: DecodeState, *rest: Any) -> Any:
        finished.append(int(np.sum(state.finished)))
        return decode(state, *rest)

    monkeypatch.setattr(runner, "decode", count)
    assert [len(state.tokens) for state in Engine(runner).run([first, second], 2)] == [3, 200]
    assert finished == [0] + [1] * 7  # calls of 4 and then of 32 steps: no stop string is left to look for


@cache
def model() -> LoadedModel:
    return numpy_model(tiny_config(moe=False, num_superblocks=1, vocab_size=4096), seed=3)


PROMPTS = ["Once upon a time", "The old man", "It was a cold night", "A dog", "In the forest", "She said"]


SLOW = [pytest.param(drafts, marks=pytest.mark.slow) for drafts in (1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 3, *SLOW])
def test_the_model_gives_the_same_text_with_all_drafts(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and beside others, with calls of 1, 3, 8 and 32 steps, greedy and sampled."""
    llm = LLM(
        model(), tokenizer=TINY / "tokenizer.json", max_model_len=64, max_num_seqs=3, num_speculative_tokens=drafts
    )
    rng = random.Random(1)
    free = [SamplingParams(max_tokens=40, temperature=0.8 * (i % 2), seed=i) for i in range(len(PROMPTS))]
    texts = llm.generate(PROMPTS, free)
    params, expected = [], []
    for i, output in enumerate(texts):
        assert output.text is not None
        start = rng.randint(20, 60)  # of a text without sense: whole words, bytes that are no characters, and others
        stops = (output.text[start : start + rng.randint(1, 5)], "\u2603")
        found = cut(characters(output.token_ids), stops)
        assert found is not None
        count, begin, stop = found
        include = i % 3 == 0
        params.append(replace(free[i], stop=stops, include_stop_str_in_output=include))
        text = output.text[: begin + len(stop) * include]
        expected.append((output.token_ids[:count], text, text, "stop", stop, stop))
    for steps in (1, 3, 8, 32):
        monkeypatch.setattr(engine_module, "STEPS_WITH_STOP_STRINGS", steps)
        answers = llm.generate(PROMPTS, params)
        if steps == 8 and drafts == 3:
            answers += [llm.generate([prompt], [one])[0] for prompt, one in zip(PROMPTS, params, strict=True)]
        for answer, wanted in zip(answers, expected * 2, strict=False):
            one = answer.outputs[0]
            found_here = (one.token_ids, one.text, one.content, one.finish_reason, one.stop_reason, wanted[-1])
            assert found_here == wanted
